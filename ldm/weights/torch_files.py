"""Files of `torch.save`: the zip archive of torch 1.6 and later, and the chain of pickles before it."""

import struct
from collections.abc import Sequence
from typing import Any

import torch

from ldm.weights.budget import Budget
from ldm.weights.errors import CorruptCheckpoint, UnsupportedCheckpoint
from ldm.weights.mapped import MappedFile
from ldm.weights.placeholders import GlobalName
from ldm.weights.plain_values import PlainValues
from ldm.weights.recovered_objects import RECOVER
from ldm.weights.tensors import REBUILD, storage_dtype
from ldm.weights.unpickle import describe
from ldm.weights.zip_members import Member, checked_bytes, read_members, require_stored

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_BIG_ENDIAN = "was written on a big-endian machine; save it on a usual one"
_CALLABLES = frozenset([*REBUILD, *RECOVER])


def _moved(storage: torch.UntypedStorage, device: torch.device) -> torch.UntypedStorage:
    """A whole storage on a device, so that tensors which share one still do."""
    if device.type == "meta":
        return torch.UntypedStorage(storage.nbytes(), device="meta")
    return torch.empty(0, dtype=torch.uint8).set_(storage).to(device).untyped_storage()


def read_zip(file: MappedFile, device: torch.device, inert: Sequence[str] = ()) -> Any:
    """The object in a zip archive of `torch.save`, with tensors and plain containers only.

    Tensors are views of the mapped file. A storage's checksum is compared when a tensor uses it (not for
    "meta").
    """
    members = read_members(file)
    root = _archive_root(file, members)
    order = members.get(f"{root}/byteorder")
    if order is not None and bytes(checked_bytes(file, order)).strip() != b"little":
        raise UnsupportedCheckpoint(file.where, _BIG_ENDIAN)
    loaded: dict[str, torch.UntypedStorage] = {}

    def load(key: str, dtype: torch.dtype, count: int, view: tuple | None) -> torch.UntypedStorage:
        member = members.get(f"{root}/data/{key}")
        if member is None or view is not None:
            raise CorruptCheckpoint(file.where, f"the archive has no data for the storage {key[:80]!r}")
        require_stored(file, member.info)
        size = member.info.file_size
        # The member is the truth about the size; the pickle may leave out a last part of an element.
        if not 0 <= size - count * dtype.itemsize < dtype.itemsize:
            what = f"the storage {key[:80]!r} should have {count} elements of {dtype}, but has {size} bytes"
            raise CorruptCheckpoint(file.where, what)
        if key not in loaded:
            if device.type != "meta":
                checked_bytes(file, member)
            loaded[key] = _moved(file.storage(member.offset, size), device)
        return loaded[key]

    budget = Budget(file.where)
    data = checked_bytes(file, members[f"{root}/data.pkl"])
    described = describe(data, budget, callables=_CALLABLES, inert=inert)
    return PlainValues(budget, load).recover(described.root)


def _archive_root(file: MappedFile, members: dict[str, Member]) -> str:
    """The one folder of the archive that holds `data.pkl`."""
    roots = [
        name[: -len("/data.pkl")] for name in members if name.endswith("/data.pkl") and name.count("/") == 1
    ]
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in members):
        raise UnsupportedCheckpoint(
            file.where, "is a TorchScript archive, which holds code; save the module's state_dict() instead"
        )
    if any(name.endswith(".npy") for name in members):
        raise UnsupportedCheckpoint(file.where, "is an archive of numpy arrays (.npz), not of torch")
    if len(roots) != 1:
        what = f"{len(roots)} files data.pkl" if roots else "no data.pkl"
        inside = ", ".join(list(members)[:5]) or "nothing"
        raise UnsupportedCheckpoint(
            file.where, f"is a zip archive, but not of torch.save: it has {what}, but {inside}"
        )
    return roots[0]


def read_legacy(file: MappedFile, device: torch.device, inert: Sequence[str] = ()) -> Any:
    """The object in a file of torch before 1.6: pickles of a magic number, a version, the machine, the object
    and the storages' keys, then each storage as its number of elements and its data."""
    budget = Budget(file.where)
    described = describe(file.view, budget, _legacy_header(file, budget), callables=_CALLABLES, inert=inert)
    keys = describe(file.view, budget, described.end)
    storages = _legacy_storages(file, keys.root, keys.end, described.storages, device)

    def load(key: str, dtype: torch.dtype, count: int, view: Any) -> torch.UntypedStorage:
        storage, of_file = storages[key]
        if of_file != (dtype, count):
            raise CorruptCheckpoint(file.where, f"the storage {key[:80]!r} has two types or sizes")
        return _part(file, storage, dtype, view)

    return PlainValues(budget, load).recover(described.root)


def _legacy_header(file: MappedFile, budget: Budget) -> int:
    """The position of the object, behind the magic number, the version and the machine."""
    magic = describe(file.view, budget)
    if magic.root != LEGACY_MAGIC:
        raise UnsupportedCheckpoint(
            file.where, "is a pickle, but not of torch.save; its tensors cannot be read safely"
        )
    version = describe(file.view, budget, magic.end)
    machine = describe(file.view, budget, version.end)
    if version.root != _LEGACY_PROTOCOL or not isinstance(machine.root, dict):
        raise CorruptCheckpoint(
            file.where, "begins like a file of torch before 1.6, but does not go on like one"
        )
    if machine.root.get("little_endian") is not True:
        raise UnsupportedCheckpoint(file.where, _BIG_ENDIAN)
    return machine.end


def _legacy_storages(
    file: MappedFile, keys: Any, position: int, kinds: dict[str, tuple[GlobalName, int]], device: torch.device
) -> dict[str, tuple[torch.UntypedStorage, tuple[torch.dtype, int]]]:
    """Key -> memory, type and number of elements, in the order in which the file has them."""
    of_texts = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not of_texts or sorted(keys) != sorted(kinds):
        raise CorruptCheckpoint(file.where, "the list of storages does not fit the tensors")
    storages = {}
    for key in keys:
        kind, count = kinds[key]
        dtype = storage_dtype(kind, file.where)
        (stored,) = struct.unpack("<q", bytes(file.view[position : position + 8]).ljust(8, b"\xff"))
        if stored != count:
            raise CorruptCheckpoint(
                file.where,
                f"the storage {key[:80]!r} has another size than its tensors say, or the file is truncated",
            )
        nbytes = count * dtype.itemsize
        storages[key] = _moved(file.storage(position + 8, nbytes), device), (dtype, count)
        position += 8 + nbytes
    return storages


def _part(
    file: MappedFile, storage: torch.UntypedStorage, dtype: torch.dtype, view: tuple | None
) -> torch.UntypedStorage:
    """A storage or, in the oldest files, (key, offset, size) of a view of it in elements."""
    if view is None:
        return storage
    _, offset, size = view
    held = storage.nbytes() // dtype.itemsize
    if type(offset) is not int or type(size) is not int or not 0 <= offset <= offset + size <= held:
        raise CorruptCheckpoint(file.where, "a view of a storage reaches outside of it")
    if storage.device.type == "meta":
        return torch.UntypedStorage(size * dtype.itemsize, device="meta")
    return storage[offset * dtype.itemsize : (offset + size) * dtype.itemsize]
