"""`sample.py`: what is drawn depends on the request alone, and every mistake is told in its own terms."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import ROOT, cli, environment, run
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_runs import CLASSES, EPS, class_embedder, description, first_stage_description, save_run

import ldm
from ldm.cli import results
from ldm.cli.machine import lasting_interruption
from ldm.cli.output import npz_file, prepare_folder, write_png
from ldm.cli.wanted import choose, choose_labels, parse_classes, safe_name
from ldm.diffusion.samplers import SAMPLERS
from ldm.files import CannotWrite, whole_file
from ldm.sampling import Sampling, draw
from ldm.sampling.images import group_size
from ldm.sampling.spacing import sampling_sigmas

__all__ = ["cli"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    save_run(folder / "flow", description(), checkpoint=True)
    save_run(folder / "eps", description(EPS))
    save_run(folder / "eps-unconditional", description(EPS, conditional=False))
    save_run(folder / "autoencoder", first_stage_description())
    return folder


def pngs(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[0-9]*.png"))}


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def facts(path) -> dict:
    return json.loads(Image.open(path).text["ldm"])


# What is written


def test_a_real_process(runs, tmp_path):
    result = run("sample.py", runs / "flow", "--n", 4, "--npz", "--out", "out", cwd=tmp_path)
    assert result.status == 0, result.err
    assert result.out == "4 images in out, all on one sheet: out/grid.png\n"
    assert "sampling: 100%" in result.err
    out = tmp_path / "out"
    names = [
        "00000-cat.png",
        "00001-dog.png",
        "00002-red_fox.png",
        "00003-cat.png",
        "grid.png",
        "samples.npz",
    ]
    assert sorted(os.listdir(out)) == names
    images = [pixels(out / name) for name in names[:4]]
    assert {image.shape for image in images} == {(16, 16, 3)}
    assert all(image.std() > 1 for image in images)
    assert not np.array_equal(images[0], images[3])
    with np.load(out / "samples.npz") as archive:
        assert archive["arr_0"].dtype == np.uint8
        assert np.array_equal(archive["arr_0"], np.stack(images))
        assert archive["arr_1"].tolist() == [0, 1, 2, 0]
    assert facts(out / names[2]) == {
        "index": 2,
        "class": "red fox",
        "seed": 0,
        "sampler": "euler",
        "steps": 2,
        "guidance": 2.0,
        "model": str(runs / "flow"),
        "weights": "ema",
        "step": 2,
        "ldm": ldm.__version__,
    }


def test_sheet_shows_the_images(runs, tmp_path, cli):
    assert cli("sample", runs / "flow", "--classes", "dog,cat", "--n", 3, "--out", tmp_path).status == 0
    sheet = pixels(tmp_path / "grid.png")
    assert sheet.shape == (2 * 66 + 2, 3 * 66 + 2, 3)  # a row a class; 16 pixels enlarged to 64
    for i, path in enumerate(sorted(tmp_path.glob("0*.png"))):
        top, left = 2 + (i // 3) * 66, 2 + (i % 3) * 66
        assert np.array_equal(sheet[top : top + 64 : 4, left : left + 64 : 4], pixels(path))


def test_one_image(runs, tmp_path, cli):
    result = cli("sample", runs / "eps-unconditional", "--n", 1, "--out", tmp_path / "a" / "b", "--no-grid")
    assert result.out == f"1 image: {tmp_path / 'a' / 'b' / '00000.png'}\n"
    assert os.listdir(tmp_path / "a" / "b") == ["00000.png"]
    assert "class" not in facts(tmp_path / "a" / "b" / "00000.png")


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("model", ["flow", "eps", "eps-unconditional"])
def test_every_sampler_on_every_model(runs, tmp_path, cli, model, sampler):
    result = cli("sample", runs / model, "--n", 2, "--sampler", sampler, "--steps", 4, "--out", tmp_path)
    assert result.status == 0, result.err
    assert len(pngs(tmp_path)) == 2


def test_only_the_first_images_of_many_are_on_the_sheet(runs, tmp_path, cli, monkeypatch):
    monkeypatch.setattr(results, "_GRID_MOST", 4)
    result = cli("sample", runs / "flow", "--n", 9, "--out", tmp_path, "--steps", 1)
    assert "9 images in" in result.out
    assert "the first 4 on one sheet" in result.out
    assert Image.open(tmp_path / "grid.png").size == (2 * 66 + 2, 2 * 66 + 2)
    monkeypatch.setattr(results, "_GRID_PIXELS", 3 * 16 * 16)
    result = cli("sample", runs / "flow", "--n", 9, "--out", tmp_path, "--steps", 1, "--overwrite")
    assert "the first 3 on one sheet" in result.out


# Image i depends on (seed, i) alone


@pytest.mark.parametrize("model", ["flow", "eps"])
def test_batch_size_and_number_change_no_bit(runs, tmp_path, cli, model):
    def draw_with(name, *options):
        fixed = ("--sampler", "ddpm", "--steps", 3, "--out", tmp_path / name)
        assert cli("sample", runs / model, *fixed, *options).status == 0
        return pngs(tmp_path / name)

    whole = draw_with("a", "--n", 20, "--batch-size", 64)
    assert len(whole) == 20
    assert draw_with("b", "--n", 20, "--batch-size", 1) == whole
    assert draw_with("c", "--n", 20, "--batch-size", 3) == whole
    few = draw_with("d", "--n", 7)
    assert few == {name: whole[name] for name in few}
    assert draw_with("e", "--n", 7, "--seed", 1).keys() == few.keys()
    assert not set(draw_with("f", "--n", 7, "--seed", 2).values()) & set(whole.values())
    alike = draw_with("g", "--classes", "cat", "--n", 40)
    assert len({pixels(tmp_path / "g" / name).tobytes() for name in alike}) == 40  # also beyond one group


def test_batch_sizes_in_real_processes(runs, tmp_path):
    """One of them with remarks to make, each of which is one line."""
    (tmp_path / "64").mkdir()
    (tmp_path / "64" / "00007-cat.png").write_bytes(b"kept")
    options = ("--n", 5, "--sampler", "ddim", "--spacing", "uniform", "--steps", 30)
    drawn = {}
    for size in (1, 64):
        result = run("sample.py", runs / "eps", *options, "--batch-size", size, "--out", tmp_path / str(size))
        assert result.status == 0, result.err
        drawn[size] = pngs(tmp_path / str(size))
    assert drawn[64].pop("00007-cat.png") == b"kept"
    assert len(drawn[1]) == 5
    assert drawn[1] == drawn[64]
    assert "also holds 1 images of another request, such as 00007-cat.png\n" in result.err
    assert "warning: uniform spacing gives 31 steps for 30 asked; trailing gives 30\n" in result.err
    assert "UserWarning" not in result.err


class Sensitive(torch.nn.Module):
    """A network that rounds, grossly, by the shape of its batch and the place in it."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, z, t, context=None, y=None):
        place = torch.arange(len(z)).view(-1, 1, 1, 1) / 100
        return self.network(z, t, context=context, y=y) + place + len(z) / 1000


def test_exactness_does_not_rest_on_luck(runs):
    model = ldm.load(runs / "flow")
    model.model.diffusion_model = Sensitive(model.network)

    def drawn(n, batch_size, exact=None):
        batch = choose(model, n).batch
        return torch.cat(list(draw(model, n, batch, batch_size=batch_size, exact=exact)))

    whole = drawn(20, 64)
    assert len(whole) == 20
    for n, batch_size in ((20, 1), (20, 3), (7, 64), (1, 1), (17, 5)):
        assert torch.equal(drawn(n, batch_size), whole[:n])
    assert not torch.equal(drawn(20, 3, exact=False), whole)  # the network is indeed sensitive
    assert torch.equal(drawn(20, 16, exact=False)[:16], whole[:16]) == (group_size(model) == 16)


def test_without_exact_only_rounding_changes(runs):
    model = ldm.load(runs / "eps")
    drawn = [
        torch.cat(list(draw(model, 6, choose(model, 6).batch, batch_size=size, exact=exact)))
        for size, exact in ((1, False), (4, False), (64, True))
    ]
    for other in drawn[1:]:
        assert torch.allclose(drawn[0], other, atol=1e-4)


def test_groups_follow_the_cost_of_the_network(runs):
    model = ldm.load(runs / "flow")
    assert group_size(model) == 16
    model.latent_shape = (3, 64, 64)
    medium = group_size(model)
    model.latent_shape = (3, 512, 512)
    assert 16 > medium > group_size(model) == 1


def test_classes_do_not_change_the_noise(runs, tmp_path, cli):
    """Image i of another class starts from the same noise: with guidance 0, no class, it is the same."""
    for guidance in (0, 1):
        for name in ("cat", "dog"):
            fixed = ("--n", 2, "--guidance", guidance, "--out", tmp_path / str(guidance))
            assert cli("sample", runs / "flow", "--classes", name, "--no-grid", *fixed).status == 0
    for i in range(2):
        for guidance, same in (("0", True), ("1", False)):
            a, b = (pixels(tmp_path / guidance / f"0000{i}-{name}.png") for name in ("cat", "dog"))
            assert np.array_equal(a, b) == same


# Settings


def test_request_goes_before_the_models_own(runs):
    model = ldm.load(runs / "eps")
    model.description.sampling = {
        "sampler": "ddim",
        "steps": 7,
        "guidance": 3.0,
        "eta": 0.5,
        "spacing": "quad",
    }
    own = Sampling.of(model)
    assert own.facts() == model.description["sampling"] and own.shift is None
    assert Sampling.of(model, steps=9, guidance=0.0) == replace(own, steps=9, guidance=0.0)
    # Noise and spacing were meant for the model's own sampler.
    other = Sampling.of(model, "heun")
    assert other == replace(own, sampler="heun", options={}, spacing=None)
    assert Sampling.of(model, sampler="ddim") == own
    model.description.sampling = None
    assert Sampling.of(model).steps == 30


def test_settings_reach_the_sampler(runs, tmp_path, cli):
    def drawn(*options):
        name = str(len(list(tmp_path.iterdir())))
        result = cli("sample", runs / "eps", "--n", 1, "--out", tmp_path / name, *options)
        assert result.status == 0, result.err
        return pixels(tmp_path / name / "00000-cat.png").tobytes()

    plain = drawn("--steps", 6)
    assert plain == drawn("--steps", 6, "--sampler", "euler", "--spacing", "linspace", "--seed", 0, "--ema")
    assert plain == drawn("--steps", 6, "--sampler", "ddim", "--eta", 0)
    noisy = ("--steps", 6, "--sampler", "ddim")
    assert drawn(*noisy, "--eta", 0.5) == drawn(*noisy, "--option", "eta=0.5")
    changes = (
        ("--steps", 5),
        ("--steps", 6, "--guidance", 1),
        ("--steps", 6, "--sampler", "ddim", "--eta", 1),
        ("--steps", 6, "--sampler", "ddpm", "--option", "variance=large"),
        ("--steps", 6, "--spacing", "karras"),
        ("--steps", 6, "--seed", 1),
    )
    others = [drawn(*change) for change in changes]
    assert plain not in others
    assert len(set(others)) == len(others)


def test_python_draws_the_same_images(runs, tmp_path, cli):
    result = cli("sample", runs / "flow", "--n", 20, "--seed", 3, "--sampler", "ddpm", "--out", tmp_path)
    assert result.status == 0, result.err
    labels = torch.arange(20) % len(CLASSES)
    batches = ldm.draw(ldm.load(runs / "flow"), conditions={"label": labels}, seed=3, sampler="ddpm")
    drawn = np.concatenate([results.to_uint8(images) for images in batches])
    assert np.array_equal(drawn, [pixels(path) for path in sorted(tmp_path.glob("0*.png"))])


def test_averaged_and_raw_weights(runs, tmp_path, cli):
    file, checkpoint = (
        runs / "flow" / "model.safetensors",
        runs / "flow" / "checkpoints" / "step-00000002.ckpt",
    )
    drawn = {}
    for name, source, option in (
        ("run", runs / "flow", "--ema"),
        ("file", file, "--ema"),
        ("checkpoint", checkpoint, "--ema"),
        ("raw", runs / "flow", "--no-ema"),
        ("raw checkpoint", checkpoint, "--no-ema"),
    ):
        assert cli("sample", source, option, "--n", 1, "--out", tmp_path / name).status == 0
        drawn[name] = pixels(tmp_path / name / "00000-cat.png").tobytes()
    assert drawn["run"] == drawn["file"] == drawn["checkpoint"]
    assert drawn["raw"] == drawn["raw checkpoint"] != drawn["run"]
    assert facts(tmp_path / "raw" / "00000-cat.png")["weights"] == "raw"
    result = cli("sample", file, "--no-ema", "--out", tmp_path / "x")
    assert result.status == 1
    assert str(checkpoint) in result.err


def test_half_precision(runs, tmp_path, cli):
    for precision in ("32", "bf16"):
        result = cli(
            "sample", runs / "flow", "--n", 1, "--precision", precision, "--out", tmp_path / precision
        )
        assert result.status == 0, result.err
    a, b = (pixels(tmp_path / p / "00000-cat.png").astype(int) for p in ("32", "bf16"))
    assert 0 < abs(a - b).max() < 30


# Mistakes


@pytest.mark.parametrize(
    ("model", "options", "status", "message"),
    [
        ("flwo", (), 1, "flwo does not exist.* Did you mean .*flow"),
        ("", (), 1, "is no run folder itself, but holds these: autoencoder, eps, eps-unconditional, flow"),
        ("flow/checkpoints", (), 1, "but a part of one; give .*flow, or a file"),
        ("autoencoder", (), 1, "holds a first stage .AutoencoderKL.*ldm encode"),
        (
            "flow",
            ("--classes", "cta"),
            1,
            "no class 'cta'. Did you mean 'cat'. Classes: cat, dog, red fox; .*0-2",
        ),
        ("flow", ("--classes", "3"), 1, "no class '3'"),
        ("flow", ("--classes", ","), 1, "names no class"),
        ("eps-unconditional", ("--classes", "0"), 1, "not conditioned on classes"),
        ("eps-unconditional", ("--guidance", "2"), 1, "nothing to guide towards"),
        ("flow", ("--guidance", "nan"), 1, "no finite number"),
        (
            "flow",
            ("--sampler", "eulr"),
            1,
            "'eulr' is unknown; there are ddpm, ddim, plms, euler, heun, dpmpp_2m",
        ),
        ("flow", ("--eta", "0.5"), 1, "eta belongs to the ddim sampler, not to euler, which takes no opt"),
        ("flow", ("--sampler", "ddim", "--eta", "2"), 1, "eta must be in .0, 1., got 2"),
        ("flow", ("--sampler", "ddim", "--option", "etta=1"), 1, "etta is no option of ddim, .* mean eta"),
        (
            "flow",
            ("--sampler", "ddim", "--option", "eta=no"),
            1,
            "eta of the .* ddim: expected float, got F",
        ),
        ("flow", ("--option", "eta"), 2, "--option eta: must be NAME=VALUE"),
        ("flow", ("--option", "eta=[1"), 2, "--option eta=.1: a value is not YAML"),
        ("flow", ("--sampler", "no_such.sampler"), 1, "cannot import no_such"),
        ("flow", ("--spacing", "karras"), 1, "spacing is 'karras', must be one of uniform"),
        (
            "eps",
            ("--spacing", "krras"),
            1,
            "must be one of uniform, quad, trailing, leading, linspace, .*karras",
        ),
        ("eps", ("--steps", "1001"), 1, "from 1 to the schedule's 1000 timesteps"),
        ("flow", ("--device", "tpu"), 1, "--device tpu is none of auto, cpu, cuda"),
        ("flow", ("--device", "meta"), 1, "--device meta is none of auto, cpu"),
        ("flow", ("--precision", "8"), 1, "--precision 8 is unknown; there are auto, 32, bf16, fp16"),
        ("flow", ("--steps", "many"), 2, "Invalid value for '--steps': must be a whole number, got 'many'"),
        ("flow", ("--n", "0"), 2, "Invalid value for '--n': must be at least 1, got '0'"),
        ("flow", ("--shift", "0"), 1, "shift must be a finite number above 0"),
        ("eps", ("--shift", "2"), 1, "shift 2 belongs to flow models"),
        ("flow", ("--seed", "-1"), 2, "--seed"),
        ("flow", ("--batch-size", "0"), 2, "--batch-size"),
        ("flow", ("--smapler", "ddim"), 2, "--sampler"),
    ],
)
def test_mistakes(runs, tmp_path, cli, model, options, status, message):
    out = tmp_path / "out"
    result = cli("sample", runs / model, *options, "--out", out)
    assert result.status == status
    assert result.out == ""
    text = " ".join(result.err.replace("│", " ").split())
    assert re.search(message, text), text
    assert "Traceback" not in result.err
    assert not out.exists()  # found out before anything was made


def test_no_gpu_here(runs, tmp_path, cli):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "torch sees 0 GPUs here" in cli("sample", runs / "flow", "--device", "cuda", "--out", tmp_path).err


def test_guidance_of_a_model_that_never_dropped_its_classes(tmp_path, cli):
    described = description()
    described["model"]["params"]["conditioner"]["params"]["embedders"] = [class_embedder(drop=0.0)]
    run_folder = save_run(tmp_path / "run", described)
    result = cli("sample", run_folder, "--n", 1, "--out", tmp_path / "out")
    assert result.status == 1
    assert "drop is 0 in its conditioner); say --guidance 1" in result.err
    assert cli("sample", run_folder, "--n", 1, "--guidance", 1, "--out", tmp_path / "out").status == 0


def test_images_that_are_not_numbers(tmp_path, cli):
    run_folder = save_run(tmp_path / "run", description())
    model = ldm.load(run_folder)
    with torch.no_grad():
        model.latent_shift.fill_(3e38)  # finite in the file, not beyond
    from ldm.checkpoints import native

    native.save_model(run_folder / "model.safetensors", model.state_dict(), model.description)
    result = cli("sample", run_folder, "--n", 2, "--out", tmp_path / "out")
    assert result.status == 1
    assert "images 0 to 1 are not finite" in result.err
    assert pngs(tmp_path / "out") == {}


def test_a_bug_keeps_its_traceback(runs, tmp_path, cli, monkeypatch):
    def broken(*args, **kwargs):
        raise KeyError("bug")

    monkeypatch.setattr(results, "to_uint8", broken)
    with pytest.raises(KeyError, match="bug"):
        cli("sample", runs / "flow", "--out", tmp_path / "a")
    # A ValueError from inside torch was not written for the user either.
    monkeypatch.setattr(results, "to_uint8", lambda images: torch.distributions.Normal(0.0, -1.0))
    with pytest.raises(ValueError, match="constraint"):
        cli("sample", runs / "flow", "--out", tmp_path / "b")


def test_verbose_shows_the_traceback_of_a_mistake(runs, tmp_path, cli):
    with pytest.raises(ValueError, match="unknown"):
        cli("sample", runs / "flow", "--sampler", "x", "--verbose", "--out", tmp_path)


def test_shift_moves_the_steps_of_a_flow_model(runs, tmp_path, cli):
    model = ldm.load(runs / "flow")
    sigmas = sampling_sigmas(model.denoiser, 4, shift=3.0)
    t = torch.linspace(1, 0, 5, dtype=torch.float64)
    moved = 3 * t / (1 + 2 * t)  # SD3, eq. 23
    torch.testing.assert_close(sigmas[1:], (moved / (1 - moved))[1:])
    assert torch.equal(sampling_sigmas(model.denoiser, 4), sampling_sigmas(model.denoiser, 4, shift=1.0))

    drawn = {}
    for shift in ((), ("--shift", 1), ("--shift", 3)):
        out = tmp_path / str(len(drawn))
        assert cli("sample", runs / "flow", "--n", 1, "--steps", 4, "--out", out, *shift).status == 0
        drawn[shift] = pixels(out / "00000-cat.png").tobytes()
    assert drawn[()] == drawn["--shift", 1] != drawn["--shift", 3]
    assert facts(out / "00000-cat.png")["shift"] == 3
    model.description["sampling"]["shift"] = 3.0
    assert Sampling.of(model, steps=4).shift == 3 and Sampling.of(model, shift=1.0).shift == 1


# Files


def test_nothing_is_overwritten_unasked(runs, tmp_path, cli):
    assert cli("sample", runs / "flow", "--n", 2, "--out", tmp_path).status == 0
    (tmp_path / "00001-dog.png").unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    result = cli("sample", runs / "flow", "--n", 2, "--seed", 5, "--out", tmp_path)
    assert result.status == 1
    assert "00000-cat.png and 1 more would be overwritten" in result.err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert cli("sample", runs / "flow", "--n", 2, "--seed", 5, "--out", tmp_path, "--overwrite").status == 0
    assert (tmp_path / "00000-cat.png").read_bytes() != before["00000-cat.png"]
    assert len(pngs(tmp_path)) == 2


def test_out_must_be_a_folder(runs, tmp_path, cli):
    (tmp_path / "file").write_text("here")
    result = cli("sample", runs / "flow", "--out", tmp_path / "file", "--overwrite")
    assert result.status == 1
    assert f"--out {tmp_path / 'file'} is a file; give a folder" in result.err
    result = cli("sample", runs / "flow", "--out", tmp_path / "file" / "below")
    assert result.status == 1
    assert "Not a directory" in result.err
    (tmp_path / "out" / "grid.png").mkdir(parents=True)
    assert "is a folder" in cli("sample", runs / "flow", "--out", tmp_path / "out", "--overwrite").err


@pytest.mark.skipif(os.name != "posix", reason="needs limits of the system")
def test_full_disk(runs, tmp_path):
    """A file may have 10000 bytes: that holds each PNG, not all images together."""
    script = (
        "import resource, sys; from ldm.cli import run_verb;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10000, resource.RLIM_INFINITY));"
        f"run_verb('sample', ['{runs / 'flow'}', '--n', '40', '--npz', '--out', 'out',"
        "'--no-exact', '--batch-size', '2'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment()
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written and all(re.fullmatch(r"0.*[.]png", name) for name in written)
    said = done.stderr.splitlines()[-1]
    assert said == (
        "error: cannot write out/samples.npz (File too large); free some space, and give the same command "
        f"again. {len(written)} of 40 images are in out, each of them whole. --overwrite replaces them"
    )


def test_errors_of_writing_name_the_file(tmp_path, monkeypatch):
    def fails(number, name=None):
        def opened(*args, **kwargs):
            raise OSError(number, os.strerror(number), name)

        return opened

    target = tmp_path / "a.png"
    unique = "0" * 32
    monkeypatch.setattr("ldm.files.uuid.uuid4", lambda: SimpleNamespace(hex=unique))
    for number, remedy in ((errno.EROFS, "choose another folder"), (errno.ENOSPC, "free some space")):
        with monkeypatch.context() as patched:
            patched.setattr("builtins.open", fails(number, str(tmp_path / f".a.png.{unique[:12]}.partial")))
            with pytest.raises(
                CannotWrite, match=rf"cannot write .*/a.png \({os.strerror(number)}\); {remedy}"
            ):
                write_png(target, np.zeros((2, 2), np.uint8))
    with pytest.raises(FileNotFoundError, match="elsewhere"), whole_file(target):  # no matter of this file
        (tmp_path / "elsewhere").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.mkdir", fails(errno.EROFS))
        with pytest.raises(CannotWrite, match="--out .*new .Read-only file system.; choose another --out"):
            prepare_folder(tmp_path / "new", ["a"], False)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interruption_in_a_destructor_is_not_lost():
    class Dropped:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), lasting_interruption() as interrupted:
        Dropped()  # Python reports what is raised here, and goes on
        interrupted()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interruption_leaves_whole_images(runs, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "sample.py"),
            str(runs / "eps"),
            "--n",
            "100000",
            "--npz",
            "--out",
            str(out),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    deadline = time.time() + 60
    while len(list(out.glob("0*.png")) if out.exists() else []) < 20:
        assert process.poll() is None
        assert time.time() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stdout == ""
    files = sorted(os.listdir(out))
    assert f"stopped: {len(files)} of 100000 images are in {out}, each of them whole" in stderr
    assert "Traceback" not in stderr
    assert "Exception ignored" not in stderr
    for i, name in enumerate(files):  # no grid, no archive, nothing partial
        assert name.startswith(f"{i:05d}-")
        assert pixels(out / name).shape == (16, 16, 3)


def test_sampling_needs_no_lightning(runs, tmp_path):
    code = """if True:
        import sys
        from ldm.cli import run_verb
        try:
            run_verb("sample", sys.argv[1:])
        except SystemExit as end:
            assert not end.code
        heavy = ("pytorch_lightning", "lightning", "ldm.training", "tensorboard", "torchvision")
        print([name for name in heavy if name in sys.modules])
    """
    done = subprocess.run(
        [sys.executable, "-c", code, str(runs / "flow"), "--n", "1", "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


# The parts


NAMES = ["cat", "dog", "red fox"]


@pytest.mark.parametrize(
    ("text", "names", "labels"),
    [
        ("cat,dog", NAMES, [0, 1]),
        (" dog , cat ", NAMES, [1, 0]),
        ("2,0-1,cat", NAMES, [2, 0, 1, 0]),
        ("0-2", NAMES, [0, 1, 2]),
        ("1 - 2,", NAMES, [1, 2]),
        ("red fox", NAMES, [2]),
        ("0-9", [str(i) for i in range(10)], list(range(10))),
        # Names that are numbers: a number is a name, in ranges too.
        ("1,10", ["1", "10", "2"], [0, 1]),
        ("1-2", ["1", "10", "2"], [0, 2]),
        ("007", ["007", "008"], [0]),
        ("7", ["007", "008"], [0]),
        ("0-1", ["0-1", "b"], [0]),
        ("crane, bird,crane", ["crane", "crane, bird"], [1, 0]),
    ],
)
def test_lists_of_classes(text, names, labels):
    assert parse_classes(text, names) == labels


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        ("3", NAMES, "no class '3'"),
        ("-1", NAMES, "no class '-1'"),
        ("1-3", NAMES, "no class '3'"),
        ("0-99999999999999999999", NAMES, "no class '9999"),
        ("2-1", NAMES, "upwards, 1-2"),
        ("²", NAMES, "no class '²'"),
        ("1-5", ["1", "3", "5"], "no class '2'"),
        ("0", ["1", "3", "5"], "no class '0'.* Classes: 1, 3, 5$"),
        ("Cat", NAMES, "Did you mean 'cat'"),
        ("x", [f"n{i}" for i in range(1000)], r"n29, ... \(1000 in all\); or by number, 0-999"),
        ("", NAMES, "names no class"),
    ],
)
def test_lists_that_name_no_class(text, names, message):
    with pytest.raises(ValueError, match=message):
        parse_classes(text, names)


@given(
    st.lists(st.text(min_size=1, max_size=6).map(str.strip).filter(bool), min_size=1, max_size=6, unique=True)
)
def test_every_name_is_found(names):
    for i, name in enumerate(names):
        if name.strip(",") == name:  # commas at the ends end a name
            assert parse_classes(name, names) == [i]


@given(st.text(max_size=300))
def test_safe_names_are_safe(name):
    safe = safe_name(name)
    assert 0 < len(safe.encode()) <= 200
    assert not set(safe) & set('/\\:*?"<>|\0\n .')


def test_names_of_classes_that_are_unknown(runs):
    model = ldm.load(runs / "flow")
    model.description.classes = None
    assert choose_labels(model, "0,2", 1) == [0, 2]
    model.description.classes = CLASSES[:2]
    assert choose_labels(model, "dog,2", 1) == [1, 2]
    model.description.classes = [*CLASSES, "bird"]
    with pytest.raises(ValueError, match="names 4 classes, but was built for 3"):
        choose_labels(model, None, 1)


def test_other_conditions_are_not_guessed(runs):
    model = ldm.load(runs / "flow")
    model.conditioner.embedders[0].key = "caption"
    with pytest.raises(ValueError, match="this model reads caption, which no words can give"):
        choose(model, 2)


def test_unknown_settings_of_the_model(runs):
    model = ldm.load(runs / "flow")
    model.description.sampling = {"sampler": "euler", "sigma_max": 80}
    with pytest.raises(ValueError, match="sampling.sigma_max: unknown"):
        Sampling.of(model)


def test_archive_keeps_nothing_in_memory(tmp_path):
    batch = np.zeros((100, 100, 100), dtype=np.uint8)
    with npz_file(tmp_path / "a", 500) as add:
        for count in range(1, 6):
            add(batch)
            (partial,) = tmp_path.glob(".a.*.partial")
            assert partial.stat().st_size >= (count - 1) * batch.nbytes
    with np.load(tmp_path / "a") as loaded:
        assert loaded["arr_0"].shape == (500, 100, 100, 1)
        assert loaded.files == ["arr_0"]


def test_archive_is_written_as_it_comes_and_is_the_same_bytes(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (10, 6, 5), dtype=np.uint8)
    for name, size in (("a", 3), ("b", 10)):
        with npz_file(tmp_path / name, 10, list(range(10))) as add:
            for start in range(0, 10, size):
                add(images[start : start + size])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with np.load(tmp_path / "a") as loaded:
        assert np.array_equal(loaded["arr_0"], images[..., None])
        assert loaded["arr_1"].tolist() == list(range(10))
    with pytest.raises(RuntimeError, match="3 of 4"), npz_file(tmp_path / "c", 4) as add:
        add(images[:3])
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_images_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    write_png(tmp_path / "a.png", np.zeros((4, 4), np.uint8), {"class": "Füchse 狐"})
    assert facts(tmp_path / "a.png") == {"class": "Füchse 狐"}
    before = (tmp_path / "a.png").read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_png(tmp_path / "a.png", np.ones((4, 4), np.uint8))
    assert (tmp_path / "a.png").read_bytes() == before
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_folder_is_made_only_when_all_is_well(tmp_path):
    prepare_folder(tmp_path / "a" / "b", ["x"], overwrite=False)
    (tmp_path / "a" / "b" / "x").write_text("")
    with pytest.raises(FileExistsError, match=r"b/x would be overwritten"):
        prepare_folder(tmp_path / "a" / "b", ["x", "y"], overwrite=False)
    prepare_folder(tmp_path / "a" / "b", ["x", "y"], overwrite=True)


def test_nobody_reads_the_output(runs, tmp_path):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, str(ROOT / "sample.py"), str(runs / "flow"), "--n", "1", "--out", str(tmp_path)],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        check=False,
    )
    os.close(write)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert len(pngs(tmp_path)) == 1
