"""The classifier task: gradients, figures, the same bits after a kill, and what its network is for."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
import training_runs as T
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import default_collate

import ldm
from ldm.checkpoints import native
from ldm.data.images.grid import image_grid
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import ClassifierGuidance
from ldm.diffusion.random import subseed
from ldm.diffusion.schedule import FlowSchedule
from ldm.latent_diffusion import LatentDiffusion
from ldm.models import vit
from ldm.models.autoencoder import IdentityFirstStage
from ldm.models.dit import DiT, DiTBlock
from ldm.models.unet import UNetModel
from ldm.training import method as method_module
from ldm.training.augmentation import AugmentSettings, moved
from ldm.training.networks import BLOCKS, compile_blocks

VIT = {
    "target": "ldm.models.vit.VisionTransformer",
    "params": {
        "img_size": T.SIZE,
        "patch_size": 4,
        "embed_dim": 12,
        "depth": 2,
        "num_heads": 3,
        "num_classes": "auto",
        "drop_rate": 0.1,
        "attn_drop_rate": 0.1,
        "drop_path_rate": 0.2,
    },
}


def classifier_config(place: Path, name: str = "cls", **changes) -> dict:
    data = {"root": str(place / "images"), "size": T.SIZE, "validation": 0.2, "flip": True}
    return {
        "task": "classifier",
        "name": name,
        "runs": str(place / "runs"),
        "data": {"target": "ldm.data.ImageFolder", "params": data},
        "model": VIT,
        "label_smoothing": 0.1,
        "augment": {"rotate": 15, "scale": 0.1, "shift": 0.1},
        "training": T.TRAINING,
        "logging": T.LOGGING,
        **changes,
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Images of two classes, a config, and one uninterrupted run of it."""
    place = tmp_path_factory.mktemp("classifier")
    T.write_images(place / "images")
    T.write_config(place / "cls.yaml", classifier_config(place))
    T.finish(place / "cls.yaml", log=place / "log")
    return place


def stage_of(place: Path, **changes):
    path = T.write_config(place / "config.yaml", classifier_config(place, **changes))
    return T.build_method(path)


def with_model(**params) -> dict:
    return {"model": {**VIT, "params": {**VIT["params"], **params}}}


def stepping(stage):
    """The stage's task in training mode, with just enough of a trainer to step."""
    task = stage.train()
    task.kept = T.attach(task)  # the module holds its trainer by a weak reference alone
    return task


def batch_of(stage, size: int = 8) -> dict:
    return default_collate([stage.train_set[(i % len(stage.train_set), i)] for i in range(size)])


# A run


def test_a_run_says_what_it_is_and_loads_alone(place):
    run = place / "runs" / "cls"
    model = ldm.load(run)
    assert type(model) is vit.VisionTransformer and not model.training
    assert model.description["classes"] == ["cat", "dog"] and model.num_classes == 2
    assert model.description["model"]["params"]["num_classes"] == 2  # what auto became
    assert model(torch.zeros(3, 3, T.SIZE, T.SIZE)).shape == (3, 2)
    figures = T.rows(run, "validation")
    assert [row["step"] for row in figures] == ["10", "20", "24"] and {"loss", "accuracy"} <= set(figures[0])
    assert {p.name for p in (run / "images").iterdir()} == {
        f"mistakes-{step:08d}.png" for step in (10, 20, 24)
    }
    assert T.leftovers(run) == []


def test_killed_and_started_again_it_ends_in_the_same_bits(place):
    name = "cls-killed"
    log, again = place / "log", (place / "cls.yaml", f"name={name}")
    dying = T.start(*again, log=log, die_at=("os.rename", "step-00000015.ckpt"))
    assert dying.wait() == -signal.SIGKILL, dying.output
    assert T.steps_saved(place / "runs" / name)[-1] == 10
    T.finish(*again, log=log)
    assert T.run_differences(place / "runs" / "cls", place / "runs" / name) == []
    assert T.leftovers(place / "runs" / name) == []
    # It would have noticed: another seed drops and moves otherwise.
    T.finish(place / "cls.yaml", "name=cls-seed", "seed=1", log=log)
    assert "logs/train.csv" in T.run_differences(place / "runs" / "cls", place / "runs" / "cls-seed")


def test_it_starts_from_the_weights_of_a_run(place):
    run = place / "runs" / "cls"
    model = stage_of(place, init_from=str(run)).model
    assert T.differences(dict(model.state_dict()), dict(ldm.load(run).state_dict())) == []


def test_it_learns_to_tell_two_classes(place, tmp_path):
    """Bright images from dark ones: nothing that a transformer could miss in sixty steps."""
    for name, value in (("bright", 200), ("dark", 60)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (T.SIZE, T.SIZE), (value + i,) * 3).save(tmp_path / "images" / name / f"{i}.png")
    training = {**T.TRAINING, "steps": 60, "ema": None, "checkpoint_every": 60}
    stage = stage_of(tmp_path, training=training, augment={}, label_smoothing=0.0)
    task = stepping(stage)
    batch = batch_of(stage, 16)
    for _ in range(60):
        task.training_step(batch, 0)
    task.eval()
    held_out = default_collate([stage.validation_set[i] for i in range(len(stage.validation_set))])
    assert task.validate(held_out)["accuracy"].mean() == 1


# A step


@pytest.mark.parametrize("params", [{}, {"distilled": True}, {"representation_size": 7}])
def test_every_parameter_receives_a_gradient(place, params, monkeypatch):
    stage = stage_of(place, **with_model(drop_rate=0.0, drop_path_rate=0.0, **params))
    task = stepping(stage)
    gradients = {}

    def spy(optimizer, norm, step):
        gradients.update({name: p.grad.abs().max() for name, p in task.model.named_parameters()})

    monkeypatch.setattr(method_module, "guarded_step", spy)
    task.training_step(batch_of(stage), 0)
    assert set(gradients) == {name for name, _ in task.model.named_parameters()}
    assert all(size > 0 for size in gradients.values())


def test_accumulation_is_the_mean_of_the_parts(place, monkeypatch):
    found = []
    for accumulate in (1, 4):
        quiet = with_model(drop_rate=0.0, attn_drop_rate=0.0, drop_path_rate=0.0)
        task = stepping(stage_of(place, training={**T.TRAINING, "accumulate": accumulate}, **quiet))
        gradients = []
        monkeypatch.setattr(
            method_module,
            "guarded_step",
            lambda optimizer, norm, step, task=task, into=gradients: into.extend(
                p.grad.clone() for p in task.model.parameters()
            ),
        )
        task.training_step(batch_of(stage_of(place)), 0)
        found.append((gradients, task.figures["loss"]))
    for one, four in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(one, four, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1])


def test_figures_in_closed_form(place):
    task = stage_of(place)
    labels = torch.tensor([0, 11, 2, 3])
    logits = torch.zeros(4, 12)
    logits[0, 0] = 3.0  # right
    logits[1, :6] = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0, 4.0])  # label 11 is not among the first five
    logits[2, 0], logits[2, 2] = 2.0, 1.0  # second best
    logits[3, 3] = 1.0  # right
    task.model = torch.nn.Identity()
    measures = task.validate({"image": logits, "label": labels})
    torch.testing.assert_close(measures["loss"], -logits.log_softmax(1)[torch.arange(4), labels])
    assert measures["accuracy"].tolist() == [1, 0, 0, 1] and measures["top5"].tolist() == [1, 0, 1, 1]
    assert "top5" not in task.validate({"image": logits[:, :10], "label": labels.clamp(max=9)})


def test_label_smoothing_is_its_formula(place, monkeypatch):
    task = stepping(stage_of(place, augment={}))
    batch = batch_of(stage_of(place))
    torch.manual_seed(subseed(0, "step", 0))
    log_p = task.model(batch["image"]).log_softmax(1)
    right = log_p[torch.arange(8), batch["label"]]
    expected = -(0.9 * right + 0.1 * log_p.mean(1)).mean()
    torch.manual_seed(subseed(0, "step", 0))
    torch.testing.assert_close(task.loss(batch)[0], expected)


# Movements of the images


IMAGES = torch.rand(4, 3, 8, 12, generator=torch.Generator().manual_seed(0))
POSITIONS = torch.tensor([0, 1, 77, 10**12])


def test_movements_depend_on_seed_and_position_alone():
    settings = AugmentSettings(rotate=20, scale=0.2, shift=0.2)
    whole = moved(IMAGES, POSITIONS, settings, seed=3)
    assert whole.shape == IMAGES.shape and not torch.allclose(whole, IMAGES, atol=0.01)
    assert torch.equal(moved(IMAGES[2:], POSITIONS[2:], settings, seed=3), whole[2:])
    assert not torch.allclose(moved(IMAGES, POSITIONS, settings, seed=4), whole, atol=0.01)
    same = IMAGES[:1].expand(4, -1, -1, -1)
    assert not torch.allclose(*moved(same, POSITIONS, settings, seed=3)[:2], atol=0.01)
    assert moved(IMAGES, POSITIONS, AugmentSettings(), seed=3) is IMAGES


@pytest.mark.parametrize(
    "settings", [AugmentSettings(rotate=30), AugmentSettings(scale=0.5), AugmentSettings(shift=0.25)]
)
def test_each_movement_stays_within_its_bound(settings):
    """Where a ramp's values went tells how far each place moved."""
    rows, columns = torch.meshgrid(torch.arange(33.0) - 16, torch.arange(49.0) - 24, indexing="ij")
    ramps = torch.stack([rows, columns])[None].expand(64, -1, -1, -1)
    out = moved(ramps, torch.arange(64), settings, seed=0)
    down, across = out[:, 0, 16, 24], out[:, 1, 16, 24]  # what came to the centre
    assert (down.abs() <= settings.shift * 33 + 1e-4).all() and (down.abs().max() > 7) == bool(settings.shift)
    assert (across.abs() <= settings.shift * 49 + 1e-4).all()
    step = torch.stack([out[:, 0, 16, 26] - down, out[:, 1, 16, 26] - across], 1) / 2  # one column further
    length, angle = step.norm(dim=1), torch.atan2(step[:, 0], step[:, 1]).rad2deg()
    assert (angle.abs() <= settings.rotate + 1e-3).all() and (angle.abs().max() > 20) == bool(settings.rotate)
    assert (length <= 1 + settings.scale + 1e-3).all() and (length >= 1 / (1 + settings.scale) - 1e-3).all()
    assert (length.max() > 1.3 and length.min() < 0.8) == bool(settings.scale)


# Pictures


def test_the_worst_mistakes_come_first(place):
    stage = stage_of(place)
    model = ldm.load(place / "runs" / "cls")
    stage.model.load_state_dict(model.state_dict())
    stage.eval()
    stage.keys.logging.images, stage._shown_set = 3, stage.train_set
    with torch.no_grad():
        grid = stage.draw()
    every = default_collate([stage.train_set[i] for i in range(len(stage.train_set))])
    with torch.no_grad():
        losses = F.cross_entropy(model(every["image"]), every["label"], reduction="none")
    worst = every["image"][losses.argsort(descending=True)[:3]]
    assert grid.tobytes() == image_grid(worst, columns=2).tobytes()


# Mistakes of the user


@pytest.mark.parametrize(
    "changes, message",
    [
        (with_model(num_classes=3), r"gives \(1, 3\) for one image, expected logits \(1, 2\).*num_classes"),
        (with_model(img_size=8), "does not take the data's 3x16x16 images: .* built for 8x8"),
        (with_model(in_chans=1), r"does not take the data's 3x16x16 images"),
        (with_model(patch_size=5), "16x16 .* patches of 5x5"),
        ({"label_smoothing": 1.0}, r"label_smoothing is a share in \[0, 1\)"),
    ],
)
def test_what_does_not_fit_is_told_before_training(place, changes, message):
    with pytest.raises(ValueError, match=message):
        stage_of(place, **changes)


def test_images_without_classes_are_told(place, tmp_path):
    T.write_images(tmp_path / "images", classes=())
    with pytest.raises(ValueError, match="needs labels, but the data has no classes"):
        stage_of(tmp_path)


# What it is for


def test_a_trained_classifier_guides_a_model_that_knows_no_classes(place):
    classifier = ldm.load(place / "runs" / "cls")
    torch.manual_seed(0)
    network = UNetModel(
        in_channels=3, out_channels=3, model_channels=16, channel_mult=[1, 2], num_res_blocks=1,
        attention_resolutions=[], num_heads=1, num_groups=8,
    )  # fmt: skip
    torch.nn.init.normal_(network.out[2].weight, std=0.02)
    model = LatentDiffusion(
        IdentityFirstStage(), network, Denoiser(FlowSchedule(), "flow"), image_size=T.SIZE
    )
    labels = torch.arange(8) % 2

    def judged(scale: float) -> torch.Tensor:
        def steer(denoise):
            return ClassifierGuidance(denoise, classifier, labels, scale, interval=(0.0, 5.0))

        images = ldm.sample(model, 8, steps=8, steer=steer)
        return classifier(images).detach().softmax(1)[torch.arange(8), labels]

    free, guided = judged(0.0), judged(300.0)  # the classifier has seen 24 steps and is not sure of anything
    assert (guided > free + 0.01).all()
    assert torch.equal(ldm.sample(model, 8, steps=8, steer=None), ldm.sample(model, 8, steps=8))
    assert all(p.grad is None for part in (network, classifier) for p in part.parameters())


# Speed


@pytest.mark.parametrize(
    "build, kind, count",
    [
        (lambda: vit.VisionTransformer(**{**VIT["params"], "num_classes": 2}), vit.Block, 2),
        (
            lambda: DiT(input_size=8, patch_size=2, hidden_size=48, depth=3, num_heads=4),
            DiTBlock,
            3,
        ),
    ],
)
def test_transformers_are_compiled_by_block(build, kind, count, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self)))
    assert kind in BLOCKS and compile_blocks(build()) == count and compiled == [kind] * count


def test_the_file_of_weights_is_enough(place, tmp_path):
    shutil.copy(place / "runs" / "cls" / native.MODEL_FILE, tmp_path / "alone.safetensors")
    x = torch.rand(2, 3, T.SIZE, T.SIZE)
    with torch.no_grad():
        assert torch.equal(ldm.load(tmp_path / "alone.safetensors")(x), ldm.load(place / "runs" / "cls")(x))
