"""`docs/extending.md`: every example as it stands there, by the real commands, in a folder of its own."""

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ROOT, environment
from PIL import Image

PAGE = (ROOT / "docs" / "extending.md").read_text("utf-8")
FILES = dict(re.findall(r"^```\w+ file=(\S+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
SECTIONS = {
    title: [line for block in re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
            for line in block.splitlines()]
    for title, text in re.findall(r"^##? (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
}  # fmt: skip
# What makes the examples small; each is given to every training command behind its own arguments.
SMALL = "training.batch_size=8 training.accelerator=cpu training.workers=0 logging.images=4"
STEPS = "training.steps=4 logging.every=1 logging.images_every=4 logging.validate_every=2"
NEEDS = {title: ["Extending ldm"] for title in ("A sampler",)}


@pytest.fixture(scope="module")
def mine(tmp_path_factory) -> Path:
    """A folder with the files of the page, beside the clone's configs and scripts."""
    pytest.importorskip("mlxtend")
    clone = tmp_path_factory.mktemp("clone")
    for name in ("configs", "train.py", "sample.py"):
        (clone / name).symlink_to(ROOT / name)
    mine = clone / "mine"
    mine.mkdir()
    for name, text in FILES.items():
        (mine / name).write_text(text)
    return mine


def run(mine: Path, line: str, status: int = 0) -> str:
    words = shlex.split(line)
    assert words[0] == "python", line
    if "../train.py" in words:
        steps = [] if any(word.startswith("training.steps=") for word in words) else STEPS.split()
        words += [*SMALL.split(), *steps]
    if "../sample.py" in words:
        words += ["--steps", "2", "--overwrite"]
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=mine, env=environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == status, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def rows(mine: Path, run: str, table: str) -> list[dict]:
    with (mine / "runs" / run / "logs" / f"{table}.csv").open() as file:
        return list(csv.DictReader(file))


def images(folder: Path) -> list[bytes]:
    return [Image.open(path).tobytes() for path in sorted(folder.glob("0*.png"))]


def sampler(mine: Path) -> None:
    restless, own = images(mine / "out/restless"), images(mine / "out/restless-own")
    assert len(restless) == 4 and restless == own  # from the command line and from the YAML
    draw = "python ../sample.py runs/digits --n 4 --sampler"
    run(mine, f"{draw} my_sampler.restless --option strength=0 --out out/calm")
    run(mine, f"{draw} euler --out out/euler")
    assert restless != images(mine / "out/calm")
    for calm, euler in zip(images(mine / "out/calm"), images(mine / "out/euler"), strict=True):
        assert all(abs(a - b) <= 1 for a, b in zip(calm, euler, strict=True))  # without noise Euler's method
    assert "strength" in run(mine, f"{draw} my_sampler.restless --option strenth=1", 1)


def embedder(mine: Path) -> None:
    assert len(images(mine / "out/discs")) == 4
    facts = Image.open(next((mine / "out/discs").glob("00000*.png"))).text["ldm"]
    assert '"radius": "0.3"' in facts
    said = run(mine, "python ../sample.py runs/discs --config discs.yaml --n 1 --out out/none", 1)
    assert "radius" in said


def callback(mine: Path) -> None:
    diary = (mine / "diary.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in diary] == ["2", "4"]
    for line, row in zip(diary, rows(mine, "diary", "validation"), strict=True):
        assert float(line.split()[1]) == pytest.approx(float(row["loss"]), abs=1e-4)
    assert "train/loss" in (mine / "lines.txt").read_text()


def method(mine: Path) -> None:
    train = rows(mine, "denoising", "train")
    assert train[0]["step"] == "1" and train[-1]["step"] == "120"
    assert float(train[-1]["loss"]) < 0.5 * float(train[0]["loss"])
    assert (mine / "runs/denoising/images/denoised-00000120.png").exists()
    stands_on_it = "../configs/quickstart/diffusion.yaml first_stage=runs/denoising name=on-top"
    assert "first_stage_model" in run(mine, f"python ../train.py {stands_on_it} --dry-run")


CHECKS = {"A sampler": sampler, "An embedder": embedder, "A callback and a logger": callback,
          "A training method": method}  # fmt: skip


@pytest.mark.parametrize("title", [title for title, commands in SECTIONS.items() if commands])
def test_every_example_runs_as_it_stands(mine, title):
    for needed in (*NEEDS.get(title, ()), title):
        for command in SECTIONS[needed]:
            run(mine, command)
    CHECKS.get(title, lambda mine: None)(mine)


def test_every_file_of_the_page_is_used():
    commands = " ".join(line for lines in SECTIONS.values() for line in lines)
    for name in FILES:
        assert Path(name).stem in commands + " ".join(FILES.values()), name
