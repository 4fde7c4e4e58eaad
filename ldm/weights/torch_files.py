"""Files of `torch.save`: the zip archive of torch 1.6 and later, and the chain of pickles before it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ldm.weights.errors import CorruptCheckpoint, UnsupportedCheckpoint
from ldm.weights.mapped import MappedFile
from ldm.weights.plain_values import Plain
from ldm.weights.unpickle import StorageLoader, Unpickler
from ldm.weights.zip_directory import Member, checked_bytes, read_directory, require_stored

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
# A storage of the file -> the same on the device that the caller asked for.
Mover = Callable[[torch.UntypedStorage], torch.UntypedStorage]


def mover(device: torch.device) -> Mover:
    """Moves whole storages, so that tensors which share one still do."""
    if device.type == "cpu":
        return lambda storage: storage

    def move(storage: torch.UntypedStorage) -> torch.UntypedStorage:
        if device.type == "meta":
            return torch.UntypedStorage(storage.nbytes(), device="meta")
        flat = torch.empty(0, dtype=torch.uint8).set_(storage)
        return flat.to(device).untyped_storage()

    return move


def read_zip(file: MappedFile, device: torch.device, inert: Sequence[str] = ()) -> Any:
    """The object in a zip archive of `torch.save`, with tensors and plain containers only.

    Tensors are views of the mapped file. A storage's checksum is compared when a tensor uses it (not for
    "meta").
    """
    members = read_directory(file)
    root = _archive_root(file, members)
    order = members.get(f"{root}/byteorder")
    if order is not None and bytes(checked_bytes(file, order)).strip() != b"little":
        raise UnsupportedCheckpoint(file.where, "was written on a big-endian machine; save it on a usual one")
    move, loaded = mover(device), {}

    def load(key: str, dtype: torch.dtype, count: int, view: tuple | None) -> torch.UntypedStorage:
        member = members.get(f"{root}/data/{key}")
        if member is None or view is not None:
            raise CorruptCheckpoint(file.where, f"the archive has no data for the storage {key[:80]!r}")
        require_stored(file, member)
        # The member is the truth about the size; the pickle may leave out a last part of an element.
        if not 0 <= member.size - count * dtype.itemsize < dtype.itemsize:
            raise CorruptCheckpoint(
                file.where,
                f"the storage {key[:80]!r} should have {count} elements of {dtype}, "
                f"but has {member.size} bytes",
            )
        if key not in loaded:
            if device.type != "meta":
                checked_bytes(file, member)
            loaded[key] = move(file.storage(member.offset, member.size))
        return loaded[key]

    data = checked_bytes(file, members[f"{root}/data.pkl"])
    return Plain(file.where)(Unpickler(data, file.where, load, inert).load())


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
    and the storages' keys, then each storage as its number of elements and its data.

    The object comes before the data, so it is read twice: first with storages that have no memory, to learn
    their types, then with the storages found behind it.
    """
    start = _legacy_header(file)
    types: dict[str, tuple[torch.dtype, int]] = {}

    def note(key: str, dtype: torch.dtype, count: int, view: tuple | None) -> torch.UntypedStorage:
        if count * dtype.itemsize > file.size:
            raise CorruptCheckpoint(
                file.where,
                f"the storage {key[:80]!r} should have {count} elements of {dtype}, "
                "more than the file: truncated?",
            )
        if types.setdefault(key, (dtype, count)) != (dtype, count):
            raise CorruptCheckpoint(file.where, f"the storage {key[:80]!r} has two types or sizes")
        return _part(file, torch.UntypedStorage(count * dtype.itemsize, device="meta"), dtype, view)

    first = Unpickler(file.view, file.where, note, inert, start)
    first.load()
    storages = _legacy_storages(file, first.position, types, mover(device))
    loader = _legacy_loader(file, storages)
    return Plain(file.where)(Unpickler(file.view, file.where, loader, inert, start).load())


def _legacy_header(file: MappedFile) -> int:
    """The position of the object, behind the magic number, the version and the machine."""
    reader = Unpickler(file.view, file.where)
    if reader.load() != LEGACY_MAGIC:
        raise UnsupportedCheckpoint(
            file.where, "is a pickle, but not of torch.save; its tensors cannot be read safely"
        )
    version, machine = reader.load(), reader.load()
    if version != _LEGACY_PROTOCOL or not isinstance(machine, dict):
        raise CorruptCheckpoint(
            file.where, "begins like a file of torch before 1.6, but does not go on like one"
        )
    if machine.get("little_endian") is not True:
        raise UnsupportedCheckpoint(file.where, "was written on a big-endian machine; save it on a usual one")
    return reader.position


def _legacy_storages(
    file: MappedFile, position: int, types: dict[str, tuple[torch.dtype, int]], move: Mover
) -> dict[str, torch.UntypedStorage]:
    """Key -> memory, in the order in which the file has them."""
    reader = Unpickler(file.view, file.where, position=position)
    keys = reader.load()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or set(keys) != set(types):
        raise CorruptCheckpoint(
            file.where, "the list of storages does not fit the tensors: the file is damaged"
        )
    if len(keys) != len(types):
        raise CorruptCheckpoint(file.where, "the list of storages names one twice: the file is damaged")
    storages = {}
    for key in keys:
        dtype, count = types[key]
        if reader.number("<q") != count:
            raise CorruptCheckpoint(
                file.where, f"the storage {key[:80]!r} has another size than its tensors say"
            )
        storages[key] = move(file.storage(reader.position, count * dtype.itemsize))
        reader.take(count * dtype.itemsize)
    return storages


def _legacy_loader(file: MappedFile, storages: dict[str, torch.UntypedStorage]) -> StorageLoader:
    def load(key: str, dtype: torch.dtype, count: int, view: tuple | None) -> torch.UntypedStorage:
        return _part(file, storages[key], dtype, view)

    return load


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
