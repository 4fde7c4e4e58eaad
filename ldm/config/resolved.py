"""A whole configuration: files read, overrides merged in, interpolations resolved, nothing left open."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.config.overrides import assume, override
from ldm.config.tree import ConfigError, Places, entries, keep_places, leaves, locate, reason_of
from ldm.config.yaml_files import parse, read


def load(
    path: str | os.PathLike,
    overrides: Sequence[str] = (),
    sections: Mapping[str, type] | None = None,
    assumed: Mapping[str, Any] | None = None,
) -> DictConfig:
    """Read a YAML file, merge `overrides` in, and resolve every interpolation.

    A root key `base: other.yaml` (relative to the file) is read first and lies underneath: mappings are
    merged, lists and values replaced, and a mapping that names another `target` replaces the base's whole.

    Args:
        path: the YAML file.
        overrides: `a.b.c=value`, the value written as in YAML; list items by index (`a.0.b` or `a[0].b`).
            Where a mapping stands, `a.b=other.yaml` takes the same part of another configuration, whole.
        sections: dataclasses of plain sections by their dotted path ("" is the whole); a field that the YAML
            leaves out may then be overridden too, as keys below a target's params always may (see `check`).
        assumed: by dotted path, values in the place of what is open (`???`) or refers to something that is
            not there, for those who look at a configuration without running it; their place is `ASSUMED`.

    Raises:
        ConfigError: no such file, not YAML, a key given twice, an override that fits nothing, an open `???`.
    """
    tree, places = read(Path(path))
    problems = []
    for text in overrides:
        try:
            override(tree, places, text, sections or {})
        except ValueError as error:
            problems.append(f"override '{text}': {error}")
    if problems:
        raise ConfigError(*problems)
    assume(tree, places, assumed or {})
    return _resolved(tree, places)


def loads(text: str, origin: str = "<text>") -> DictConfig:
    """A complete configuration from YAML text, for example out of a checkpoint's metadata.

    Raises:
        ConfigError: as `load`; also where the text refers to something outside itself by an interpolation
            (which could read the environment) or a `base`.
    """
    tree, places = parse(text, origin)
    loose = [path for path, value in leaves(tree) if "${" in str(value)] + ["base"] * ("base" in tree)
    if loose:
        raise ConfigError(*(f"{locate(places, p)}: refers to something outside the text" for p in loose))
    return _resolved(tree, places)


def _resolved(tree: dict, places: Places) -> DictConfig:
    config = OmegaConf.create(tree)
    keep_places(config, places)
    # Not OmegaConf.missing_keys: it also counts what only refers to an open value.
    missing = [path for path, value in entries(tree) if value == "???"]
    if missing:
        how = "no value yet; give {}=VALUE on the command line"
        raise ConfigError(*(f"{locate(places, path)}: {how.format(path)}" for path in missing))
    problems = []
    for path, value in entries(tree):
        try:
            if isinstance(value, str) and "${" in value:
                OmegaConf.select(config, path)
        except OmegaConfBaseException as error:
            problems += _said_by_resolver(error) or [f"{locate(places, path)}: {reason_of(error)}"]
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    OmegaConf.resolve(config)
    return config


def _said_by_resolver(error: BaseException | None) -> list[str]:
    """The problems of a ConfigError that a resolver of ours raised, which OmegaConf wraps in its own."""
    while error is not None and not isinstance(error, ConfigError):
        error = error.__cause__ or error.__context__
    return [] if error is None else error.problems
