"""YAML in, objects out.

A configuration is a tree of plain sections (`training: {steps: 1000}`) and of parts that name their class
(`target: ldm.models.unet.UNetModel`, `params: {...}`). `load` reads a file and merges overrides, `check`
holds every part against the signature of its class before anything slow starts, `check_section` does the same
for a plain section and its dataclass, `fill` puts in what the program knows, and `instantiate` builds. A
mistake is a `ConfigError` that names file, line and full path; all mistakes of a file are reported together.
"""

from ldm.config.checking import check, check_section, instantiate
from ldm.config.other_runs import from_run
from ldm.config.provided import fill
from ldm.config.resolved import load, loads
from ldm.config.tree import ConfigError, differences, save, to_plain, to_yaml

__all__ = [
    "ConfigError",
    "check",
    "check_section",
    "differences",
    "fill",
    "from_run",
    "instantiate",
    "load",
    "loads",
    "save",
    "to_plain",
    "to_yaml",
]
