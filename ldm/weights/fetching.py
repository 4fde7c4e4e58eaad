"""Published weight files: found on this machine or fetched once, checked by SHA-256, never half written.

A file is looked for in the weights folder, then in places where other packages keep the same file; only then
is it downloaded, into the weights folder. What is found this way must have the published checksum; a path
given by the user is taken as it is.
"""

import hashlib
import http.client
import logging
import os
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ldm.files import whole_file

log = logging.getLogger(__name__)

TIMEOUT = 30.0  # seconds without an answer or without a byte
_CHUNK = 1 << 20


class WeightsError(ValueError):
    """A published file is neither here nor can it be fetched, or is not the published one."""


@dataclass(frozen=True)
class WeightFile:
    """A published file.

    Attributes:
        option: the key of a config that takes a local path instead, for messages.
        elsewhere: gives other places where it may lie.
        instead: how to do without it, for messages.
    """

    name: str
    url: str
    sha256: str
    megabytes: float
    option: str
    elsewhere: Callable[[], Iterable[Path]] = tuple
    instead: str = ""


def weights_folder() -> Path:
    """Where published weights are kept: `$LDM_WEIGHTS`, `$XDG_CACHE_HOME/ldm` or `~/.cache/ldm`."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(os.environ.get("LDM_WEIGHTS") or cache / "ldm").expanduser()


def find_weights(file: WeightFile, path: str | os.PathLike | None = None, timeout: float = TIMEOUT) -> Path:
    """The local path of `file`, downloaded on first use.

    Safe to call from several processes at once: each writes a file of its own, which is renamed when whole.

    Args:
        path: a local file to use instead (not checked against the published checksum).
        timeout: seconds.

    Raises:
        WeightsError: (a ValueError) there is none; it says what can be done.
    """
    if path is not None:
        given = Path(path).expanduser()
        if not given.is_file():
            raise WeightsError(f"{file.option}: no file at {given}; {_ways_out(file)}")
        return given
    target = weights_folder() / file.name
    if target.is_file():
        if (actual := _sha256(target)) == file.sha256:
            return target
        raise WeightsError(
            f"{target} is not the published {file.name}: its SHA-256 is {actual}, not {file.sha256} "
            f"(a copy that broke off?). Delete it to have it fetched again; {_ways_out(file)}"
        )
    for candidate in file.elsewhere():
        if candidate.is_file() and _sha256(candidate) == file.sha256:
            return candidate
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        log.info("fetching %s (%g MB) into %s", file.url, file.megabytes, target.parent)
        with whole_file(target, durable=True) as stream:
            _receive(file, stream, timeout)
    except (OSError, http.client.HTTPException, ValueError) as error:  # URLError and timeouts are OSErrors
        raise WeightsError(
            f"{file.name} ({file.megabytes:g} MB) is not on this machine and could not be fetched into "
            f"{target.parent}: {error}; {_ways_out(file)}"
        ) from error
    return target


def _ways_out(file: WeightFile) -> str:
    return (
        f"fetch {file.url} and give it by {file.option}=/path/to/{file.name}, or put it at "
        f"{weights_folder() / file.name} (the environment's LDM_WEIGHTS names another folder){file.instead}"
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def _receive(file: WeightFile, stream: BinaryIO, timeout: float) -> None:
    """Download into `stream`; ValueError if it is cut off or not the published file."""
    digest, received = hashlib.sha256(), 0
    with urllib.request.urlopen(file.url, timeout=timeout) as answer:
        announced = answer.headers.get("Content-Length")
        while block := answer.read(_CHUNK):
            digest.update(block)
            received += len(block)
            stream.write(block)
    if announced is not None and received != int(announced):
        raise ValueError(f"the connection broke off after {received} of {announced} bytes of {file.url}")
    if digest.hexdigest() != file.sha256:
        raise ValueError(f"what {file.url} sent has SHA-256 {digest.hexdigest()}, not {file.sha256}")
