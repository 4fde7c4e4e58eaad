"""What Python's unpickler does to objects on behalf of a pickle ends in stand-ins, or is refused before."""

import copyreg
import io
import os
import pickle
import pickletools
import struct

import pytest
import torch
from hostile_files import COLLECT_ENV, FORMATS, archive, legacy, mention, text

from ldm.weights import CorruptCheckpoint, Placeholder, UnsafeCheckpoint, read_pickled

STORAGE = b"(" + text("storage") + mention("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x04tQ"
REBUILD = mention("torch._utils", "_rebuild_tensor_v2")
TENSOR = REBUILD + b"(" + STORAGE + b"K\x00K\x04\x85K\x01\x85\x89}tR"
SLICE = mention("builtins", "slice") + b"K\x00K\x00\x86R"
BUSHY = b")" + b"\x85" + b"2\x86" * 100  # a tuple of the same tuples: 2^100 parts

DAMAGED = {
    "a list assigned to a slice of itself": b"]K\x01aq\x00"
    + (b"h\x00" + SLICE + b"h\x00s0") * 60
    + b"h\x00.",
    "bytes assigned to a slice of themselves": b"\x96"
    + struct.pack("<Q", 4)
    + b"abcdq\x00"
    + (b"h\x00" + SLICE + b"h\x00s0") * 60
    + b"h\x00.",
    "tensors added": TENSOR + b"(" + TENSOR + b"\x90.",
    "elements of a stand-in set": mention("a", "B") + b")\x81(K\x01\x90.",
    "a huge key with a state": b"}" + BUSHY + b"NbK\x01s.",
    "a huge key with a state of slots": b"}" + BUSHY + b"N}\x86bK\x01s.",
    "a huge key with no elements": b"}" + BUSHY + b"(eK\x01s.",
    "a huge key with no items": b"}" + BUSHY + b"(uK\x01s.",
    "a huge key in a set": b"\x8f(" + BUSHY + b"\x90.",
    "a huge key in a frozenset": b"(" + BUSHY + b"\x91.",
    "a huge key in a called frozenset": mention("builtins", "frozenset") + b"]" + BUSHY + b"a\x85R.",
    "a huge key out of the memo": b"}" + BUSHY + b"\x940\x94" + b"h\x00K\x01s.",
    "a memo entry below zero": b"Np-1\n.",
    "a memo entry without end": b"Np99999999999\n.",
    "a name of two lines": b"\x8c\x03a\nb\x8c\x01c\x93.",
    "a name of half a letter": b"\x8d" + struct.pack("<Q", 3) + b"\xed\xa0\x80" + text("c") + b"\x93.",
    "a called number": b"K\x01)R.",
    "a number as a class": b"K\x01)\x81.",
    "attributes of a list": b"]}" + text("append") + mention("a", "B") + b"sb.",
    "an array in every bit": mention("builtins", "bytearray") + b"J\xff\xff\xff\x7f\x85R.",
    "many names": b"".join(mention("a", f"B{i}") + b"0" for i in range(10_001)) + b"N.",
    "a line without end": b"c" + b"a" * 100_000 + b"\nb\n.",
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", DAMAGED)
def test_what_the_unpickler_would_do_to_plain_values(tmp_path, little_memory, alarm, form, name):
    if form == "zip":
        path = archive(tmp_path / "a.pt", DAMAGED[name], {"0": bytes(16)})
    else:
        path = legacy(tmp_path / "a.pt", DAMAGED[name], ("0",), struct.pack("<q", 4) + bytes(16))
    with pytest.raises(CorruptCheckpoint):
        read_pickled(path)


SLOTS = b"N}" + text("x") + b"K\x01s\x86b"


@pytest.mark.parametrize("operation", [b"}b", SLOTS, b"(K\x01e", b"K\x01a", b"K\x01K\x02s"])
@pytest.mark.parametrize("name", [REBUILD, COLLECT_ENV, mention("collections", "OrderedDict")])
def test_names_cannot_be_changed(tmp_path, operation, name):
    """A changed builder would be a door for the next file."""
    with pytest.raises(UnsafeCheckpoint):
        read_pickled(archive(tmp_path / "a.pt", name + operation + b"."))
    honest = archive(tmp_path / "b.pt", TENSOR + b".", {"0": struct.pack("<4f", 1, 2, 3, 4)})
    assert read_pickled(honest).tolist() == [1, 2, 3, 4]


def test_tensors_cannot_be_changed(tmp_path, little_memory):
    """`Tensor.__setstate__` would set any storage, of any size, and any hooks."""
    state = b"(" + STORAGE + b"K\x00J\xff\xff\xff\x7f\x85K\x01\x85tb"
    made = read_pickled(archive(tmp_path / "a.pt", TENSOR + state + b".", {"0": bytes(16)}))
    assert made.tolist() == [0] * 4  # what the state says is ignored


def test_objects_without_arguments_are_stand_ins(tmp_path):
    """INST and OBJ without arguments make an object without calling anything, as NEWOBJ does."""
    for data in (b"(ia\nB\n.", b"(" + mention("a", "B") + b"o.", mention("a", "B") + b")\x81."):
        made = read_pickled(archive(tmp_path / "a.pt", data))
        assert type(made) is Placeholder and str(made.kind) == "a.B" and not callable(made)


def test_registered_extensions_are_not_handed_out(tmp_path):
    """Python's registry remembers what an extension was, and gives it without asking `find_class`."""
    sentinel = tmp_path / "made"
    payload = b"\x82\xc8" + text(str(sentinel)) + b"\x85R."
    copyreg.add_extension("posix", "mkdir", 200)
    try:
        pickle.loads(payload)
        assert sentinel.is_dir()
        sentinel.rmdir()
        with pytest.raises(UnsafeCheckpoint):
            read_pickled(archive(tmp_path / "a.pt", payload))
    finally:
        copyreg.remove_extension("posix", "mkdir", 200)
    assert not sentinel.exists()


def test_frames_cannot_hide_operations(tmp_path):
    """Behind an operation that reaches over its frame's end, the unpickler sees others than pickletools."""
    sentinel = tmp_path / "made"
    frame = b"\x95" + struct.pack("<Q", 3) + b"cxx"
    payload = b"\x80\x04" + frame + b"posix\nmkdir\n" + text(str(sentinel)) + b"\x85R."
    seen = [argument for opcode, argument, _ in pickletools.genops(payload) if opcode.name == "GLOBAL"]
    assert seen == ["xxposix mkdir"]
    pickle.Unpickler(io.BytesIO(payload)).load()
    assert sentinel.is_dir()
    os.rmdir(sentinel)
    with pytest.raises(CorruptCheckpoint, match="frame"):
        read_pickled(archive(tmp_path / "a.pt", payload))
    inside = b"\x95" + struct.pack("<Q", 12) + b"\x95" + struct.pack("<Q", 1) + b"N."
    with pytest.raises(CorruptCheckpoint, match="frame"):
        read_pickled(archive(tmp_path / "a.pt", b"\x80\x04" + inside))
    assert not sentinel.exists()


def test_stand_ins_as_keys(tmp_path):
    object_key, class_key = mention("a", "B") + b")\x81", mention("a", "B")
    data = b"}(" + object_key + b"K\x01" + class_key + b"K\x02" + class_key + b"K\x03" + b"u."
    made = read_pickled(archive(tmp_path / "a.pt", data))
    assert [str(getattr(key, "kind", key)) for key in made] == ["a.B", "a.B"] and list(made.values()) == [
        1,
        3,
    ]


def test_values_that_contain_themselves(tmp_path):
    loop: list = []
    loop.append((loop, {"loop": loop}))
    inside = read_pickled(archive(tmp_path / "a.pt", pickle.dumps(loop)))
    assert inside[0][0] is inside and inside[0][1]["loop"] is inside
    own = torch.nn.Module()
    own.own = own
    made = read_pickled(archive(tmp_path / "b.pt", pickle.dumps(own)))
    assert made.state["_modules"]["own"] is made
