"""What is written is whole, the same bytes for the same content, and reads back."""

import hashlib

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file

from ldm.files import whole_file
from ldm.weights import read_weights, write_safetensors


def test_what_cannot_be_written_leaves_the_previous_file(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"first")
    with pytest.raises(ValueError, match="text"):
        write_safetensors(path, {}, {"a": 3})
    with pytest.raises(ValueError, match="cannot be written"):
        write_safetensors(path, {"a": torch.ones(2, device="meta")}, {})
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]


def test_torch_checkpoints_through_it(tmp_path):
    with whole_file(tmp_path / "a.ckpt") as file:
        torch.save({"model": {"w": torch.ones(3)}}, file)
    assert read_weights(tmp_path / "a.ckpt").tensors["w"].tolist() == [1.0] * 3


@settings(deadline=None, max_examples=50)
@given(
    st.dictionaries(st.text(min_size=1, max_size=8), st.lists(st.integers(0, 3), max_size=4), max_size=5),
    st.data(),
)
def test_same_content_gives_same_bytes_and_reads_back(tmp_path_factory, shapes, data):
    folder = tmp_path_factory.mktemp("round")
    dtypes = st.sampled_from(
        (torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float64, torch.complex64)
    )
    tensors = {}
    for name, shape in shapes.items():
        if not name.isprintable() or name == "__metadata__":
            continue
        tensors[name] = torch.randint(0, 2, shape).to(data.draw(dtypes))
    write_safetensors(folder / "a", tensors, {"x": "1", "y": "2"})
    back = read_weights(folder / "a")
    assert back.metadata == {"x": "1", "y": "2"} and set(back.tensors) == set(tensors)
    assert all(
        torch.equal(back.tensors[n], t) and back.tensors[n].dtype == t.dtype for n, t in tensors.items()
    )
    write_safetensors(folder / "b", dict(reversed(back.tensors.items())), {"y": "2", "x": "1"})
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()


def test_tensors_that_share_memory_are_written_in_full(tmp_path):
    base = torch.arange(6.0).reshape(2, 3)
    write_safetensors(tmp_path / "a", {"whole": base, "row": base[1], "turned": base.t()}, {})
    theirs = load_file(tmp_path / "a")
    assert theirs["whole"].equal(base) and theirs["row"].equal(base[1]) and theirs["turned"].equal(base.t())


def test_the_bytes_stay_what_they_were(tmp_path):
    """Digests of files, and of runs that hold them, must not change with this package's version."""
    tensors = {
        "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "a": torch.arange(3, dtype=torch.int8),
        "ä": torch.arange(4, dtype=torch.int32),
        "f": torch.ones(3, dtype=torch.bfloat16),
    }
    write_safetensors(tmp_path / "a", tensors, {"y": "é", "x": "1", "z": ""})
    assert (
        hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()
        == "5181cebb62ae2d97d53e91481f220f91c8490458eacbd4933792b70ad009aa01"
    )
