"""Reading and holding to account the `config.json` of a part of a diffusers folder."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ldm.config import ConfigError
from ldm.weights.errors import CheckpointError, CorruptCheckpoint, UnsupportedCheckpoint

CONFIG = "config.json"
#: The release of diffusers with which what is written here was checked.
DIFFUSERS_VERSION = "0.42.1"
_MAX_BYTES = 16 * 2**20
T = TypeVar("T")


def read_config(path: Path) -> dict[str, Any]:
    """A JSON file with one object in it; CorruptCheckpoint if it is absent, too long or another thing."""
    if not path.is_file():
        raise CorruptCheckpoint(str(path), "does not exist; is the folder complete?")
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise CorruptCheckpoint(str(path), f"has {size} bytes, which is absurd for a configuration")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(str(path), f"is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise CorruptCheckpoint(str(path), f"holds a {type(config).__name__}, no JSON object")
    return config


@contextlib.contextmanager
def explained(where: str) -> Iterator[None]:
    """What values of the wrong kind in a config lead to, as an error that names the config."""
    try:
        yield
    except (CheckpointError, ConfigError):
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        what = f"has values that make no sense together: {type(error).__name__}: {error}"
        raise CorruptCheckpoint(where, what) from error


def choice(config: "Mapping[str, Any] | Reader", key: str, known: Mapping[Any, T], where: str) -> T:
    """What a value of a config stands for; an unknown one is an UnsupportedCheckpoint."""
    if config[key] not in known:
        raise UnsupportedCheckpoint(where, f"{key}={config[key]!r}; known are {', '.join(map(str, known))}")
    return known[config[key]]


class Reader:
    """The keys of one config, each of which must be asked for, fixed or known to be of no effect.

    Args:
        config: the JSON object.
        defaults: what diffusers takes for keys that are absent.
        fixed: key -> the only value that the networks here can have.
        harmless: keys without an effect on what the network computes.
        where: the file, for messages.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        defaults: Mapping[str, Any],
        fixed: Mapping[str, Any],
        harmless: frozenset[str],
        where: str,
    ):
        self.where = where
        self._values = {**defaults, **fixed, **config}
        known = {*defaults, *fixed, *harmless}
        problems = [
            f"{key}={self._values[key]!r}, where only {value!r} is known here"
            for key, value in fixed.items()
            if not _same(self._values[key], value)
        ]
        # A key of a later release: as long as it is off, nothing has changed.
        problems += [
            f"{key}={value!r}, which this reader does not know"
            for key, value in config.items()
            if key not in known and not key.startswith("_") and value not in (None, False)
        ]
        if problems:
            self.refuse("; ".join(problems))

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def integers(self, key: str, count: int) -> list[int]:
        """One whole number for each of `count` levels, from one for all or from a list."""
        value = self[key]
        if isinstance(value, int):
            return [value] * count
        if not isinstance(value, list) or len(value) != count or not all(isinstance(v, int) for v in value):
            self.refuse_value(key, f"where a number or a list of {count} numbers belongs")
        return list(value)

    def refuse_value(self, key: str, why: str = "") -> None:
        """Raise it for the value of a key."""
        self.refuse(f"{key}={self[key]!r} {why}".rstrip())

    def refuse(self, reason: str) -> None:
        """Raise an UnsupportedCheckpoint with this reason."""
        raise UnsupportedCheckpoint(self.where, f"cannot be built here: {reason}")


def _same(value: Any, wanted: Any) -> bool:
    """Equal, a number as good as equal, or a list of which every element is."""
    if isinstance(value, list):
        return all(_same(item, wanted) for item in value)
    if isinstance(value, int | float) and isinstance(wanted, int | float):
        return abs(value - wanted) <= 1e-9 * abs(wanted)
    return value == wanted
