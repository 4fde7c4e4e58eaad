"""Files of `torch.save`: the zip archive of torch 1.6 and later, and the chain of pickles before it."""

import io
import struct
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

import torch

from ldm.weights.errors import CorruptCheckpoint, UnsupportedCheckpoint, require
from ldm.weights.mapped import MappedFile
from ldm.weights.pickle_scan import Budget
from ldm.weights.plain_values import recover
from ldm.weights.tensors import storage_dtype
from ldm.weights.unpickle import StoredKinds, describe
from ldm.wording import some

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_BIG_ENDIAN = "was written on a big-endian machine; save it on a usual one"
_Member = tuple[zipfile.ZipInfo, int]  # and where its data, if they are stored as they are, begin in the file
_LARGEST_DIRECTORY = 16 * 2**20  # bytes, of about a hundred a member


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
    members = _members(file)
    root = _archive_root(file, members)
    order = members.get(f"{root}/byteorder")
    little = order is None or bytes(_data(file, order)).strip() == b"little"
    require(little, file.where, _BIG_ENDIAN, UnsupportedCheckpoint)
    loaded: dict[str, torch.UntypedStorage] = {}

    def load(key: str, dtype: torch.dtype, count: int, view: tuple | None) -> torch.UntypedStorage:
        member = members.get(f"{root}/data/{key}")
        found = member is not None and view is None
        require(found, file.where, f"the archive has no data for the storage {key[:80]!r}")
        size = member[0].file_size
        # The member is the truth about the size; the pickle may leave out a last part of an element.
        what = f"the storage {key[:80]!r} should have {count} elements of {dtype}, but has {size} bytes"
        require(0 <= size - count * dtype.itemsize < dtype.itemsize, file.where, what)
        if key not in loaded:
            _data(file, member, check=device.type != "meta")
            loaded[key] = _moved(file.storage(member[1], size), device)
        return loaded[key]

    budget = Budget(file.where)
    described, _ = describe(io.BytesIO(_data(file, members[f"{root}/data.pkl"])), budget, inert)
    return recover(described, budget, load)


class _Directory:
    """A mapped file as `zipfile` reads it: its directory, in one piece, may not be absurdly long."""

    def __init__(self, file: MappedFile):
        self._map, self.seek, self.tell = file.map, file.map.seek, file.map.tell

    def seekable(self) -> bool:
        return True

    def read(self, count: int = _LARGEST_DIRECTORY) -> bytes:
        if count > _LARGEST_DIRECTORY:
            raise ValueError(f"its directory claims {count} bytes")
        return self._map.read(count)


def _members(file: MappedFile) -> dict[str, _Member]:
    """Name -> member, for every member of the archive; `zipfile` holds each against the directory."""
    members, total = {}, 0
    try:
        with zipfile.ZipFile(_Directory(file)) as archive:
            for info in archive.infolist():
                archive.open(info).close()
                # The lengths of the name and of further fields, between a member's header and its data.
                lengths = struct.unpack_from("<HH", file.view, info.header_offset + 26)
                members[info.filename] = info, info.header_offset + 30 + sum(lengths)
                total += info.compress_size
            if len(members) < len(archive.infolist()):
                raise ValueError("it has two members of one name")
            if total > file.size:
                raise ValueError("a member overlaps another: damaged, or a zip bomb")
    except (zipfile.BadZipFile, struct.error, ValueError, RuntimeError, OSError, LookupError) as error:
        raise CorruptCheckpoint(file.where, f"the zip archive is truncated or damaged: {error}") from error
    return members


def _data(file: MappedFile, member: _Member, check: bool = True) -> memoryview:
    """A member's data, compared with its checksum where the writer recorded one."""
    info, offset = member
    # torch stores members as they are; a compressed one's size is a claim, and unpacking it the danger.
    stored = info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size
    what = f"is compressed, from {info.file_size} to {info.compress_size} bytes, which torch never does"
    require(stored, file.where, f"the member {info.filename!r} {what}")
    data = file.view[offset : offset + info.file_size]
    right = not check or not info.CRC or zlib.crc32(data) == info.CRC
    require(right, file.where, f"the data of {info.filename!r} does not match its checksum")
    return data


def _archive_root(file: MappedFile, members: dict[str, _Member]) -> str:
    """The one folder of the archive that holds `data.pkl`."""
    roots = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    script = any(name.endswith("/constants.pkl") or "/code/" in name for name in members)
    what = "is a TorchScript archive, which holds code; save the module's state_dict() instead"
    require(not script, file.where, what, UnsupportedCheckpoint)
    found = f"{len(roots)} files data.pkl" if roots else "no data.pkl"
    inside = some(list(members)) or "nothing"
    what = f"is a zip archive (.npz, say), but not of torch.save: it has {found}, but {inside}"
    require(len(roots) == 1, file.where, what, UnsupportedCheckpoint)
    return roots[0].removesuffix("/data.pkl")


def read_legacy(file: MappedFile, device: torch.device, inert: Sequence[str] = ()) -> Any:
    """The object in a file of torch before 1.6: pickles of a magic number, a version, the machine, the object
    and the storages' keys, then each storage as its number of elements and its data."""
    budget = Budget(file.where)
    magic, _ = describe(file.map, budget)
    what = "is a pickle, but not of torch.save; its tensors cannot be read safely"
    require(magic == LEGACY_MAGIC, file.where, what, UnsupportedCheckpoint)
    (version, _), (machine, _) = describe(file.map, budget), describe(file.map, budget)
    proper = version == _LEGACY_PROTOCOL and isinstance(machine, dict)
    require(proper, file.where, "begins like a file of torch before 1.6, but does not go on like one")
    require(machine.get("little_endian") is True, file.where, _BIG_ENDIAN, UnsupportedCheckpoint)
    described, kinds = describe(file.map, budget, inert)
    keys, _ = describe(file.map, budget)
    of_texts = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    fitting = of_texts and sorted(keys) == sorted(kinds)
    require(fitting, file.where, "the list of storages does not fit the tensors")
    storages = _legacy_storages(file, {key: kinds[key] for key in keys}, device)

    def load(key: str, dtype: torch.dtype, count: int, view: Any) -> torch.UntypedStorage:
        storage, of_file = storages[key]
        require(of_file == (dtype, count), file.where, f"the storage {key[:80]!r} has two types or sizes")
        if view is None:
            return storage
        _, offset, size = view  # in elements
        begin, end = offset * dtype.itemsize, (offset + size) * dtype.itemsize
        inside = type(end) is int and 0 <= begin <= end <= storage.nbytes()
        require(inside, file.where, "a view of a storage reaches outside of it")
        if device.type == "meta":
            return torch.UntypedStorage(end - begin, device="meta")
        return storage[begin:end]

    return recover(described, budget, load)


def _legacy_storages(
    file: MappedFile, kinds: StoredKinds, device: torch.device
) -> dict[str, tuple[torch.UntypedStorage, tuple[torch.dtype, int]]]:
    """Key -> memory, type and number of elements, in the order in which the file has them."""
    storages, position = {}, file.map.tell()
    for key, (kind, count) in kinds.items():
        dtype = storage_dtype(kind, file.where)
        stored = int.from_bytes(file.view[position : position + 8], "little", signed=True)
        what = f"the storage {key[:80]!r} has another size than its tensors say, or the file is truncated"
        require(stored == count, file.where, what)
        nbytes = count * dtype.itemsize
        storages[key] = _moved(file.storage(position + 8, nbytes), device), (dtype, count)
        position += 8 + nbytes
    return storages
