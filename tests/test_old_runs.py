"""Runs of an older version, in `tests/frozen`: loaded, sampled and continued as by that version itself."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import training_runs as T
from command_line import run
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import ldm

FROZEN = Path(__file__).parent / "frozen"
NAMES = ("autoencoder", "diffusion", "classifier")
CHECKPOINT = "checkpoints/step-00000004.ckpt"
#: Other processors than the one that wrote these runs round otherwise: up to 7e-7 of a tensor's largest value
#: between AVX-512, AVX2 and SSE4, and a unit in the last of the six digits of a figure.
WEIGHTS = {"rtol": 1e-6, "atol": 1e-6}
FIGURES = {"rel": 1e-5, "abs": 1e-5}


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with the runs, as their user has it; images keep their dates, by which they are known."""
    shutil.unpack_archive(FROZEN / "runs.tar.xz", tmp_path)
    for name in NAMES:
        shutil.copy(FROZEN / f"{name}.yaml", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_an_old_run_is_loaded_with_averaged_and_with_raw_weights(place, name):
    folder = place / "runs" / name
    averaged = load_file(folder / "model.safetensors")
    raw = torch.load(folder / CHECKPOINT, weights_only=True)["model"]
    for expected, ema in ((averaged, True), (raw, False)):
        found = ldm.load(folder, ema=ema).state_dict()
        assert found.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    assert [key for key in raw if not torch.equal(raw[key], averaged[key])] != []


@pytest.mark.parametrize("source", ["", "model.safetensors", CHECKPOINT])
def test_an_old_model_draws_the_same_images(place, source):
    model = place / "runs" / "diffusion" / source
    with safe_open(place / "runs" / "diffusion" / "model.safetensors", framework="pt") as file:
        own = json.loads(file.metadata()["ldm"])["sampling"]
    assert own == {"sampler": "ddim", "steps": 4, "guidance": 4.0, "eta": 0.5}
    said = run("sample.py", model, "--n", "2", "--seed", "39", "--no-grid", "--out", "drawn", cwd=place)
    assert said.status == 0, said.err
    expected, found = pixels(place / "sampled"), pixels(place / "drawn")
    assert found.keys() == expected.keys() == {"00000-disc.png", "00001-stripe.png"}
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize("name", NAMES)
def test_an_old_run_goes_on_to_the_same_weights(place, name):
    cached = sorted(place.glob("runs/latents/*/*"))
    assert len(cached) == 6
    T.finish(f"{name}.yaml", "training.steps=6", log=place / "log", cwd=place)
    assert_continued(place, name)
    assert sorted(place.glob("runs/latents/*/*")) == cached  # known again, not encoded anew


def test_an_old_run_goes_on_without_its_cached_latents(place):
    shutil.rmtree(place / "runs" / "latents")
    T.finish("diffusion.yaml", "training.steps=6", log=place / "log", cwd=place)
    assert_continued(place, "diffusion")


@pytest.mark.parametrize("name", NAMES)
def test_the_config_in_an_old_run_folder_is_that_run(place, name):
    folder = place / "runs" / name
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    T.finish(f"runs/{name}/config.yaml", log=place / "log", cwd=place)
    assert {path: path.read_bytes() for path in before} == before  # complete: there was nothing to do
    assert [path.name for path in folder.glob("checkpoints/*")] == [Path(CHECKPOINT).name]


def assert_continued(place: Path, name: str) -> None:
    """That a run of six steps has the weights and figures that the old version came to from step 4."""
    folder, kept = place / "runs" / name, place / "continued" / name
    expected, found = load_file(kept / "model.safetensors"), load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(
            found[key], expected[key], **WEIGHTS, msg=lambda text, key=key: f"{key}: {text}"
        )
    for table in ("train", "validation"):
        assert figures(folder / "logs" / f"{table}.csv") == [
            {key: pytest.approx(value, **FIGURES, nan_ok=True) for key, value in row.items()}
            for row in figures(kept / f"{table}.csv")
        ]


def figures(path: Path) -> list[dict[str, float]]:
    """The rows of a table, without how fast it went; an empty field is not a number."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        {key: float(value or "nan") for key, value in row.items() if key != "images_per_second"}
        for row in rows
    ]


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in folder.glob("*.png")}
