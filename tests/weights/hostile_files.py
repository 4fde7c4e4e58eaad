"""Files and pickles made by hand: honest containers, and payloads that do something when they are trusted."""

import contextlib
import functools
import importlib
import io
import operator
import os
import pickle
import struct
import subprocess
import time
import zipfile
from pathlib import Path

import numpy as np
import torch

from ldm.weights.torch_files import LEGACY_MAGIC

FORMATS = ("zip", "legacy")


def torch_save(content: object, path: Path, form: str) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    return path


def archive(path: Path, data: bytes, storages: dict[str, bytes] | None = None, method: int = 0) -> Path:
    """An archive as torch writes it, around any pickle."""
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/byteorder", "little", zipfile.ZIP_STORED)
        for key, value in (storages or {}).items():
            file.writestr(f"archive/data/{key}", value)
        file.writestr("archive/version", "3\n", zipfile.ZIP_STORED)
    return path


def legacy(path: Path, data: bytes, keys: tuple = (), storages: bytes = b"") -> Path:
    """A file of torch before 1.6, around any pickle."""
    machine = {
        "protocol_version": 1001,
        "little_endian": True,
        "type_sizes": {"short": 2, "int": 4, "long": 4},
    }
    head = b"".join(pickle.dumps(part, 2) for part in (LEGACY_MAGIC, 1001, machine))
    path.write_bytes(head + data + pickle.dumps(list(keys), 2) + storages)
    return path


WRAP = {"zip": archive, "legacy": legacy}


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments, state=None):
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.parts

    def __call__(self):
        raise AssertionError("only here so that the pickler takes it for a function")


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def mention(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


COLLECT_ENV = mention("torch.utils.collect_env", "run")  # runs its argument in a shell


def torch_function(dotted: str):
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


def torch_bytes(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


COLLECT_ENV_RUN = torch_function("torch.utils.collect_env.run")

# Payloads that create the sentinel when Python's own unpickler reads them, by the name to be refused.
LIVE = {
    "posix.system": lambda s: Call(os.system, f"touch {s}"),
    "posix.mkdir": lambda s: Call(os.mkdir, s),
    "builtins.eval": lambda s: Call(eval, f"__import__('os').mkdir({s!r})"),
    "builtins.exec": lambda s: Call(exec, f"open({s!r}, 'w').close()"),
    f"{open.__module__}.open": lambda s: Call(open, s, "w"),
    "builtins.getattr": lambda s: Call(Call(getattr, Path(s), "touch")),
    "builtins.map": lambda s: Call(list, Call(map, os.mkdir, [s])),
    "subprocess.check_call": lambda s: Call(subprocess.check_call, ["touch", s]),
    "subprocess.Popen": lambda s: Call(subprocess.Popen, ["mkdir", s]),
    "pathlib.Path.touch": lambda s: Call(Path.touch, Path(s)),
    "operator.methodcaller": lambda s: Call(operator.methodcaller("touch"), Path(s)),
    "functools.partial": lambda s: Call(Call(functools.partial, COLLECT_ENV_RUN, f"touch {s}")),
    "_pickle.loads": lambda s: Call(pickle.loads, pickle.dumps(Call(os.mkdir, s))),
    "torch.storage._load_from_bytes": lambda s: Call(
        torch_function("torch.storage._load_from_bytes"), torch_bytes(Call(os.mkdir, s))
    ),
    "torch.serialization.save": lambda s: Call(torch.save, 0, s),
    "torch.utils.collect_env.run": lambda s: Call(COLLECT_ENV_RUN, f"touch {s}"),
    "torch.jit.unsupported_tensor_ops.execWrapper": lambda s: Call(
        torch_function("torch.jit.unsupported_tensor_ops.execWrapper"), f"open({s!r}, 'w')", {}, {}
    ),
    "numpy.save": lambda s: Call(np.save, s + ".npy", 0),
    "numpy.testing._private.utils.runstring": lambda s: Call(
        torch_function("numpy.testing._private.utils.runstring"), f"open({s!r}, 'w')", {}
    ),
}

# More names whose call must be refused: of the standard library, torch, numpy, and others.
_CALLS = """
    os.popen nt.system commands.getoutput builtins.__import__ __builtin__.eval importlib.import_module
    marshal.loads types.FunctionType types.CodeType webbrowser.open pty.spawn runpy.run_path ctypes.CDLL
    socket.create_connection shutil.rmtree sys.exit collections.namedtuple logging.config.fileConfig
    code.interact timeit.timeit cProfile.run builtins.compile builtins.globals builtins.breakpoint
    codecs.decode tempfile.NamedTemporaryFile distutils.core.run torch.load torch.hub.load
    torch.jit.load torch.ops.load_library torch.utils.cpp_extension.load_inline torch.from_file
    torch.nn.Linear torch.cuda.set_device torch.Tensor torch.package.PackageImporter
    torch.distributed.launch numpy.load numpy.fromfile numpy.memmap numpy.ctypeslib.load_library
    numpy.f2py.compile numpy.frompyfunc dill._dill._create_function cloudpickle.loads joblib.load
    pandas.read_pickle pip.main __main__.main omegaconf.OmegaConf.load pytorch_lightning.Trainer
    pytorch_lightning.core.saving.load_hparams_from_yaml pytorch_lightning.trainer.Trainer.fit
    argparse.FileType copyreg.add_extension
"""
CALLS = _CALLS.split()


def opcode_attacks(sentinel: str) -> dict[str, tuple[bytes, str, bool]]:
    """Payloads in raw opcodes: pickle, name to be refused, whether Python's own unpickler falls for it."""
    touch = text(f"touch {sentinel}")
    namespace = mention("argparse", "Namespace") + b")\x81"
    return {
        "protocol 0": (b"cposix\nsystem\n(V" + f"touch {sentinel}".encode() + b"\ntR.", "posix.system", True),
        "INST": (b"(" + touch + b"iposix\nsystem\n.", "posix.system", True),
        "INST of torch": (
            b"(" + touch + b"itorch.utils.collect_env\nrun\n.",
            "torch.utils.collect_env.run",
            True,
        ),
        "OBJ": (b"(" + COLLECT_ENV + touch + b"o.", "torch.utils.collect_env.run", True),
        "a name with dots": (
            b"\x80\x04" + text("torch.serialization") + text("os.system") + b"\x93" + touch + b"\x85R.",
            "torch.serialization.os.system",
            True,
        ),
        "a planted __setstate__": (
            namespace + b"}" + text("__setstate__") + COLLECT_ENV + b"sb" + touch + b"b.",
            "torch.utils.collect_env.run",
            True,
        ),
        "a planted __setstate__ in slots": (
            namespace + b"N}" + text("__setstate__") + COLLECT_ENV + b"s\x86b" + touch + b"b.",
            "torch.utils.collect_env.run",
            True,
        ),
        "a call whose result is dropped": (
            COLLECT_ENV + touch + b"\x85R0}.",
            "torch.utils.collect_env.run",
            True,
        ),
        "a call in a key": (
            b"}(" + COLLECT_ENV + touch + b"\x85RK\x01u.",
            "torch.utils.collect_env.run",
            True,
        ),
        "NEWOBJ_EX": (
            mention("torch.nn", "Module") + b")}" + text("x") + touch + b"s\x92.",
            "torch.nn.Module",
            False,
        ),
        "a call through copyreg": (
            mention("copyreg", "_reconstructor") + mention("a.b", "C") + COLLECT_ENV + touch + b"\x87R.",
            "torch.utils.collect_env.run",
            False,
        ),
        "a class made anew": (
            mention("builtins", "type") + text("X") + b")}\x87R.",
            "builtins.type",
            False,
        ),
        "attributes of a function": (
            COLLECT_ENV + b"}" + text("x") + touch + b"sb.",
            "torch.utils.collect_env",
            False,
        ),
        "items of a module": (mention("torch", "hub") + text("x") + touch + b"s.", "torch.hub", False),
        "state set twice": (namespace + b"}b}b.", "argparse.Namespace", False),
        "an extension": (b"\x82\x01.", "copyreg.extension", False),
        "a storage of a foreign type": (
            b"(" + text("storage") + mention("posix", "system") + text("0") + text("cpu") + b"K\x01tQ.",
            "posix.system",
            False,
        ),
        "a dunder": (
            mention("foo.bar", "Baz.__init__.__globals__") + b".",
            "foo.bar.Baz.__init__.__globals__",
            False,
        ),
    }


def assert_live(payload: bytes, sentinel: Path) -> None:
    """The control: Python's own unpickler falls for the payload, so that refusing it means something."""
    with contextlib.suppress(Exception):  # what comes after the attack may fail
        pickle.loads(payload)
    made = [path for path in (sentinel, sentinel.with_name(sentinel.name + ".npy")) if path.exists()]
    for _ in range(100):
        if made:
            break
        time.sleep(0.02)  # a process that was started
        made = [sentinel] if sentinel.exists() else []
    assert made, "the payload does nothing, so refusing it proves nothing"
    for path in made:
        path.rmdir() if path.is_dir() else path.unlink()
