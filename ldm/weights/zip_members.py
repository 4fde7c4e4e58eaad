"""Where the members of a zip archive lie in its file, without unpacking anything.

torch stores members uncompressed, so that each is a piece of the file. Only such members are read here: a
compressed one is either not torch's or a zip bomb.
"""

import struct
import zipfile
import zlib
from typing import NamedTuple

from ldm.weights.errors import CorruptCheckpoint
from ldm.weights.mapped import ByteReader, MappedFile

_LARGEST_DIRECTORY = 16 * 2**20  # bytes, of about a hundred a member
_LOCAL = struct.Struct("<4s22xHH")  # the lengths of a name and of further fields, before a member's data
_ENCRYPTED = 0x1


class _Directory(ByteReader):
    """An archive whose directory is not absurdly long: `zipfile` reads it in one piece."""

    def read(self, count: int = _LARGEST_DIRECTORY) -> bytes:
        if count > _LARGEST_DIRECTORY:
            raise ValueError(f"its directory claims {count} bytes")
        return super().read(count)


class Member(NamedTuple):
    """A member of an archive; its data, if it is stored as it is, begin at the byte `offset` of the file."""

    info: zipfile.ZipInfo
    offset: int


def read_members(file: MappedFile) -> dict[str, Member]:
    """Name -> member, for every member of the archive.

    Raises:
        CorruptCheckpoint: the archive is truncated or damaged, its members overlap, lie outside of the file,
            or are absurdly many.
    """
    try:
        with zipfile.ZipFile(_Directory(file.view)) as archive:
            found = [_member(file, info) for info in archive.infolist()]
            end = archive.start_dir
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, OSError, LookupError) as error:
        raise CorruptCheckpoint(file.where, f"the zip archive is truncated or damaged: {error}") from error
    for info, offset in sorted(found, key=lambda member: (member.offset, member.info.compress_size))[::-1]:
        if offset + info.compress_size > end:
            raise CorruptCheckpoint(
                file.where, f"the member {info.filename!r} overlaps what follows it: damaged, or a zip bomb"
            )
        end = offset
    members = {member.info.filename: member for member in found}
    if len(members) < len(found):
        raise CorruptCheckpoint(file.where, "the zip archive has two members of one name")
    return members


def _member(file: MappedFile, info: zipfile.ZipInfo) -> Member:
    start = info.header_offset
    local = bytes(file.view[start : start + _LOCAL.size]).ljust(_LOCAL.size)
    signature, name_length, extra_length = _LOCAL.unpack(local)
    if signature != b"PK\x03\x04":
        raise ValueError(f"{info.filename!r} is not where its directory says")
    return Member(info, start + _LOCAL.size + name_length + extra_length)


def require_stored(file: MappedFile, info: zipfile.ZipInfo) -> None:
    """Refuse a compressed or encrypted member: its size is a claim, and unpacking it the danger."""
    stored = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & _ENCRYPTED
    if not stored or info.file_size != info.compress_size:
        raise CorruptCheckpoint(
            file.where,
            f"the member {info.filename!r} is compressed or encrypted, from {info.file_size} to "
            f"{info.compress_size} bytes; torch does not write such files",
        )


def checked_bytes(file: MappedFile, member: Member) -> memoryview:
    """A member's data, compared with its checksum where the writer recorded one."""
    info, offset = member
    require_stored(file, info)
    data = file.view[offset : offset + info.file_size]
    if info.CRC and zlib.crc32(data) != info.CRC:
        raise CorruptCheckpoint(
            file.where, f"the data of {info.filename!r} does not match its checksum: the file is damaged"
        )
    return data
