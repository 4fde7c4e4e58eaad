"""Read the weights out of any file that holds some; its contents decide what kind it is, not its name."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.weights.errors import CheckpointError, CorruptCheckpoint, UnsupportedCheckpoint
from ldm.weights.mapped import MappedFile
from ldm.weights.safetensors_files import MAX_HEADER, read_safetensors
from ldm.weights.stand_ins import name_of
from ldm.weights.torch_files import read_legacy, read_zip
from ldm.wording import did_you_mean, some

# Where training frameworks put the weights, in the order in which they are looked for.
STATE_DICT_KEYS = ("state_dict", "model", "model_state_dict", "module", "params")
_KEYS = ", ".join(STATE_DICT_KEYS)
INDEX = ".index.json"
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})(?P<suffix>\.(safetensors|bin))")
_MAX_INDEX = 64 * 2**20

# Beginnings of things that are no weights but often lie where weights are expected.
_ANNEX = "a git-annex pointer, not the weights: run `git annex get` in its repository"
_FOREIGN = {
    b"version https://git-lfs": "a git-lfs pointer, not the weights: run `git lfs pull` in its repository",
    b"/annex/objects/": _ANNEX,
    b"../.git/annex/": _ANNEX,
    b"\x1f\x8b": "compressed with gzip: unpack it first",
    b"BZh": "compressed with bzip2: unpack it first",
    b"\xfd7zXZ\x00": "compressed with xz: unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it first",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it first",
    b"Rar!": "a RAR archive: unpack it first",
    b"\x89HDF": "an HDF5 file (Keras or TensorFlow), not of torch",
    b"\x93NUMPY": "a numpy array, not of torch",
    b"GGUF": "a GGUF file, not of torch",
    b"PK\x05\x06": "an empty zip archive",
}
_PICKLES = tuple(b"\x80" + bytes([protocol]) for protocol in (2, 3, 4, 5))


@dataclass(frozen=True)
class Weights:
    """What a file of weights holds.

    Attributes:
        tensors: by name; tensors that shared memory when they were saved still do.
        metadata: of a .safetensors file (text to text) or of an index of shards; else empty.
        extra: everything else of a pickle: `hyper_parameters`, `global_step`, optimizer states, ... as plain
            values, tensors and `Placeholder`s.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


def read_weights(
    path: str | Path,
    map_location: str | torch.device = "cpu",
    *,
    key: str | None = None,
    inert: Sequence[str] = (),
) -> Weights:
    """The weights in a file, without running anything that is in it.

    Reads .safetensors, files of `torch.save` (.ckpt, .pt, .pth, .bin; the zip format and the one before torch
    1.6), and both kinds in shards, given their `*.index.json`. On the CPU, tensors are pages of the file that
    are read when used, so a file costs no memory of its own; "meta" reads shapes and types only.

    A pickle's tensors and plain containers are built by this project's own functions. Objects of foreign
    classes become inert `Placeholder`s; OmegaConf's containers, namespaces, paths and numpy's arrays and
    numbers become plain values. Whatever would run code is refused (see `ldm.weights.pickle_globals` for
    the exact line).

    Args:
        path: the file.
        map_location: the device for the tensors.
        key: the entry of a pickled dict that holds the weights ("ema", say). By default the first of
            `STATE_DICT_KEYS` that holds tensors, else the dict itself.
        inert: patterns of names of your own classes ("myproject.modes.*") whose calls in the pickle are data,
            such as members of an Enum; they become placeholders instead of refusals. They are still not
            called.

    Raises:
        FileNotFoundError: there is no such file.
        UnsafeCheckpoint: the pickle asks for code to be run; nothing of it was.
        CorruptCheckpoint: truncated, damaged, empty, or absurd (zip bombs, impossible shapes).
        UnsupportedCheckpoint: another kind of file; the message says which.
        CheckpointError: the file is whole and safe, but the weights are not where they should be.
    """
    path = Path(path)
    device = torch.device(map_location)
    _check_exists(path)
    if path.name.endswith(INDEX):
        return _read_shards(path, device, key, inert)
    shard = _SHARD.fullmatch(path.name)
    if shard and int(shard["count"]) > 1:
        index = f"{shard['stem']}{shard['suffix']}{INDEX}"
        raise CheckpointError(str(path), f"is one of {int(shard['count'])} shards; give their index, {index}")
    return _read_file(path, device, key, inert)


def read_pickled(path: str | Path, *, inert: Sequence[str] = ()) -> Any:
    """Everything in one file of `torch.save`, on the CPU, as `read_weights` reads it: tensors, plain
    containers and `Placeholder`s; nothing that is in it is run.

    Raises:
        CheckpointError: as `read_weights`, and for a .safetensors file, which is no pickle.
    """
    path = Path(path)
    _check_exists(path)
    file = MappedFile(path)
    return _read_object(file, _kind(file), torch.device("cpu"), inert)


def _check_exists(path: Path) -> None:
    beside = sorted(other.name for other in path.parent.iterdir()) if path.parent.is_dir() else []
    if path.is_dir():
        names = sorted(inside.name for inside in path.iterdir() if inside.is_file())
        raise CheckpointError(
            str(path), f"is a folder; give one of its files: {some(names, 8) or 'it has none'}"
        )
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist{did_you_mean(path.name, beside)}")
    if not path.is_file():
        raise CheckpointError(str(path), "is no regular file")


def _read_file(path: Path, device: torch.device, key: str | None, inert: Sequence[str]) -> Weights:
    file = MappedFile(path)
    kind = _kind(file)
    if kind == "safetensors" and key is None:
        return Weights(*read_safetensors(file, device))
    return _state_dict(_read_object(file, kind, device, inert), key, file.where)


def _read_object(file: MappedFile, kind: str, device: torch.device, inert: Sequence[str]) -> Any:
    if kind == "safetensors":
        raise CheckpointError(
            file.where, "is a .safetensors file, which holds tensors only and has no entries"
        )
    return read_zip(file, device, inert) if kind == "zip" else read_legacy(file, device, inert)


def _kind(file: MappedFile) -> str:
    """`safetensors`, `zip` or `legacy`, from the first bytes; says what it is if it is none of them."""
    head = bytes(file.view[:512])
    # First, because the length of a safetensors header can look like any text.
    header_length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header_length <= MAX_HEADER:
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head.startswith(_PICKLES):
        return "legacy"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    what = next((what for beginning, what in _FOREIGN.items() if head.startswith(beginning)), None)
    if text.startswith(b"<"):
        what = "a web page (HTML or XML), not the weights: the download led to an error or a login"
    elif text.startswith((b"{", b"[")):
        what = f"text (JSON), not the weights: {head[:80].decode('utf-8', 'replace')!r}"
    elif head[257:262] == b"ustar":
        what = "a tar archive: unpack it or, if torch before 0.1.10 wrote it, save it again with another"
    if what:
        raise UnsupportedCheckpoint(file.where, f"is {what}")
    if head[8:9] == b"{" or (file.size < 9 and file.where.endswith(".safetensors")):
        return "safetensors"  # with an impossible header, which its reader explains
    if not any(head):
        raise CorruptCheckpoint(file.where, "begins with nothing but zeros: a download or a copy was cut off")
    raise UnsupportedCheckpoint(
        file.where, f"is no .safetensors file and no file of torch.save; it begins with {head[:16]!r}"
    )


def _state_dict(content: Any, key: str | None, where: str) -> Weights:
    """Split what was pickled into the tensors of the state dict and everything else."""
    if not isinstance(content, dict):
        shape = f"a tensor of shape {tuple(content.shape)}" if isinstance(content, Tensor) else None
        what = shape or name_of(content)
        raise CheckpointError(where, f"holds {what}, no dict of named weights; save a module's state_dict()")
    if key is None:
        key = next((known for known in STATE_DICT_KEYS if _holds_tensors(content.get(known))), None)
    elif not _holds_tensors(content.get(key)):
        having = ", ".join(_label(k) for k, value in content.items() if _holds_tensors(value)) or "no key"
        raise CheckpointError(where, f"has no weights under {key!r}, but under {having}")
    inside = content if key is None else content[key]
    if not _holds_tensors(inside):
        found = ", ".join(_label(k) for k in list(content)[:12]) or "nothing"
        raise CheckpointError(where, f"has no weights, neither as they are nor under {_KEYS}; it has {found}")
    tensors = {name: value for name, value in inside.items() if isinstance(value, Tensor)}
    odd = [name_of(name) for name in tensors if not isinstance(name, str)]
    if odd:
        raise CheckpointError(where, f"has a tensor under a key that is no text, but a {odd[0]}")
    rest = {name: value for name, value in inside.items() if not isinstance(value, Tensor)}
    if key is None:
        return Weights(tensors, {}, rest)
    extra = {name: value for name, value in content.items() if name != key}
    return Weights(tensors, {}, {**extra, **({key: rest} if rest else {})})


def _label(key: Any) -> str:
    return repr(key[:40]) if isinstance(key, str) else name_of(key)


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(item, Tensor) for item in value.values())


def _read_shards(path: Path, device: torch.device, key: str | None, inert: Sequence[str]) -> Weights:
    """All tensors that an index names, each from the shard it names."""
    if path.stat().st_size > _MAX_INDEX:
        raise CorruptCheckpoint(str(path), f"the index has {path.stat().st_size} bytes; this is absurd")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        placed = dict(index["weight_map"])
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise CorruptCheckpoint(str(path), f"is no index of shards: {type(error).__name__}") from error
    for name, shard in placed.items():
        # Only files beside the index: a name such as "../../x" must not lead anywhere else.
        if not isinstance(shard, str) or shard in ("", ".", "..") or re.search(r"[/\\\0:]", shard):
            raise CorruptCheckpoint(
                str(path), f"the shard of {name!r} is {shard!r:.80}, which is no plain file name"
            )
    names = sorted(set(placed.values()))
    missing = [shard for shard in names if not (path.parent / shard).is_file()]
    if missing:
        raise CorruptCheckpoint(str(path), f"these shards are not beside the index: {', '.join(missing)}")
    shards = {shard: _read_file(path.parent / shard, device, key, inert) for shard in names}
    lost = [f"{name} (in {shard})" for name, shard in placed.items() if name not in shards[shard].tensors]
    if lost:
        raise CorruptCheckpoint(str(path), f"the index names tensors that its shards lack: {some(lost, 8)}")
    stray = [name for weights in shards.values() for name in weights.tensors if name not in placed]
    if stray:
        raise CorruptCheckpoint(str(path), f"the index does not name tensors of its shards: {some(stray, 8)}")
    metadata = index.get("metadata")
    return Weights(
        {name: shards[shard].tensors[name] for name, shard in placed.items()},
        metadata if isinstance(metadata, dict) else {},
        {shard: weights.extra for shard, weights in shards.items() if weights.extra},
    )
