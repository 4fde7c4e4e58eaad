"""YAML in, objects out: reading with overrides, the check against signatures, instantiation."""

from ldm.config.checking import check, check_section, instantiate
from ldm.config.tree import ConfigError, differences, load, loads, save, to_plain, to_yaml

__all__ = [
    "ConfigError",
    "check",
    "check_section",
    "differences",
    "instantiate",
    "load",
    "loads",
    "save",
    "to_plain",
    "to_yaml",
]
