"""Where the members of a zip archive lie in its file, without unpacking anything.

torch stores members uncompressed, so that each is a piece of the file. Only such members are read here: a
compressed one is either not torch's or a zip bomb. The layout is that of PKWARE's APPNOTE.TXT (4.3), zip64
included.
"""

import struct
import zlib
from dataclasses import dataclass

from ldm.weights.errors import CorruptCheckpoint
from ldm.weights.mapped import MappedFile

_LOCAL, _CENTRAL, _END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_END64, _LOCATOR64 = b"PK\x06\x06", b"PK\x06\x07"
_MAX_MEMBERS = 500_000
_MAX_DIRECTORY = 256 * 2**20
_NONE16, _NONE32 = 0xFFFF, 0xFFFFFFFF


@dataclass(frozen=True)
class Member:
    """A member of an archive, `packed` bytes from `offset` on, which are its data if it is `stored`.

    `size` is what it unpacks to; `crc` is 0 where the writer recorded none.
    """

    name: str
    offset: int
    size: int
    packed: int
    crc: int
    stored: bool


def read_directory(file: MappedFile) -> dict[str, Member]:
    """Name -> member, for every member of the archive.

    Raises:
        CorruptCheckpoint: the archive is truncated or damaged, its members overlap, lie outside of the file,
            or are absurdly many.
    """
    start, size, count = _find_directory(file)
    if count > _MAX_MEMBERS or size > _MAX_DIRECTORY:
        raise CorruptCheckpoint(file.where, f"the zip archive claims {count} members; this is absurd")
    members: dict[str, Member] = {}
    position = start
    for _ in range(count):
        member, position = _read_entry(file, position, start + size)
        if member.name in members:
            raise CorruptCheckpoint(file.where, f"the zip archive has two members called {member.name!r}")
        members[member.name] = member
    if position != start + size:
        raise CorruptCheckpoint(file.where, "the zip archive's directory has another length than it says")
    _check_layout(file, members, start)
    return members


def require_stored(file: MappedFile, member: Member) -> None:
    """Refuse a compressed or encrypted member: its size is a claim, and unpacking it the danger."""
    if not member.stored or member.size != member.packed:
        raise CorruptCheckpoint(
            file.where,
            f"the member {member.name!r} is compressed or encrypted, from {member.size} to "
            f"{member.packed} bytes; torch does not write such files. "
            "If you trust it, unpack and pack it again without compression.",
        )


def checked_bytes(file: MappedFile, member: Member) -> memoryview:
    """A member's data, compared with its checksum."""
    require_stored(file, member)
    data = file.view[member.offset : member.offset + member.size]
    if member.crc and zlib.crc32(data) != member.crc:
        raise CorruptCheckpoint(
            file.where, f"the data of {member.name!r} does not match its checksum: the file is damaged"
        )
    return data


def _unpack(file: MappedFile, form: str, position: int, what: str) -> tuple:
    if position < 0 or position + struct.calcsize(form) > file.size:
        raise CorruptCheckpoint(
            file.where, f"the zip archive's {what} lies outside of the file: truncated or damaged"
        )
    return struct.unpack_from(form, file.view, position)


def _find_directory(file: MappedFile) -> tuple[int, int, int]:
    """Offset, size and number of entries of the central directory, from the record at the file's end."""
    tail_start = max(0, file.size - 22 - _NONE16)
    tail = bytes(file.view[tail_start:])
    found = tail.rfind(_END)
    while found >= 0:
        end = tail_start + found
        if end + 22 <= file.size and end + 22 + struct.unpack_from("<H", file.view, end + 20)[0] == file.size:
            break
        found = tail.rfind(_END, 0, found)
    else:
        raise CorruptCheckpoint(
            file.where,
            f"the zip archive has no end ({file.size} bytes are there): the file is truncated; "
            "download or copy it again",
        )
    disk, _, _, count, size, start, _ = _unpack(file, "<HHHHIIH", end + 4, "end record")
    stop = end
    if end >= 20 and file.view[end - 20 : end - 16] == _LOCATOR64:
        _, stop, _ = _unpack(file, "<IQI", end - 16, "zip64 locator")
        signature, _, _, _, disk, _, _, count, size, start = _unpack(
            file, "<4sQHHIIQQQQ", stop, "zip64 end record"
        )
        if signature != _END64:
            raise CorruptCheckpoint(file.where, "the zip archive's zip64 end record is damaged")
    if disk != 0 or start + size != stop:
        raise CorruptCheckpoint(
            file.where, "the zip archive's directory is not where its end record says: truncated or damaged"
        )
    return start, size, count


def _read_entry(file: MappedFile, position: int, stop: int) -> tuple[Member, int]:
    fields = _unpack(file, "<4sHHHHHHIIIHHHHHII", position, "directory")
    signature, _, _, flags, method, _, _, crc, packed, size = fields[:10]
    name_length, extra_length, comment_length, _, _, _, offset = fields[10:]
    name_start = position + 46
    after = name_start + name_length + extra_length + comment_length
    if signature != _CENTRAL or after > stop:
        raise CorruptCheckpoint(file.where, "the zip archive's directory is damaged")
    raw_name = bytes(file.view[name_start : name_start + name_length])
    name = raw_name.decode("utf-8", "backslashreplace")
    extra = bytes(file.view[name_start + name_length : name_start + name_length + extra_length])
    size, packed, offset = _zip64(file, extra, size, packed, offset)
    local = _unpack(file, "<4sHHHHHIIIHH", offset, f"member {name!r}")
    if local[0] != _LOCAL or bytes(file.view[offset + 30 : offset + 30 + local[9]]) != raw_name:
        raise CorruptCheckpoint(
            file.where, f"the member {name!r} is not where the zip archive's directory says"
        )
    start = offset + 30 + local[9] + local[10]
    return Member(name, start, size, packed, crc, stored=method == 0 and not flags & 0x1), after


def _zip64(file: MappedFile, extra: bytes, *fields: int) -> list[int]:
    """Size, packed size and offset, from the extra field (number 1) where they do not fit into 32 bits."""
    values = list(fields)
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        if kind == 1:
            wide = extra[position + 4 : position + 4 + length]
            for i, value in enumerate(values):
                if value == _NONE32:
                    if len(wide) < 8:
                        raise CorruptCheckpoint(file.where, "the zip archive's zip64 sizes are damaged")
                    values[i], wide = struct.unpack("<Q", wide[:8])[0], wide[8:]
        position += 4 + length
    return values


def _check_layout(file: MappedFile, members: dict[str, Member], directory: int) -> None:
    """Members lie one after the other; overlapping ones are how a small file feigns a huge one."""
    end, before = 0, "the start"
    for member in sorted(members.values(), key=lambda member: (member.offset, member.packed)):
        if member.offset < end or member.offset + member.packed > directory:
            raise CorruptCheckpoint(
                file.where,
                f"the member {member.name!r} overlaps {before!r} or the directory: damaged, or a zip bomb",
            )
        end, before = member.offset + member.packed, member.name
