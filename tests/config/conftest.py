import os
import sys
import types
from pathlib import Path

import pytest
import torch
from config_parts import AnyKeyword, Part, function


@pytest.fixture(autouse=True)
def parts_module(monkeypatch):
    module = types.ModuleType("ldm.parts")
    module.torch, module.os = torch, os
    for thing in (Part, AnyKeyword, function):
        monkeypatch.setattr(thing, "__module__", "ldm.parts")
        setattr(module, thing.__name__, thing)
    monkeypatch.setitem(sys.modules, "ldm.parts", module)
    import ldm

    monkeypatch.setattr(ldm, "parts", module, raising=False)


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "x.yaml") -> str:
        Path(name).write_text(text)
        return name

    return write
