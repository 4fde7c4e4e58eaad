"""Honest and hostile files, mutated: nothing is executed, only our errors come out, no hang, no bomb."""

import ast
import collections
import contextlib
import io
import os
import pickle
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile_files import LIVE, WRAP, archive, assert_live, legacy, opcode_attacks

from ldm.weights import (
    CheckpointError,
    GlobalName,
    Placeholder,
    read_pickled,
    read_weights,
    write_safetensors,
)
from ldm.weights.tensors import Storage

OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
# Whole operations that a mutation puts between those of a file.
_SPLICED = rb"""
    cposix\nmkdir\n ctorch.utils.collect_env\nrun\n cbuiltins\ngetattr\n cfunctools\npartial\n
    ctorch._utils\n_rebuild_tensor_v2\n cbuiltins\nslice\nK\x00K\x00\x86R (X\x01\0\0\0aitorch.hub\nload\n
    X\x0c\0\0\0__setstate__ \x8c\x05torch\x8c\x0bhub.os.open\x93 \x82\x01 \x83\x01\0 \x84\x01\0\0\0
    R b o \x81 \x92 Q 2\x86 2u s e \x90 \x91 \x97 \x98 h\x00 \x94 )]\x86 \x80\x05 \x80\xff
    r\xff\xff\xff\x7f j\xff\xff\xff\x7f \x8b\xff\xff\xff\x7f \x95\x03\0\0\0\0\0\0\0
    \x95\xff\xff\xff\xff\xff\xff\xff\x7f \x8e\xff\xff\xff\xff\xff\xff\xff\x7f
    \x96\xff\xff\xff\xff\xff\xff\xff\x7f
"""
SPLICED = [ast.literal_eval(f"b'{piece.decode()}'") for piece in _SPLICED.split()]
KINDS = {type(None), bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset}
KINDS |= {range, slice, torch.Tensor, torch.dtype, torch.UntypedStorage, np.ndarray}
KINDS |= {GlobalName, Placeholder, Storage}


def honest_content() -> dict:
    weights = torch.arange(24.0).reshape(4, 6)
    return {
        "state_dict": collections.OrderedDict(a=weights, b=weights[1:, ::2], c=weights > 3, d=weights.half()),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "lr": 1e-3},
        "rng": np.arange(5),
        "own": Path("a/b"),
        "odd": ({1, (2, 3)}, frozenset({"x"}), b"\xff\0", 2**100, None, [True, 1.5]),
    }


@pytest.fixture(scope="module")
def sentinel(tmp_path_factory) -> Path:
    """What every attack in the corpus makes when it succeeds."""
    return tmp_path_factory.mktemp("sentinel") / "made"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, sentinel) -> list[list[tuple[str, bytes]]]:
    """Honest and hostile (kind of file, bytes): whole files, and pickles that are wrapped once mutated."""
    folder = tmp_path_factory.mktemp("corpus")
    found = []
    for protocol in (2, 4):
        content = honest_content()
        torch.save(content, folder / "a.pt", pickle_protocol=protocol)
        found.append(("whole", (folder / "a.pt").read_bytes()))
        torch.save(content, folder / "b.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=False)
        found.append(("whole", (folder / "b.pt").read_bytes()))
    write_safetensors(folder / "c.safetensors", content["state_dict"], {"x": "y"})
    found += [("whole", (folder / "c.safetensors").read_bytes())] * 2
    honest = [read_member(found[i][1]) for i in (0, 2)]
    hostile = []
    for name in ("posix.mkdir", "builtins.getattr", "functools.partial", "torch.storage._load_from_bytes"):
        attack = LIVE[name](str(sentinel))
        assert_live(pickle.dumps(attack, 4), sentinel)
        hostile += [pickle.dumps({"w": [attack]}, protocol) for protocol in (2, 4)]
    hostile += [payload for payload, _, _ in opcode_attacks(str(sentinel)).values()]
    wrapped = [[(kind, data) for data in pickled for kind in WRAP] for pickled in (honest, hostile)]
    return [found + wrapped[0], wrapped[1]]


def read_member(whole: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(whole)) as file:
        return file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))


def flip(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def truncate(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def replace_opcode(rng: random.Random, data: bytearray) -> None:
    data[rng.randrange(len(data))] = rng.choice(OPCODES)[0]


def splice(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.randint(1, 3)):
        at = rng.choice(boundaries(bytes(data)) or range(len(data)))
        data[at:at] = rng.choice(SPLICED) * rng.choice((1, 1, 1, 40))


def duplicate(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data))
    piece = data[start : start + rng.randint(1, 200)]
    at = rng.randrange(len(data))
    data[at:at] = piece * rng.choice((1, 2, 50))


def swap(rng: random.Random, data: bytearray) -> None:
    """Two of a pickle's operations in each other's place."""
    places = boundaries(bytes(data))
    if len(places) > 4:
        one, two = sorted(rng.sample(range(len(places) - 1), 2))
        (a, b), (c, d) = (places[one : one + 2], places[two : two + 2])
        data[a:d] = data[c:d] + data[b:c] + data[a:b]


def boundaries(data: bytes) -> list[int]:
    places: list[int] = []
    with contextlib.suppress(ValueError):
        for _, _, position in pickletools.genops(data):
            places.append(position)
    return places


MUTATIONS: list[Callable] = [flip, truncate, replace_opcode, splice, duplicate, swap]


def mutated(corpus: list[list[tuple[str, bytes]]], seed: int, path: Path) -> Path:
    rng = random.Random(seed)
    kind, data = rng.choice(rng.choice(corpus))
    changed = bytearray(data)
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        if changed:
            rng.choice(MUTATIONS)(rng, changed)
    if kind == "whole":
        path.write_bytes(changed)
    elif kind == "zip":
        archive(path, bytes(changed), {str(i): bytes(96) for i in range(5)})
    else:
        legacy(path, bytes(changed), ("0",), struct.pack("<q", 24) + bytes(96))
    return path


def parts(value: object) -> Iterator[object]:
    """Everything inside a value, once."""
    seen, rest = set(), [value]
    while rest:
        part = rest.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        if isinstance(part, dict):
            rest += [*part.keys(), *part.values()]
        elif isinstance(part, list | tuple | set | frozenset):
            rest += part
        elif isinstance(part, Placeholder):
            rest += [part.arguments, part.state, part.items, part.mapping]


@pytest.mark.parametrize("block", range(6))
def test_mutated_files_do_nothing(tmp_path, corpus, sentinel, little_memory, alarm, block):
    outcomes = collections.Counter()
    for seed in range(block * 100, (block + 1) * 100):
        path = mutated(corpus, seed, tmp_path / "mutated.ckpt")
        alarm()
        outcomes[outcome(path)] += 1
        assert os.listdir(tmp_path) == ["mutated.ckpt"] and os.listdir(sentinel.parent) == [], seed
    assert outcomes["UnsafeCheckpoint"] and outcomes["CorruptCheckpoint"] and outcomes["read"]


def outcome(path: Path) -> str:
    """Everything read, and every tensor's values touched; anything but our own errors comes through."""
    try:
        assert {type(part) for part in parts(read_pickled(path))} <= KINDS
        kind = "read"
    except CheckpointError as error:
        assert str(path) in str(error)
        kind = type(error).__name__
    with contextlib.suppress(CheckpointError):
        for tensor in read_weights(path).tensors.values():
            tensor.clone()
    return kind
