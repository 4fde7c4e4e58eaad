"""Classes of the user's own in a run, and first stages that other projects trained: train, go on, sample."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import training_runs as T
from PIL import Image
from published_files import lightning_checkpoint, weights_of
from reference_data import ROOT

import ldm
from ldm.checkpoints import native
from ldm.config import ConfigError

MODULE = """
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.unet import UNetModel


class MyUNet(UNetModel):
    pass


class MyAutoencoder(AutoencoderKL):
    pass


def my_sampler(denoise, x, sigmas, *, noise_fn=None, callback=None, share: float = 1.0):
    return share * denoise(x, sigmas[0].expand(len(x)))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Both stages trained with classes of `my_models.py`, which only the commands find."""
    place = tmp_path_factory.mktemp("own")
    (place / "my_models.py").write_text(MODULE)
    images, runs = T.write_images(place / "images"), place / "runs"
    autoencoder = T.autoencoder_config(images, runs)
    autoencoder["model"] = {**T.AUTOENCODER, "target": "my_models.MyAutoencoder"}
    T.write_config(place / "ae.yaml", autoencoder)
    diffusion = T.diffusion_config(images, runs, runs / "ae")
    diffusion["network"] = {**T.NETWORK, "target": "my_models.MyUNet"}
    T.write_config(place / "ldm.yaml", diffusion)
    assert not run(place, "train.py", "ae.yaml", "training.steps=2").returncode
    known = f"first_stage_config={place / 'ae.yaml'}"
    assert not run(place, "train.py", "ldm.yaml", "training.steps=2", known).returncode
    return place


def run(place: Path, *command) -> subprocess.CompletedProcess:
    environment = {"PYTHONPATH": f"{place}:{T.ROOT}", "OMP_NUM_THREADS": "1", "PATH": "", "HOME": str(place)}
    command = [sys.executable, T.ROOT / command[0], *command[1:]]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=120)


def test_a_run_with_own_classes_goes_on(place):
    known = f"first_stage_config={place / 'ae.yaml'}"
    said = run(place, "train.py", "ldm.yaml", "training.steps=3", known)
    assert said.returncode == 0, said.stderr
    assert "at step 2 of 3" in said.stderr


def test_sampling_wants_the_yaml_that_names_them(place):
    refused = run(place, "sample.py", "runs/ldm", "--n", "1", "--out", "refused")
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert "my_models.MyUNet" in refused.stderr and "--config" in refused.stderr
    drawn = run(
        place, "sample.py", "runs/ldm", "--n", "1", "--out", "out", "--config", "runs/ldm/config.yaml"
    )
    assert drawn.returncode == 0, drawn.stderr
    assert len(list((place / "out").glob("0*.png"))) == 1


def test_an_own_sampler_draws_the_grids_and_later_where_the_yaml_names_it(place):
    sampler = ["sampling.sampler=my_models.my_sampler", "sampling.options.share=0.25"]
    known = f"first_stage_config={place / 'ae.yaml'}"
    settings = ["ldm.yaml", "name=sampled", "training.steps=1", "logging.images_every=1", known, *sampler]
    trained = run(place, "train.py", *settings)
    assert trained.returncode == 0, trained.stderr
    assert list((place / "runs" / "sampled" / "images").iterdir())
    command = ("sample.py", "runs/sampled", "--n", "1", "--config", "runs/sampled/config.yaml", "--out")
    drawn = run(place, *command, "own")
    assert drawn.returncode == 0, drawn.stderr
    (image,) = (place / "own").glob("0*.png")
    facts = json.loads(Image.open(image).text["ldm"])
    assert facts["sampler"] == "my_models.my_sampler" and facts["share"] == 0.25
    # The YAML of another run has the classes, but not this sampler.
    other = ("sample.py", "runs/sampled", "--n", "1", "--config", "runs/ldm/config.yaml", "--out", "other")
    refused = run(place, *other)
    assert refused.returncode == 1 and "my_models.my_sampler is code outside ldm" in refused.stderr
    assert run(place, *other, "--sampler", "my_models.my_sampler").returncode == 0


def test_a_first_stage_with_own_classes_is_not_believed_by_itself(place):
    refused = run(place, "train.py", "ldm.yaml", "name=other")
    assert refused.returncode == 1 and "my_models.MyAutoencoder" in refused.stderr
    assert not (place / "runs" / "other").exists()


def test_another_run_may_start_from_one_with_own_classes(place):
    known = f"first_stage_config={place / 'ae.yaml'}"
    said = run(place, "train.py", "ldm.yaml", "name=tuned", "init_from=runs/ldm", "training.steps=1", known)
    assert said.returncode == 0, said.stderr


def test_a_yaml_trusts_only_what_it_names(place, tmp_path):
    other = T.diffusion_config(place / "images", place / "runs", None)
    path = T.write_config(tmp_path / "other.yaml", other)
    for model in (place / "runs" / "ldm", place / "runs" / "ae" / native.MODEL_FILE):
        with pytest.raises(ConfigError, match="outside ldm"):
            ldm.load(model, config=path)


def test_a_model_with_own_classes_in_python(place, monkeypatch):
    monkeypatch.syspath_prepend(str(place))
    model = ldm.load(place / "runs" / "ldm", config=place / "runs" / "ldm" / "config.yaml")
    assert type(model.network).__name__ == "MyUNet"
    assert type(model.first_stage_model).__name__ == "MyAutoencoder"


def test_a_published_autoencoder_is_a_first_stage(place):
    """With the original project's YAML, unchanged; the run then goes on from its own copy."""
    folder = "compvis-autoencoder-kl"
    weights = lightning_checkpoint(place / "published.ckpt", weights_of(folder))
    wide = ["network.params.in_channels=4", "network.params.out_channels=4", "data.params.size=32"]
    plain = ["network.target=ldm.models.unet.UNetModel", "name=published", f"first_stage={weights}"]
    settings = [*plain, *wide, f"first_stage_config={ROOT / folder / 'config.yaml'}"]
    for steps in (1, 2):
        said = run(place, "train.py", "ldm.yaml", *settings, f"training.steps={steps}")
        assert said.returncode == 0, said.stderr
        Path(weights).unlink(missing_ok=True)
    model = ldm.load(place / "runs" / "published")
    assert model.latent_shape == (4, 8, 8)
    first_stage = model.first_stage_model.state_dict()
    for name, value in weights_of(folder).items():
        assert first_stage[name].equal(value)
