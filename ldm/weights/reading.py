"""Read the weights out of any file that holds some; its contents decide what kind it is, not its name."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.weights.errors import CheckpointError, CorruptCheckpoint, UnsupportedCheckpoint, require
from ldm.weights.mapped import MappedFile
from ldm.weights.stand_ins import name_of
from ldm.weights.tensors import check_bools
from ldm.weights.torch_files import read_legacy, read_zip
from ldm.weights.writing import MAX_HEADER
from ldm.wording import did_you_mean, some

# Where training frameworks put the weights, in the order in which they are looked for.
STATE_DICT_KEYS = ("state_dict", "model", "model_state_dict", "module", "params")
INDEX = ".index.json"
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})(?P<suffix>\.(safetensors|bin))")
_MAX_INDEX = 64 * 2**20

# Beginnings of things that are no weights but often lie where weights are expected.
_FOREIGN = {
    rb"version https://git-lfs": "a git-lfs pointer, not the weights: run `git lfs pull` in its repository",
    rb"(\.\./\.git)?/annex/": "a git-annex pointer, not the weights: run `git annex get` in its repository",
    rb"\x1f\x8b|BZh|\xfd7zXZ\x00|\x28\xb5\x2f\xfd|7z\xbc\xaf\x27\x1c|Rar!": "compressed (gzip, say)",
    rb"\x89HDF": "an HDF5 file (Keras or TensorFlow), not of torch",
    rb"\x93NUMPY": "a numpy array, not of torch",
    rb"GGUF": "a GGUF file, not of torch",
    rb"PK\x05\x06": "an empty zip archive",
    rb"[\xef\xbb\xbf\s]*<": "a web page (HTML or XML), not the weights: an error or a login",
    rb"[\xef\xbb\xbf\s]*[{[]": "text (JSON), not the weights",
    rb".{257}ustar": "a tar archive (of torch before 0.1.10, or not unpacked)",
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

    Objects of foreign classes become inert `Placeholder`s or plain values (see `ldm.weights.plain_values`).
    Whatever would run code is refused (see `ldm.weights.unpickle` for the exact line).

    Args:
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
    path, device = Path(path), torch.device(map_location)
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
    if path.is_dir():
        names = sorted(inside.name for inside in path.iterdir() if inside.is_file())
        raise CheckpointError(str(path), f"is a folder; give one of its files: {some(names, 8) or 'none'}")
    if not path.exists():
        beside = sorted(other.name for other in path.parent.glob("*"))
        raise FileNotFoundError(f"{path} does not exist{did_you_mean(path.name, beside)}")
    require(path.is_file(), str(path), "is no regular file", CheckpointError)


def _read_file(path: Path, device: torch.device, key: str | None, inert: Sequence[str]) -> Weights:
    file = MappedFile(path)
    kind = _kind(file)
    if kind == "safetensors" and key is None:
        return _read_safetensors(file, device)
    return _state_dict(_read_object(file, kind, device, inert), key, file.where)


def _read_object(file: MappedFile, kind: str, device: torch.device, inert: Sequence[str]) -> Any:
    if kind == "safetensors":
        raise CheckpointError(file.where, "is a .safetensors file, which has tensors only, and no entries")
    return read_zip(file, device, inert) if kind == "zip" else read_legacy(file, device, inert)


def _kind(file: MappedFile) -> str:
    """`safetensors`, `zip` or `legacy`, from the first bytes; says what it is if it is none of them."""
    head = bytes(file.view[:512])
    header_length = int.from_bytes(head[:8], "little")
    # First, because the length of a safetensors header can look like any text.
    if head[8:9] == b"{" and header_length <= MAX_HEADER:
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head.startswith(_PICKLES):
        return "legacy"
    what = next((what for start, what in _FOREIGN.items() if re.match(start, head, re.DOTALL)), None)
    if not what and (head[8:9] == b"{" or (file.size < 9 and file.where.endswith(".safetensors"))):
        return "safetensors"  # with an impossible header, which its reader explains
    if not any(head):
        raise CorruptCheckpoint(file.where, "begins with nothing but zeros: a download or a copy was cut off")
    what = what or "no .safetensors file and no file of torch.save"
    raise UnsupportedCheckpoint(file.where, f"is {what}; it begins with {head[:80]!r}")


def _read_safetensors(file: MappedFile, device: torch.device) -> Weights:
    """Tensors as pages of the file; the library finds what is wrong with header, sizes and offsets."""
    try:
        with safe_open(file.where, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        if "unknown variant" in str(error):
            raise UnsupportedCheckpoint(file.where, f"has an unknown type of elements: {error}") from error
        what = f"is truncated or damaged ({file.size} bytes): {str(error)[:200]}"
        raise CorruptCheckpoint(file.where, what) from error
    for name, tensor in tensors.items():
        aligned = tensor.clone() if tensor.data_ptr() % tensor.dtype.itemsize else tensor
        tensors[name] = aligned.to(device)
        check_bools(tensors[name], file.where)
    return Weights(tensors, metadata)


def _state_dict(content: Any, key: str | None, where: str) -> Weights:
    """Split what was pickled into the tensors of the state dict and everything else."""
    if not isinstance(content, dict):
        tensor = f"a tensor of shape {tuple(content.shape)}" if isinstance(content, Tensor) else None
        raise CheckpointError(where, f"holds {tensor or name_of(content)}, no dict of named weights")
    if key is None:
        key = next((known for known in STATE_DICT_KEYS if _holds_tensors(content.get(known))), None)
    elif not _holds_tensors(content.get(key)):
        having = ", ".join(_label(k) for k, value in content.items() if _holds_tensors(value)) or "no key"
        raise CheckpointError(where, f"has no weights under {key!r}, but under {having}")
    inside = content if key is None else content[key]
    tensors = {name: value for name, value in inside.items() if isinstance(value, Tensor)}
    rest = {name: value for name, value in inside.items() if name not in tensors}
    if not tensors:
        found = ", ".join(map(_label, list(content)[:12])) or "nothing"
        keys = ", ".join(STATE_DICT_KEYS)
        raise CheckpointError(where, f"has no weights, neither as they are nor under {keys}; it has {found}")
    for name in tensors:
        what = f"has a tensor under a key that is no text, but a {name_of(name)}"
        require(isinstance(name, str), where, what, CheckpointError)
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
    where, size = str(path), path.stat().st_size
    require(size <= _MAX_INDEX, where, f"the index has {size} bytes; this is absurd")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        placed = dict(index["weight_map"])
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise CorruptCheckpoint(where, f"is no index of shards: {type(error).__name__}") from error
    for name, shard in placed.items():
        # Only files beside the index: a name such as "../../x" must not lead anywhere else.
        plain = isinstance(shard, str) and shard not in ("", ".", "..") and not re.search(r"[/\\\0:]", shard)
        require(plain, where, f"the shard of {name!r} is {shard!r:.80}, which is no plain file name")
    names = sorted(set(placed.values()))
    missing = [shard for shard in names if not (path.parent / shard).is_file()]
    require(not missing, where, f"these shards are not beside the index: {', '.join(missing)}")
    shards = {shard: _read_file(path.parent / shard, device, key, inert) for shard in names}
    lost = [f"{name} (in {shard})" for name, shard in placed.items() if name not in shards[shard].tensors]
    require(not lost, where, f"the index names tensors that its shards lack: {some(lost, 8)}")
    stray = [name for weights in shards.values() for name in weights.tensors if name not in placed]
    require(not stray, where, f"the index does not name tensors of its shards: {some(stray, 8)}")
    metadata = index.get("metadata")
    return Weights(
        {name: shards[shard].tensors[name] for name, shard in placed.items()},
        metadata if isinstance(metadata, dict) else {},
        {shard: weights.extra for shard, weights in shards.items() if weights.extra},
    )
