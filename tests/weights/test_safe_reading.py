"""Reading weights runs nothing, names what is wrong with a file, and stops before memory does."""

import argparse
import builtins
import collections
import contextlib
import datetime
import enum
import functools
import importlib
import io
import json
import pickle
import pickletools
import struct
import sys
import typing
import zipfile
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hostile_files import (
    CALLS,
    COLLECT_ENV,
    FORMATS,
    LIVE,
    WRAP,
    Call,
    archive,
    assert_live,
    legacy,
    mention,
    opcode_attacks,
    text,
    torch_save,
)
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file, save_file

from ldm.weights import (
    CheckpointError,
    CorruptCheckpoint,
    GlobalName,
    Placeholder,
    UnsafeCheckpoint,
    UnsupportedCheckpoint,
    pickle_scan,
    read_pickled,
    read_weights,
    write_safetensors,
)


def every_kind_of_tensor() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, 6, generator=generator)
    return {
        "float32": base.clone(),
        "float64": base.double(),
        "float16": base.half(),
        "bfloat16": base.bfloat16(),
        "int8": torch.arange(-3, 4, dtype=torch.int8),
        "uint8": torch.arange(7, dtype=torch.uint8),
        "int16": torch.arange(5, dtype=torch.int16),
        "int32": torch.arange(5, dtype=torch.int32),
        "int64": torch.arange(5) * 10**12,
        "bool": base > 0,
        "complex64": torch.complex(base, -base),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
    }


@pytest.mark.parametrize("name", LIVE)
def test_calls_are_refused_by_name_and_never_made(tmp_path, name):
    sentinel = tmp_path / "sentinel"
    attack = LIVE[name](str(sentinel))
    assert_live(pickle.dumps(attack, 4), sentinel)
    weights = collections.OrderedDict(weight=attack)
    for content in (attack, [0, (attack,)], {"state_dict": weights, "callbacks": {"x": attack}}):
        for form in FORMATS:
            path = WRAP[form](tmp_path / "evil.ckpt", pickle.dumps(content, 4))
            with pytest.raises(UnsafeCheckpoint) as refusal:
                read_weights(path)
            assert refusal.value.global_name == name
            assert f"`{name}`" in str(refusal.value) and "evil.ckpt" in str(refusal.value)
        with pytest.raises(UnsafeCheckpoint):  # the protocol of torch.save has other opcodes
            read_weights(archive(tmp_path / "evil.ckpt", pickle.dumps(content, 2)))
    # Where the format has other pickles than the one with the weights.
    path = legacy(tmp_path / "evil.ckpt", pickle.dumps({}, 2))
    path.write_bytes(path.read_bytes().replace(pickle.dumps([], 2), pickle.dumps([attack], 2)))
    with pytest.raises(UnsafeCheckpoint):
        read_weights(path)
    path.write_bytes(pickle.dumps(attack, 2))
    with pytest.raises(UnsafeCheckpoint):
        read_weights(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", opcode_attacks(""))
def test_opcodes_that_call_are_refused_by_name(tmp_path, name):
    sentinel = tmp_path / "sentinel"
    payload, expected, live = opcode_attacks(str(sentinel))[name]
    if live:
        assert_live(payload, sentinel)
    for form in FORMATS:
        with pytest.raises(UnsafeCheckpoint) as refusal:
            read_weights(WRAP[form](tmp_path / "evil.ckpt", payload))
        assert refusal.value.global_name.startswith(expected)
        assert not sentinel.exists()


@pytest.mark.parametrize("name", CALLS)
def test_calls_of_dangerous_names(tmp_path, name):
    module, _, function = name.rpartition(".")
    spoken = name.replace("__builtin__", "builtins")
    if module.endswith((".OmegaConf", ".Trainer")):  # methods: two names behind the module's
        module, _, outer = module.rpartition(".")
        function = f"{outer}.{function}"
    with pytest.raises(UnsafeCheckpoint) as refusal:
        read_weights(archive(tmp_path / "evil.ckpt", b"}" + text("a") + mention(module, function) + b")Rs."))
    assert refusal.value.global_name == spoken


def test_hooks_on_tensors_are_refused(tmp_path):
    hooks = b"}K\x01" + COLLECT_ENV + b"s"
    storage = b"(" + text("storage") + mention("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x01tQ"
    tensor = (
        mention("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + b"K\x00K\x01\x85K\x01\x85\x89%stR."
    )
    for inside, refused in ((b"}", False), (hooks, True)):
        path = archive(
            tmp_path / "h.ckpt", b"}" + text("w") + (tensor % inside)[:-1] + b"s.", {"0": b"\0" * 4}
        )
        if refused:
            with pytest.raises(UnsafeCheckpoint, match="hook `torch.utils.collect_env.run`"):
                read_weights(path)
        else:
            assert read_weights(path).tensors["w"].shape == (1,)


def test_storages_are_only_looked_up_in_the_file(tmp_path):
    (tmp_path / "secret").write_bytes(b"\0" * 4)
    for key in ("../../../secret", "/etc/passwd", "", "1", "../version"):
        storage = (
            b"(" + text("storage") + mention("torch", "FloatStorage") + text(key) + text("cpu") + b"K\x01tQ"
        )
        path = archive(tmp_path / "p.ckpt", b"}" + text("w") + storage + b"s.", {"0": b"\0" * 4})
        with pytest.raises(CorruptCheckpoint, match="no data for the storage"):
            read_weights(path)
    for identity in (b"Q", b"PK\x01\n", b"K\x01Q", b")Q", text("storage") + b"\x85Q"):
        with pytest.raises(CheckpointError):
            read_weights(archive(tmp_path / "p.ckpt", b"}" + text("w") + identity + b"s."))


def test_names_are_never_imported(tmp_path, monkeypatch):
    (tmp_path / "importing_me_is_an_attack.py").write_text(
        "open(__file__ + '.imported', 'w')\nclass Thing: pass\n"
    )
    marker = tmp_path / "importing_me_is_an_attack.py.imported"
    monkeypatch.syspath_prepend(tmp_path)
    body = mention("importing_me_is_an_attack", "Thing") + b")\x81}" + text("x") + b"K\x05sb."
    pickle.loads(body)
    assert marker.exists()
    marker.unlink()
    del sys.modules["importing_me_is_an_attack"]
    path = torch_save({"state_dict": {"w": torch.ones(2)}, "thing": 0}, tmp_path / "a.ckpt", "zip")
    path = archive(tmp_path / "b.ckpt", b"}" + text("thing") + body[:-1] + b"s.")
    with pytest.raises(CheckpointError, match="no weights"):
        read_weights(path)
    assert isinstance(read_pickled(archive(tmp_path / "b.ckpt", body)), Placeholder)
    assert not marker.exists() and "importing_me_is_an_attack" not in sys.modules


# What old Lightning checkpoints hold


class OwnCallback:
    def __init__(self):
        self.seen = [1, 2]


class OwnMode(enum.Enum):
    FAST = "fast"


def lightning_checkpoint() -> dict:
    from omegaconf import OmegaConf
    from pytorch_lightning.callbacks import ModelCheckpoint
    from pytorch_lightning.trainer.states import RunningStage
    from pytorch_lightning.utilities.parsing import AttributeDict

    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    config = OmegaConf.create(
        {
            "model": {"base_learning_rate": 4.5e-6, "target": "ldm.models.autoencoder.AutoencoderKL"},
            "ch_mult": [1, 2, 4],
            "deep": {
                "list": [{"a": None}, [True, "x"]],
                "link": "${model.base_learning_rate}",
                "must": "???",
            },
        }
    )
    return {
        "epoch": 4,
        "global_step": 1000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": collections.OrderedDict(net.state_dict(keep_vars=True)),
        "callbacks": {
            ModelCheckpoint: {
                "best_model_score": torch.tensor(0.25),
                "dirpath": Path("logs") / "run",
                "k": np.float64(2),
            },
            "own": OwnCallback(),
        },
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [scheduler.state_dict()],
        "hparams_name": "kwargs",
        "hyper_parameters": AttributeDict(lr=1e-3, config=config),
        "config": config,
        "part": config.deep.list,
        "args": argparse.Namespace(size=256, name="x", inner=argparse.Namespace(a=(1, 2))),
        "stage": RunningStage.TRAINING,
        "when": datetime.timedelta(seconds=3),
        "dtype": torch.float16,
        "device": torch.device("cuda:0"),
        "size": torch.Size([2, 3]),
        "counts": collections.defaultdict(list, a=[1]),
        "counter": collections.Counter("aab"),
        "queue": collections.deque([1, 2], maxlen=4),
        "rng": np.random.RandomState(3).get_state(),
        "array": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "words": np.array(["ab", "c"]),
        "objects": np.array([None, 3], dtype=object),
        "typing": typing.Dict[str, int],  # noqa: UP006
        "none": type(None),
        "odd": (
            b"\xff\x00",
            bytearray(b"xy"),
            2 + 1j,
            {1, 2},
            frozenset({3}),
            range(3),
            2**200,
            -(2**40),
            ...,
        ),
        "function": functools.partial(torch.nn.functional.silu, inplace=False),
        "generator": torch.get_rng_state(),
    }


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("protocol", (2, 3, 4, 5))
def test_lightning_checkpoint(tmp_path, monkeypatch, form, protocol):
    content = lightning_checkpoint()
    path = tmp_path / "last.ckpt"
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=form == "zip")

    used = []

    def forbidden(*args, **kwargs):
        used.append(args)
        raise RuntimeError

    with monkeypatch.context() as patch:
        for owner, name in (
            *((torch, "load"), (torch.serialization, "load"), (pickle, "loads"), (pickle, "Unpickler")),
            *((importlib, "import_module"), (builtins, "eval"), (builtins, "exec"), (builtins, "__import__")),
        ):
            patch.setattr(owner, name, forbidden)
        try:
            weights = read_weights(path)
        finally:
            patch.undo()
    assert not used
    extra = weights.extra
    assert list(weights.tensors) == list(content["state_dict"])
    for name, tensor in content["state_dict"].items():
        assert torch.equal(weights.tensors[name], tensor) and not weights.tensors[name].requires_grad
    kind = GlobalName("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    state = extra["callbacks"][kind]
    assert state == {"best_model_score": torch.tensor(0.25), "dirpath": "logs/run", "k": 2.0}
    own = extra["callbacks"]["own"]
    assert type(own) is Placeholder and own.kind.name == "OwnCallback" and own.state == {"seen": [1, 2]}
    assert extra["config"] == {
        "model": {"base_learning_rate": 4.5e-6, "target": "ldm.models.autoencoder.AutoencoderKL"},
        "ch_mult": [1, 2, 4],
        "deep": {"list": [{"a": None}, [True, "x"]], "link": "${model.base_learning_rate}", "must": "???"},
    }
    assert extra["hyper_parameters"] == {"lr": 1e-3, "config": extra["config"]}
    assert extra["part"] == [{"a": None}, [True, "x"]]
    assert extra["args"] == {"size": 256, "name": "x", "inner": {"a": (1, 2)}}
    assert isinstance(extra["stage"], Placeholder) and extra["stage"].arguments == ("train",)
    assert isinstance(extra["when"], Placeholder) and extra["when"].arguments == (0, 3, 0)
    assert extra["dtype"] is torch.float16 and extra["device"] == "cuda:0" and extra["size"] == (2, 3)
    assert extra["counts"] == {"a": [1]} and extra["counter"] == {"a": 2, "b": 1} and extra["queue"] == [1, 2]
    assert np.array_equal(extra["rng"][1], content["rng"][1]) and extra["rng"][0] == "MT19937"
    assert np.array_equal(extra["array"], content["array"]) and extra["array"].dtype == np.float32
    assert extra["words"].tolist() == ["ab", "c"] and isinstance(extra["objects"], Placeholder)
    assert isinstance(extra["typing"], Placeholder) and extra["none"] == GlobalName("builtins", "NoneType")
    assert extra["odd"][:4] == (b"\xff\x00", b"xy", 2 + 1j, {1, 2}) and extra["odd"][7] == -(2**40)
    assert isinstance(extra["function"], Placeholder) and not callable(extra["function"])
    assert torch.equal(extra["generator"], content["generator"])
    moments = extra["optimizer_states"][0]["state"][0]
    assert torch.equal(moments["exp_avg"], content["optimizer_states"][0]["state"][0]["exp_avg"])
    assert extra["lr_schedulers"][0]["last_epoch"] == 0


def test_own_enum_is_refused_unless_declared_to_be_data(tmp_path):
    path = torch_save({"w": torch.ones(2), "mode": OwnMode.FAST}, tmp_path / "a.pt", "zip")
    with pytest.raises(UnsafeCheckpoint) as refusal:
        read_weights(path)
    extra = read_weights(path, inert=[refusal.value.global_name]).extra
    assert isinstance(extra["mode"], Placeholder) and extra["mode"].arguments == ("fast",)


# Values


@pytest.mark.parametrize("form", FORMATS)
def test_every_type_and_layout(tmp_path, form):
    tensors = every_kind_of_tensor()
    base = torch.arange(24.0).reshape(4, 6)
    strided = {
        "whole": base,
        "transposed": base.t(),
        "slice": base[1:3, ::2],
        "row": base[2],
        "expanded": base[0, 0].expand(5),
    }
    weights = read_weights(torch_save({**tensors, **strided}, tmp_path / "a.pt", form))
    for name, tensor in {**tensors, **strided}.items():
        read = weights.tensors[name]
        assert (
            torch.equal(read, tensor) and read.dtype == tensor.dtype and read.stride() == tensor.stride()
        ), name
    storage = weights.tensors["whole"].untyped_storage().data_ptr()
    assert all(
        weights.tensors[name].untyped_storage().data_ptr() == storage for name in strided
    )  # still shared
    weights.tensors["whole"].zero_()
    assert weights.tensors["slice"].abs().sum() == 0
    assert torch.equal(read_weights(tmp_path / "a.pt").tensors["whole"], base)  # the file is as it was
    shapes = read_weights(tmp_path / "a.pt", "meta").tensors
    assert all(
        shapes[name].is_meta and shapes[name].shape == tensor.shape for name, tensor in strided.items()
    )
    assert shapes["row"].untyped_storage()._cdata == shapes["whole"].untyped_storage()._cdata


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_other_ways_in_which_tensors_are_stored(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.note = "an attribute"
    content = {
        "uint16": torch.tensor([1, 2, 65535], dtype=torch.uint16),
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
        "parameter": parameter,
        "conj": torch.complex(torch.ones(2), torch.ones(2)).conj(),
        "subclass": torch.nn.Buffer(torch.ones(2)),
    }
    weights = read_weights(torch_save(content, tmp_path / "a.pt", "zip"))
    for name, tensor in content.items():
        assert torch.equal(weights.tensors[name].to(torch.complex64), tensor.detach().to(torch.complex64)), (
            name
        )
    for content, what in (
        (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "rebuild_qtensor"),
        (torch.eye(2).to_sparse(), "rebuild_sparse"),
        (torch.ones(2, device="meta"), "rebuild_meta"),
    ):
        with pytest.raises(UnsupportedCheckpoint, match=what):
            read_weights(torch_save({"a": content}, tmp_path / "b.pt", "zip"))


def test_views_in_the_oldest_files(tmp_path):
    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return value.identity if isinstance(value, Stored) else None

    class Stored:
        def __init__(self, *view):
            self.identity = ("storage", torch.FloatStorage, "7", "cpu", 6, view)

    def content(*view) -> bytes:
        buffer = io.BytesIO()
        Pickler(buffer, 2).dump({"w": Call(torch._utils._rebuild_tensor, Stored(*view), 1, (2,), (1,))})
        return buffer.getvalue()

    data = struct.pack("<q6f", 6, *range(6))
    path = legacy(tmp_path / "old.pth", content("8", 2, 3), ("7",), data)
    assert read_weights(path).tensors["w"].tolist() == [3.0, 4.0]
    for view in (("8", 2, 5), ("8", -1, 3), ("8", 2, 2)):
        with pytest.raises(CorruptCheckpoint):
            read_weights(legacy(tmp_path / "old.pth", content(*view), ("7",), data))


def test_files_from_python_2(tmp_path):
    tensor = pickle.dumps({"w": 0}, 2).replace(text("w"), b"U\x01w")  # `str` was bytes
    assert b"U\x01w" in tensor
    for data, value in (
        (tensor, {"w": 0}),
        (b"I4294967296\n.", 2**32),  # an int that does not fit into 32 bits
        (b"U\x02\xff\x00.", b"\xff\x00"),
    ):
        assert read_pickled(archive(tmp_path / "old.pt", data)) == value


def test_tensors_are_pages_of_the_file(tmp_path):
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc")
    paths = [torch_save({"w": torch.ones(1000)}, tmp_path / "a.pt", "zip"), tmp_path / "a.safetensors"]
    write_safetensors(paths[1], {"w": torch.ones(1000)}, {})
    for path in paths:
        address = read_weights(path).tensors["w"]
        maps = [
            line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line
        ]
        spans = [[int(end, 16) for end in line[0].split("-")] for line in maps]
        assert any(start <= address.data_ptr() < end for start, end in spans)


def test_safetensors_as_the_reference_library_has_them(tmp_path):
    tensors = every_kind_of_tensor()
    save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    weights = read_weights(tmp_path / "theirs.safetensors")
    assert weights.metadata == {"format": "pt"} and set(weights.tensors) == set(tensors)
    write_safetensors(tmp_path / "ours.safetensors", {**tensors, "t": tensors["float32"].t()}, {"a": "é"})
    theirs = load_file(tmp_path / "ours.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(weights.tensors[name], tensor) and weights.tensors[name].dtype == tensor.dtype
        assert torch.equal(theirs[name], tensor) and theirs[name].dtype == tensor.dtype
    assert torch.equal(theirs["t"], tensors["float32"].t())
    assert read_weights(tmp_path / "theirs.safetensors", "meta").tensors["float32"].is_meta


def test_header_length_that_looks_liketext(tmp_path):
    """Lengths such as 0x3c20 begin with the bytes of " <", 0x7b20 with those of " {"."""
    for length in (0x3C20, 0x7B20, 0x5B20, 0x8B1F + 1):
        entry = {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
        header = json.dumps(entry).encode().ljust(length)
        path = tmp_path / "a.safetensors"
        path.write_bytes(struct.pack("<Q", length) + header + b"\0" * 4)
        assert read_weights(path).tensors["w"].tolist() == [0.0]


# Where the weights are


def test_where_the_weights_lie(tmp_path):
    w = {"w": torch.ones(1)}
    other = {"w": torch.zeros(1)}
    path = torch_save({"model": w, "ema": other, "step": 3, "t": torch.ones(1)}, tmp_path / "a.pt", "zip")
    assert read_weights(path).tensors["w"] == 1 and read_weights(path, key="ema").tensors["w"] == 0
    assert set(read_weights(path).extra) == {"ema", "step", "t"}
    with pytest.raises(CheckpointError, match="no weights under 'emma', but under 'model', 'ema'"):
        read_weights(path, key="emma")
    mixed = read_weights(torch_save({"state_dict": {**w, "note": "x"}}, tmp_path / "b.pt", "zip"))
    assert mixed.extra == {"state_dict": {"note": "x"}}
    for content, what in (
        (torch.ones(3), r"a tensor of shape \(3,\)"),
        ([w], "holds list"),
        ({"a": 1, "b": {"c": w}}, "it has 'a', 'b'"),
        ({}, "it has nothing"),
        ({1: torch.ones(1)}, "no text"),
    ):
        with pytest.raises(CheckpointError, match=what):
            read_weights(torch_save(content, tmp_path / "c.pt", "zip"))


@pytest.mark.parametrize("suffix", ("safetensors", "bin"))
def test_shards(tmp_path, suffix):
    tensors = every_kind_of_tensor()
    names = sorted(tensors)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    files = {f"{stem}-{i + 1:05}-of-00002.{suffix}": names[i::2] for i in range(2)}
    for file, inside in files.items():
        part = {name: tensors[name] for name in inside}
        save_file(part, tmp_path / file) if suffix == "safetensors" else torch.save(part, tmp_path / file)
    placed = {name: file for file, inside in files.items() for name in inside}
    index = tmp_path / f"{stem}.{suffix}.index.json"

    def write(weight_map):
        index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))

    write(placed)
    weights = read_weights(index)
    assert set(weights.tensors) == set(tensors) and weights.metadata == {"total_size": 1}
    assert all(torch.equal(weights.tensors[name], tensors[name]) for name in names)
    with pytest.raises(CheckpointError, match=f"one of 2 shards.*{stem}.{suffix}.index.json"):
        read_weights(tmp_path / next(iter(files)))
    write({**placed, "lost": next(iter(files))})
    with pytest.raises(CorruptCheckpoint, match="lost"):
        read_weights(index)
    write({name: file for name, file in placed.items() if name != names[0]})
    with pytest.raises(CorruptCheckpoint, match=names[0]):
        read_weights(index)
    for bad in ("../x.bin", "/etc/passwd", "a\\b", "", 3, "c:x"):
        write({"w": bad})
        with pytest.raises(CorruptCheckpoint, match="plain file name"):
            read_weights(index)
    write({"w": "gone.bin"})
    with pytest.raises(CorruptCheckpoint, match="gone.bin"):
        read_weights(index)
    index.write_text("[")
    with pytest.raises(CorruptCheckpoint, match="no index"):
        read_weights(index)


# Files that are something else, or broken


@pytest.mark.parametrize(
    "content, what",
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4265146304\n", "git lfs pull"),
        (b"/annex/objects/MD5E-s4--x.ckpt\n", "git annex get"),
        (b"\n<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "web page"),
        (b'{"error": "Access to model x is restricted"}', "JSON"),
        (b"\x1f\x8b\x08" + b"x" * 99, "gzip"),
        (b"\x89HDF\r\n" + b"x" * 99, "HDF5"),
        (b"\0" * 4096, "zeros"),
        (b"hello, this is text", "no file of torch.save"),
        (b"x" * 257 + b"ustar" + b"x" * 300, "tar"),
        (pickle.dumps({"w": 1}), "not of torch.save"),
    ],
)
def test_other_files_are_named(tmp_path, content, what):
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=what) as error:
        read_weights(path)
    assert str(path) in str(error.value)


def test_other_archives_and_paths_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones(3))
    with pytest.raises(UnsupportedCheckpoint, match="npz"):
        read_weights(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "script.pt", "w", zipfile.ZIP_DEFLATED) as file:
        for name in ("data.pkl", "constants.pkl", "code/__torch__/linear.py"):
            file.writestr(f"script/{name}", b"}.")
    with pytest.raises(UnsupportedCheckpoint, match="TorchScript"):
        read_weights(tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as file:
        file.writestr("photo.jpg", b"")
    with pytest.raises(UnsupportedCheckpoint, match="not of torch.save.*photo.jpg"):
        read_weights(tmp_path / "b.zip")
    with pytest.raises(FileNotFoundError, match="did you mean script.pt"):
        read_weights(tmp_path / "scrpt.pt")
    with pytest.raises(CheckpointError, match="is a folder.*script.pt"):
        read_weights(tmp_path)


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    content = {
        "state_dict": every_kind_of_tensor(),
        "epoch": 1,
        "x": [1.5, "a", None, (1, 2)],
        "n": np.arange(3),
    }
    write_safetensors(folder / "a.safetensors", every_kind_of_tensor(), {"x": "y"})
    files = {form: torch_save(content, folder / "a.ckpt", form).read_bytes() for form in FORMATS}
    return {**files, "safetensors": (folder / "a.safetensors").read_bytes()}


@pytest.mark.parametrize("form", (*FORMATS, "safetensors"))
def test_truncated_files_are_named(tmp_path, whole_files, form):
    whole = whole_files[form]
    path = tmp_path / "cut.safetensors"
    for length in [*range(0, len(whole), max(1, len(whole) // 150)), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError) as error:
            read_weights(path)
        assert str(path) in str(error.value)
        if length > 9:
            assert "truncated" in str(error.value)


@pytest.mark.parametrize("form", (*FORMATS, "safetensors"))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_flipped_bytes_break_nothing(tmp_path, whole_files, form, data):
    whole = bytearray(whole_files[form])
    head = min(len(whole), 2000)
    places = (
        st.integers(0, len(whole) - 1)
        | st.integers(0, head - 1)
        | st.integers(len(whole) - head, len(whole) - 1)
    )
    for place, change in data.draw(st.lists(st.tuples(places, st.integers(1, 255)), min_size=1, max_size=4)):
        whole[place] ^= change
    path = tmp_path / "flipped.ckpt"
    path.write_bytes(whole)
    with contextlib.suppress(CheckpointError):
        for tensor in read_weights(path).tensors.values():
            tensor.clone()


def test_flipped_byte_in_a_tensor_is_noticed_by_its_checksum(tmp_path):
    path = torch_save({"w": torch.ones(1000)}, tmp_path / "a.pt", "zip")
    whole = bytearray(path.read_bytes())
    whole[whole.index(struct.pack("<f", 1.0) * 8) + 400] ^= 1
    path.write_bytes(whole)
    with pytest.raises(CorruptCheckpoint, match="checksum"):
        read_weights(path)


PIECES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes] + [
    *(b"K\x01", b"X\x01\x00\x00\x00a", b"q\x00", b"h\x00", b")", b"}", b"]", b"(", b"\x85", b"N", b"Q", b"2"),
    *(
        b"ccollections\nOrderedDict\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"c_codecs\nencode\n",
        b"R",
        b"b",
    ),
    *(
        b"cnumpy.core.multiarray\nscalar\n",
        b"cnumpy\ndtype\n",
        b"comegaconf.dictconfig\nDictConfig\n",
        b"\x81",
    ),
    *(b"ctorch\nFloatStorage\n", b"X\x07\x00\x00\x00storage", b"ccollections\ndefaultdict\n", b"ca\nB\n"),
]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=3), max_size=40))
def test_random_opcodes_break_nothing(tmp_path, pieces):
    """Only our errors come out, and whatever is built is inert."""
    path = archive(tmp_path / "random.pt", b"".join(pieces) + b".", {"0": b"\0" * 16})
    with contextlib.suppress(CheckpointError):
        assert not callable(read_pickled(path))


# Bombs


def _storage(count: bytes, kind: str = "FloatStorage") -> bytes:
    return b"(" + text("storage") + mention("torch", kind) + text("0") + text("cpu") + count + b"tQ"


def _number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def _tensor_pickle(offset: int, shape: tuple, stride: tuple, count: int = 4) -> bytes:
    def numbers(values):
        return b"(" + b"".join(map(_number, values)) + b"t"

    inside = _storage(_number(count)) + _number(offset) + numbers(shape) + numbers(stride) + b"\x89}"
    return b"}" + text("w") + mention("torch._utils", "_rebuild_tensor_v2") + b"(" + inside + b"tRs."


@pytest.mark.parametrize(
    "offset, shape, stride",
    [
        (0, (5,), (1,)),
        (1, (4,), (1,)),
        (0, (2, 2), (3, 1)),
        (0, (-1,), (1,)),
        (0, (2,), (-1,)),
        (-1, (2,), (1,)),
        (0, (2**40, 2**40), (0, 0)),
        (0, (2**62,), (0,)),
        (0, (2**34,), (0,)),
        (0, (2,), (2**62,)),
        (2**63, (1,), (1,)),
        (2**62, (1,), (1,)),
        (5, (0,), (1,)),
        (0, (2, 2), (1,)),
        (0, (1,) * 65, (1,) * 65),
        (0, (2**900,), (1,)),
        (0, (0, 2**900), (1, 1)),
    ],
)
def test_views_that_reach_outside_of_their_storage(tmp_path, little_memory, offset, shape, stride):
    whole = read_weights(archive(tmp_path / "a.pt", _tensor_pickle(0, (2, 2), (2, 1)), {"0": b"\0" * 16}))
    assert whole.tensors["w"].shape == (2, 2)
    data = _tensor_pickle(offset, shape, stride)
    for path in (
        archive(tmp_path / "a.pt", data, {"0": b"\0" * 16}),
        legacy(tmp_path / "b.pt", data, ("0",), struct.pack("<q", 4) + b"\0" * 16),
    ):
        with pytest.raises(CorruptCheckpoint):
            read_weights(path)


def test_storages_of_absurd_size(tmp_path, little_memory):
    for count in (5, 2**40, 2**62, -1, 2**63, 2**900):
        data = _tensor_pickle(0, (1,), (1,), count)
        with pytest.raises(CorruptCheckpoint):
            read_weights(archive(tmp_path / "a.pt", data, {"0": b"\0" * 16}))
        size = struct.pack("<q", max(-1, min(count, 2**63 - 1)))
        with pytest.raises(CorruptCheckpoint):
            read_weights(legacy(tmp_path / "b.pt", data, ("0",), size + b"\0" * 16))
    wrong = _tensor_pickle(0, (1,), (1,), 3)
    with pytest.raises(CorruptCheckpoint, match="should have 3 elements"):
        read_weights(archive(tmp_path / "a.pt", wrong, {"0": b"\0" * 16}))


def test_bools_are_zero_or_one(tmp_path):
    data = _tensor_pickle(0, (4,), (1,)).replace(b"FloatStorage", b"BoolStorage")
    assert read_weights(archive(tmp_path / "a.pt", data, {"0": b"\0\1\1\0"})).tensors["w"].tolist()[1]
    with pytest.raises(CorruptCheckpoint, match="bool"):
        read_weights(archive(tmp_path / "a.pt", data, {"0": b"\0\1\2\0"}))


PICKLE_BOMBS = {
    "bytes": b"\x8e" + struct.pack("<Q", 2**60),
    "text": b"\x8d" + struct.pack("<Q", 2**60),
    "bytearray": b"\x96" + struct.pack("<Q", 2**60),
    "a number": b"\x8b" + struct.pack("<i", 10**6) + b"\x01" * 10**6 + b".",
    "a negative length": b"\x8b\xff\xff\xff\xff.",
    "many lists": b"]" * 300_000 + b".",
    "a deep list": b"]" + b"](" * 50_000 + b"e" * 50_000 + b".",
    "a deep key": b"})" + b"\x85" * 150_000 + b"K\x01s.",
    "a bushy key": b"})" + b"\x85" + b"2\x86" * 100 + b"K\x01s.",
    "a long key": b"}(" + b"K\x00" * 1500 + b")" + b"\x85" * 50_000 + b"tK\x01s.",
    "text as bytes": text("x" * 10**6)
    + text("latin1")
    + b"\x86q\x000]"
    + (b"(" + mention("_codecs", "encode") + b"h\x00Re") * 3000
    + b".",
    "copies of a list": b"("
    + b"N" * 50_000
    + b"l\x85q\x000]("
    + (mention("builtins", "set") + b"h\x00R") * 3000
    + b"e.",
    "zeros": mention("builtins", "bytearray") + _number(2**40) + b"\x85R.",
    "a memo": b"Nr\xff\xff\xff\xffj\xff\xff\xff\xff0",
    "a name": b"\x80\x04" + text("a" * 2000) + text("b") + b"\x93.",
    "digits": b"I" + b"1" * 10_000 + b"\n.",
}


@pytest.mark.parametrize("name", PICKLE_BOMBS)
@pytest.mark.parametrize("form", FORMATS)
def test_pickle_bombs(tmp_path, little_memory, monkeypatch, form, name):
    monkeypatch.setattr(pickle_scan, "MAX_STEPS", 250_000)
    with pytest.raises(CorruptCheckpoint):
        read_weights(WRAP[form](tmp_path / "bomb.pt", PICKLE_BOMBS[name]))


def test_bomb_in_what_is_recovered_afterwards(tmp_path):
    """Lists of the same lists: small in memory, endless if each is walked once per mention."""
    nested: list = [1]
    for _ in range(60):
        nested = [nested, nested]
    loop: list = []
    loop.append({"loop": loop})
    extra = read_weights(
        torch_save({"w": torch.ones(1), "x": nested, "y": loop}, tmp_path / "a.pt", "zip")
    ).extra
    assert extra["x"][0] is extra["x"][1] and extra["y"][0]["loop"] is extra["y"]
    with pytest.raises(CheckpointError):
        read_weights(torch_save(nested, tmp_path / "b.pt", "zip"))


def test_zip_bombs(tmp_path, little_memory):
    path = archive(tmp_path / "deflated.pt", b"]" * 10**7, method=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10**5
    with pytest.raises(CorruptCheckpoint, match="compressed, from 10000000"):
        read_weights(path)
    good = archive(tmp_path / "good.pt", pickle.dumps({}), {"0": b"abcd" * 4, "1": b"abcd" * 4}).read_bytes()

    def broken(content: bytes, what: str) -> None:
        assert content != good
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(CorruptCheckpoint, match=what):
            read_weights(tmp_path / "bad.pt")

    central = good.index(b"PK\x01\x02")
    entries = [i for i in range(central, len(good)) if good[i : i + 4] == b"PK\x01\x02"]
    end = good.rindex(b"PK\x05\x06")

    def patched(position: int, form: str, *values: int) -> bytes:
        size = struct.calcsize(form)
        return good[:position] + struct.pack(form, *values) + good[position + size :]

    broken(patched(entries[2] + 20, "<II", 2**31, 2**31), "overlaps")
    broken(patched(entries[0] + 20, "<II", 6, 7), "compressed")
    first_offset = struct.unpack_from("<I", good, entries[2] + 42)[0]
    broken(patched(entries[3] + 42, "<I", first_offset), "in directory .*1. and header .*0. differ")
    broken(patched(entries[3] + 42, "<I", 2**32 - 2), "damaged")
    broken(patched(end + 12, "<I", 2**31), "damaged")
    broken(patched(entries[0] + 8, "<H", 1), "encrypted")
    twice = io.BytesIO()
    with zipfile.ZipFile(twice, "w") as file, pytest.warns(UserWarning, match="Duplicate"):
        for _ in range(2):
            file.writestr("archive/data.pkl", b"}.")
    broken(twice.getvalue(), "two members")
    huge = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, 2**50, 2**50, 0, 0)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, 0, 1)
    record = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0)
    (tmp_path / "bad.pt").write_bytes(b"PK\x03\x04" + huge + locator + record)
    with pytest.raises(CheckpointError, match="has no data.pkl"):
        read_weights(tmp_path / "bad.pt")


def test_zip64_archives(tmp_path, monkeypatch):
    tensors = every_kind_of_tensor()
    plain = torch_save(tensors, tmp_path / "a.pt", "zip")
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(tmp_path / "b.pt", "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert b"PK\x06\x06" in (tmp_path / "b.pt").read_bytes()
    weights = read_weights(tmp_path / "b.pt")
    assert all(torch.equal(weights.tensors[name], tensor) for name, tensor in tensors.items())


def _header(entries: object, data: bytes = b"\0" * 16) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def _tensor_entry(shape: list, begin: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**60) + b"{" + b" " * 50,
        struct.pack("<Q", 99_000_000) + b"{" + b" " * 50,
        _header({"a": _tensor_entry([4], 0, 16)}, b"\0" * 15),
        _header({"a": _tensor_entry([4], 0, 16)}, b"\0" * 17),
        _header({"a": _tensor_entry([2**40, 2**40], 0, 16)}),
        _header({"a": _tensor_entry([-4], 0, 16)}),
        _header({"a": _tensor_entry([4.0], 0, 16)}),
        _header({"a": _tensor_entry([2**40], 0, 2**42)}),
        _header({"a": _tensor_entry([5], 0, 16)}),
        _header({"a": _tensor_entry([4], 0, 16), "b": _tensor_entry([4], 0, 16)}),
        _header({"a": _tensor_entry([1], 0, 4), "b": _tensor_entry([2], 8, 16)}),
        _header({"a": _tensor_entry([4], 16, 0)}),
        _header({"a": _tensor_entry([4], 0, 16, "F33")}),
        _header({"a": _tensor_entry([4], 0, 16, [])}),
        _header({"a": {"dtype": "F32"}}),
        _header({"a": 3}),
        _header({"__metadata__": {"a": 3}}, b""),
        _header(b'{"a": 1, "a": 2}'),
        _header(b"{" + b'"a":[' * 50_000),
        _header(b'{"a": \xff\xff}'),
        _header(b'{"a": ' + b"1" * 10_000 + b"}"),
        _header({"a": _tensor_entry([0, 2**63], 0, 0)}, b""),
        _header({"a": _tensor_entry([16], 0, 16, "BOOL")}, b"\0\1\2" + b"\0" * 13),
    ],
)
def test_safetensors_that_contradict_themselves(tmp_path, little_memory, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged|unknown type|other values than 0 and 1"):
        read_weights(path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_onto_a_gpu(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    for form in FORMATS:
        weights = read_weights(torch_save({"a": base, "b": base[1]}, tmp_path / "a.pt", form), "cuda").tensors
        assert weights["a"].is_cuda and torch.equal(weights["b"].cpu(), base[1])
        assert weights["a"].untyped_storage().data_ptr() == weights["b"].untyped_storage().data_ptr()
