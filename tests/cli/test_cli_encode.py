"""`ldm encode`, with first stages whose figures are known, and `ldm verify`."""

import csv
import json
import math
import os
import re

import numpy as np
import pytest
import torch
from command_line import cli, run
from PIL import Image
from safetensors import safe_open
from tiny_runs import description, first_stage_description, network, save_run

import ldm
from ldm.cli import results
from ldm.cli.results import png_names
from ldm.data.images.grid import to_uint8

__all__ = ["cli"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    save_run(folder / "autoencoder", first_stage_description(), checkpoint=True)
    save_run(folder / "diffusion", description())
    return folder


@pytest.fixture
def images(tmp_path):
    """Five images in folders, all 16x16 after cropping, and a file of another kind."""
    folder = tmp_path / "images"
    random = np.random.default_rng(0)
    for name, width, height in (
        ("cats/one.jpg", 40, 30),
        ("cats/one.png", 16, 16),
        ("cats/more/two.webp", 64, 48),
        ("dogs/three.bmp", 17, 40),
        ("four.png", 16, 16),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


NAMES = ["cats/more/two.webp", "cats/one.jpg", "cats/one.png", "dogs/three.bmp", "four.png"]
WRITTEN = ["cats/more/two.png", "cats/one.jpg.png", "cats/one.png.png", "dogs/three.png", "four.png"]


def files(folder) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def table(path) -> dict[str, tuple[float, float]]:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {row["path"]: (float(row["psnr"]), float(row["l1"])) for row in rows}


def test_a_real_process(runs, images, tmp_path):
    (images / "dogs" / "bad.png").write_bytes(b"no image")
    (images / "dogs" / "empty.jpg").touch()
    result = run("ldm", "encode", runs / "autoencoder", "images", "--out", "out", "--latents", cwd=tmp_path)
    assert result.status == 1  # for the two, and only for them
    assert "dogs/bad.png: UnidentifiedImageError" in result.err
    assert "dogs/empty.jpg: empty file" in result.err
    assert "error: no reconstruction of 2 images, see above" in result.err
    assert "ignored 1 file of another kind (.txt 1)" in result.err
    out = tmp_path / "out"
    assert files(out) == sorted(
        [*(f"reconstructions/{name}" for name in WRITTEN), "figures.csv", "grid.png", "latents.safetensors"]
    )
    lines = result.out.splitlines()
    assert lines[0] == "5 images of 16x16 pixels through AutoencoderKL (f2)"
    figures = table(out / "figures.csv")
    assert list(figures) == NAMES
    psnr, l1 = zip(*figures.values(), strict=True)
    assert f"mean {np.mean(psnr):6.2f} dB   worst {min(psnr):6.2f} dB" in lines[1]
    assert f"mean {np.mean(l1):6.4f}      worst {max(l1):6.4f}" in lines[2]
    worst = sorted(figures, key=lambda name: figures[name][0])
    assert [line.split()[-1] for line in lines[4:9]] == worst
    assert lines[9] == "written to out; side by side: out/grid.png"


def test_what_is_written_is_what_the_model_makes(runs, images, tmp_path, cli):
    out = tmp_path / "out"
    result = cli("encode", runs / "autoencoder", images, "--out", out, "--latents", "--batch-size", 2)
    assert result.status == 0, result.err
    model = ldm.load(runs / "autoencoder")
    with safe_open(out / "latents.safetensors", "pt") as file:
        metadata = file.metadata()
        mean, std = file.get_tensor("mean"), file.get_tensor("std")
    assert json.loads(metadata["paths"]) == NAMES
    assert metadata["format"] == "ldm-latents/1"
    assert metadata["weights"] == "ema"
    assert mean.shape == std.shape == (5, 3, 8, 8)
    for i, name in ((2, "cats/one.png"), (4, "four.png")):  # those that are not resized
        original = pixels(images / name)
        x = torch.tensor(original).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            posterior = model.encode(x)
            reconstruction = model.decode(posterior.mean).clamp(-1, 1)
        assert torch.allclose(mean[i], posterior.mean[0], atol=1e-4)
        assert torch.allclose(std[i], posterior.std[0], atol=1e-4)
        written = pixels(out / "reconstructions" / WRITTEN[i]).astype(int)
        assert abs(written - to_uint8(reconstruction)[0]).max() <= 1
        difference = (reconstruction - x).double()
        psnr, l1 = table(out / "figures.csv")[name]
        assert psnr == pytest.approx(10 * math.log10(4 / difference.square().mean()), abs=1e-3)
        assert l1 == pytest.approx(difference.abs().mean().item(), abs=1e-5)
    # The sheet: four pairs a row, originals left of their reconstructions, enlarged from 16 to 64 pixels.
    sheet = pixels(out / "grid.png")
    assert sheet.shape == (2 * 66 + 2, 8 * 66 + 2, 3)
    assert np.array_equal(sheet[68:132:4, 2:66:4], pixels(images / "four.png"))
    assert np.array_equal(sheet[68:132:4, 68:132:4], pixels(out / "reconstructions" / "four.png"))


def test_one_image_through_the_first_stage_of_a_diffusion_model(runs, images, tmp_path, cli):
    out = tmp_path / "out"
    result = cli("encode", runs / "diffusion", images / "four.png", "--out", out, "--no-grid", "--size", 24)
    assert result.status == 0, result.err
    assert result.out.startswith("1 image of 24x24 pixels through AutoencoderKL (f2)\n")
    assert files(out) == ["figures.csv", "reconstructions/four.png"]
    assert pixels(out / "reconstructions" / "four.png").shape == (24, 24, 3)


def test_raw_weights_and_half_precision_are_other_pixels(runs, images, tmp_path, cli):
    written = {}
    for name, options in (("plain", ()), ("raw", ("--no-ema",)), ("half", ("--precision", "bf16"))):
        fixed = (runs / "autoencoder", images / "four.png", "--out", tmp_path / name)
        assert cli("encode", *fixed, *options).status == 0
        written[name] = pixels(tmp_path / name / "reconstructions" / "four.png").astype(int)
    assert abs(written["raw"] - written["plain"]).max() > 20
    assert 0 < abs(written["half"] - written["plain"]).max() < 20


def test_grey_first_stage(images, tmp_path, cli):
    described = first_stage_description()
    described["model"]["params"]["ddconfig"] |= {"in_channels": 1, "out_ch": 1}
    grey = save_run(tmp_path / "grey", described)
    assert cli("encode", grey, images, "--out", tmp_path / "out").status == 0
    assert pixels(tmp_path / "out" / "reconstructions" / "four.png").shape == (16, 16)


def test_nothing_is_overwritten_unasked(runs, images, tmp_path, cli):
    fixed = ("encode", runs / "autoencoder", images, "--out", tmp_path / "out")
    assert cli(*fixed).status == 0
    (tmp_path / "out" / "reconstructions" / "four.png").write_bytes(b"old")
    result = cli(*fixed)
    assert result.status == 1
    assert "and 6 more would be overwritten" in result.err
    assert (tmp_path / "out" / "reconstructions" / "four.png").read_bytes() == b"old"
    assert cli(*fixed, "--overwrite").status == 0
    assert pixels(tmp_path / "out" / "reconstructions" / "four.png").shape == (16, 16, 3)


def test_only_bad_images(runs, tmp_path, cli):
    (tmp_path / "bad.png").write_bytes(b"no image")
    result = cli("encode", runs / "autoencoder", tmp_path / "bad.png", "--out", tmp_path / "out", "--latents")
    assert result.status == 1
    assert result.out == ""
    assert "no reconstruction of 1 image, see above" in result.err
    assert files(tmp_path / "out") == ["figures.csv"]


@pytest.mark.parametrize(
    ("model", "images_path", "options", "status", "message"),
    [
        ("autoencoder", "imags", (), 1, "imags does not exist; did you mean .*images"),
        ("autoencoder", "images", ("--size", "15"), 1, "size 15 is not a multiple .* 2"),
        ("autoencoder", "images/notes.txt", (), 1, "notes.txt: UnidentifiedImageError"),
        ("autoencodr", "images", (), 1, "Did you mean .*autoencoder"),
        ("autoencoder", "images", ("--size", "0"), 2, "--size"),
        ("autoencoder", "images", ("--precision", "16"), 1, "there are auto, 32, bf16, fp16"),
        ("autoencoder", "empty", (), 1, "empty"),
    ],
)
def test_mistakes(runs, images, tmp_path, cli, model, images_path, options, status, message):
    (tmp_path / "empty").mkdir()
    result = cli("encode", runs / model, tmp_path / images_path, *options, "--out", tmp_path / "out")
    assert result.status == status
    assert result.out == ""
    assert re.search(message, result.err), result.err
    assert "Traceback" not in result.err


def test_results_do_not_go_among_the_images(runs, images, cli):
    for out in (images, images / "out", images / "cats" / ".." / "x"):
        result = cli("encode", runs / "autoencoder", images, "--out", out)
        assert result.status == 1
        assert "lies inside" in result.err
    assert not (images / "out").exists()


def test_a_model_of_pixels_has_nothing_to_encode(images, tmp_path, cli):
    described = description()
    described["model"]["params"]["first_stage"] = {
        "target": "ldm.models.autoencoder.IdentityFirstStage",
        "params": {"channels": 3},
    }
    run_folder = save_run(tmp_path / "pixels", described)
    result = cli("encode", run_folder, images, "--out", tmp_path / "out")
    assert result.status == 1
    assert "works on the pixels themselves" in result.err


def test_a_first_stage_that_does_not_know_its_size(images, tmp_path, cli):
    described = first_stage_description()
    del described["image_size"]
    run_folder = save_run(tmp_path / "ae", described)
    result = cli("encode", run_folder, images, "--out", tmp_path / "out")
    assert "does not say at which size it was trained; give a size" in result.err
    assert cli("encode", run_folder, images, "--out", tmp_path / "out", "--size", 16).status == 0


def test_interruption(runs, images, tmp_path, cli, monkeypatch):
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write_png(*args)

    write_png = results.write_png
    monkeypatch.setattr(results, "write_png", interrupted)
    out = tmp_path / "out"
    result = cli("encode", runs / "autoencoder", images, "--out", out, "--latents", "--workers", 0)
    assert (result.status, result.out) == (130, "")
    assert f"stopped: 2 of 5 images are in {out}, each of them whole" in result.err
    assert [name for name in files(out) if not name.startswith("reconstructions/") or "partial" in name] == []
    assert len(files(out)) == 2


def test_names_never_meet():
    assert png_names(["a.jpg", "b/a.jpg"]) == ["a.png", "b/a.png"]
    assert png_names(["a.jpg", "a.png", "c.webp"]) == ["a.jpg.png", "a.png.png", "c.png"]
    assert png_names(["A.jpg", "a.jpg"]) == ["A.jpg.png", "a.jpg.png"]
    hard = ["a.jpg", "a.jpg.png", "a.png"]
    assert len(set(png_names(hard))) == 3
    assert png_names(["dir.v2/x.tar.png"]) == ["dir.v2/x.tar.png"]


@pytest.mark.skipif(os.name == "nt" or os.uname().sysname == "Darwin", reason="names there are always text")
def test_names_that_are_no_text(runs, images, tmp_path):
    os.rename(images / "four.png", os.fsencode(images / "four") + b"\xff.png")
    result = run("ldm", "encode", runs / "autoencoder", images, "--out", tmp_path / "out", "--latents")
    assert result.status == 0, result.err
    assert b"four\xff.png" in (tmp_path / "out" / "figures.csv").read_bytes()
    assert os.path.exists(os.fsencode(tmp_path / "out" / "reconstructions") + b"/four\xff.png")
    assert "four\ufffd.png" in result.out


def test_verify(images, cli):
    result = cli("verify", images, "--workers", 0)
    assert result.status == 0
    assert result.out == "all 5 images can be read\n"
    (images / "dogs" / "bad.png").write_bytes(b"no image")
    (images / "empty.png").touch()
    result = cli("verify", images, "--workers", 0)
    assert result.status == 1
    lines = result.out.splitlines()
    assert lines[0] == f"{images / 'empty.png'}: empty file"
    assert lines[1].startswith(f"{images / 'dogs' / 'bad.png'}: UnidentifiedImageError")
    assert lines[2] == "2 of 7 images cannot be read"
    result = cli("verify", images / "nowhere")
    assert result.status == 1
    assert "does not exist" in result.err


def test_a_bare_network_is_neither(images, tmp_path, cli):
    described = {"format": "ldm/1", "model": network(), "weights": "raw"}
    run_folder = save_run(tmp_path / "network", described)
    result = cli("encode", run_folder, images, "--out", tmp_path / "out")
    assert result.status == 1
    assert "holds a UNetModel, which is no first stage" in result.err
    result = cli("sample", run_folder, "--out", tmp_path / "out")
    assert result.status == 1
    assert "holds a part of a model (UNetModel), which draws nothing" in result.err
