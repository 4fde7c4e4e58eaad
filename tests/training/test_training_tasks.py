"""One step of each task, and what must not disturb it: gradients, accumulation, validation, precision."""

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import training_runs as T
from PIL import Image
from torch.utils.data import default_collate

from ldm.checkpoints import load
from ldm.training import method as method_module
from ldm.training import train
from ldm.training.loop.data_module import RunData
from ldm.training.method import Method

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Images, and a trained first stage in `runs/ae`."""
    place = tmp_path_factory.mktemp("tasks")
    config = T.autoencoder_config(T.write_images(place / "images"), place / "runs")
    train(T.write_config(place / "ae.yaml", config), ["training.steps=6"])
    return place


def changed(config: dict, **changes) -> dict:
    """A copy with values replaced; `training__optimizer__lr=...` goes into sections."""
    config = copy.deepcopy(config)
    for path, value in changes.items():
        *above, last = path.split("__")
        node = config
        for name in above:
            node = node[name]
        node[last] = value
    return config


def stage_of(place: Path, config: dict) -> Method:
    return T.build_method(T.write_config(place / "config.yaml", config))


def autoencoder(place: Path, **changes) -> Method:
    changes = {"loss__params__disc_start": 0, **changes}
    return stage_of(place, changed(T.autoencoder_config(place / "images", place / "runs"), **changes))


def diffusion(place: Path, **changes) -> Method:
    config = T.diffusion_config(place / "images", place / "runs", place / "runs" / "ae")
    return stage_of(place, changed(config, **changes))


VQ = {
    "target": "ldm.models.autoencoder.VQModel",
    "params": {
        **T.AUTOENCODER["params"],
        "n_embed": 4,
        "ddconfig": {**T.AUTOENCODER["params"]["ddconfig"], "double_z": False},
    },
}


def batch_of(stage: Method, size: int = 8, first: int = 0) -> dict:
    return default_collate(
        [stage.train_set[(i % len(stage.train_set), i)] for i in range(first, first + size)]
    )


class Steps:
    """A task taken through steps by hand, with the gradients that each optimizer was given."""

    def __init__(self, stage: Method, monkeypatch):
        self.task = stage.train()
        self.trainer = T.attach(self.task)
        self.gradients: list[dict] = []
        self._step = method_module.guarded_step
        monkeypatch.setattr(method_module, "guarded_step", self._spy)

    def _spy(self, optimizer, norm, step) -> None:
        """Gradients of ALL parameters at the moment when one optimizer steps."""
        named = self.task.named_parameters()
        self.gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})
        self._step(optimizer, norm, step)

    def __call__(self, batch: dict) -> dict:
        self.task.training_step(batch, 0)
        return self.task.figures

    @property
    def figures(self) -> dict:
        return {name: value for name, value in self.task.figures.items() if name != "images_per_second"}

    def names(self, index: int) -> set[str]:
        """Names of the parameters of an optimizer."""
        ours = {id(p) for p in self.task.trained()[index]}
        return {name for name, p in self.task.named_parameters() if id(p) in ours}


# Every parameter learns, and only from its own loss


@pytest.mark.parametrize("model", [T.AUTOENCODER, VQ], ids=["kl", "vq"])
@pytest.mark.parametrize("norm", [False, True], ids=["batchnorm", "actnorm"])
def test_every_parameter_of_the_autoencoder_gets_a_gradient_of_its_own_loss(place, monkeypatch, model, norm):
    # At first, the hinge loss has exactly opposite gradients for real and generated patches in the last bias.
    params = T.LOSS["params"] | {"use_actnorm": norm, "disc_start": 0, "disc_loss": "vanilla"}
    loss = T.LOSS | {"params": params}
    stage = autoencoder(place, model=model, loss=loss)
    steps = Steps(stage, monkeypatch)
    logs = steps(batch_of(stage))
    first, second = steps.gradients
    assert set(first) == steps.names(0) and all(n.startswith("model.") for n in first)
    assert set(second) == steps.names(1) and all(n.startswith("objective.discriminator.") for n in second)
    for gradients in steps.gradients:
        for name, gradient in gradients.items():
            assert gradient.isfinite().all() and gradient.any(), name
    assert {"rec_loss", "g_loss", "d_weight", "disc_loss", "grad_norm"} <= set(logs)
    assert all(p.grad is None for p in steps.task.parameters())


def test_learned_logvar_is_trained_with_the_autoencoder(place, monkeypatch):
    stage = autoencoder(place, loss__params__learn_logvar=True)
    steps = Steps(stage, monkeypatch)
    steps(batch_of(stage))
    assert "objective.logvar" in steps.gradients[0] and "objective.logvar" not in steps.gradients[1]


def test_before_its_start_the_discriminator_rests(place, monkeypatch):
    stage = autoencoder(place, loss__params__disc_start=1)
    steps = Steps(stage, monkeypatch)
    calls = []
    stage.objective.discriminator.register_forward_hook(lambda *args: calls.append(1))
    steps(batch_of(stage))
    assert len(steps.gradients) == 1 and not calls
    steps(batch_of(stage, first=8))
    assert len(steps.gradients) == 3 and len(calls) == 3  # for the generator once, real, generated


def test_every_parameter_of_the_diffusion_model_gets_a_gradient(place, monkeypatch):
    stage = diffusion(place)
    steps = Steps(stage, monkeypatch)
    frozen = {n: p.clone() for n, p in stage.model.first_stage_model.state_dict().items()}
    steps(batch_of(stage))
    zero = {n for n, g in steps.gradients[0].items() if not g.any()}
    # A fresh network's last layer is zero, and so is what reaches those before it; one step later it is not.
    assert zero
    for first in range(8, 48, 8):
        steps(batch_of(stage, first=first))
    assert set(steps.gradients[-1]) == steps.names(0)
    assert any(n.startswith("model.conditioner.") for n in steps.gradients[-1])
    assert not any("first_stage" in n for n in steps.gradients[-1])
    assert [n for n, g in steps.gradients[-1].items() if not g.any() or not g.isfinite().all()] == []
    after = stage.model.first_stage_model.state_dict()
    assert all(torch.equal(frozen[n], after[n]) for n in frozen)
    assert not any(m.training for m in stage.model.first_stage_model.modules())
    assert stage.model.network.training


def test_frozen_first_stage_is_in_eval_mode_from_the_start(place):
    model = diffusion(place, cache=False).model
    assert not any(m.training for m in model.first_stage_model.modules())
    assert model.network.training and model.conditioner.training


def test_first_stage_of_a_run_stays_as_it_was_trained(place):
    config = T.diffusion_config(place / "images", place / "runs", place / "runs" / "ae", "frozen")
    train(T.write_config(place / "config.yaml", config), ["training.steps=3", "cache=false"])
    trained = load(place / "runs" / "ae").state_dict()
    inside = load(place / "runs" / "frozen").first_stage_model.state_dict()
    assert trained.keys() == inside.keys()
    assert all(torch.equal(trained[name], inside[name]) for name in trained)


# Accumulation


def weights(task) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in task.named_parameters()}


def after_steps(stage: Method, monkeypatch, count: int = 2) -> tuple[Steps, dict[str, torch.Tensor]]:
    steps = Steps(stage, monkeypatch)
    for i in range(count):
        steps(batch_of(stage, first=8 * i))
    return steps, weights(stage)


def assert_close(a: dict, b: dict, rtol: float = 1e-4) -> None:
    assert a.keys() == b.keys()
    for name in a:
        scale = b[name].abs().max().item()
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=rtol * max(scale, 1e-6), msg=name)


# AdamW's first steps are lr * sign(gradient), which magnifies rounding; a large eps makes them smooth.
SMOOTH = {"training__optimizer__eps": 1e-2, "training__ema": None}


@pytest.mark.parametrize("accumulate", [2, 8])
def test_accumulation_does_not_change_diffusion(place, monkeypatch, accumulate):
    smooth = {**SMOOTH, "network__params__dropout": 0.0}
    whole, expected = after_steps(diffusion(place, **smooth), monkeypatch)
    parts, found = after_steps(diffusion(place, **smooth, training__accumulate=accumulate), monkeypatch)
    assert_close(parts.gradients[0], whole.gradients[0])
    assert_close(found, expected)
    torch.testing.assert_close(parts.figures, whole.figures, rtol=1e-4, atol=1e-6)


def test_accumulation_does_not_change_the_autoencoder(place, monkeypatch):
    plain = {**SMOOTH, "model__params__ddconfig__dropout": 0.0, "loss__params__disc_weight": 0.0}
    _, expected = after_steps(autoencoder(place, **plain), monkeypatch)
    _, found = after_steps(autoencoder(place, **plain, training__accumulate=4), monkeypatch)
    assert_close(found, expected)


def test_accumulation_with_two_optimizers_is_the_mean_of_the_parts(place, monkeypatch):
    """The adaptive weight and BatchNorm look at one part at a time, so these are what is compared with."""
    plain = {"model__params__ddconfig__dropout": 0.0, "training__optimizer__clip": None}
    accumulated = Steps(autoencoder(place, **plain, training__accumulate=2), monkeypatch)
    stage = autoencoder(place, **plain)
    accumulated(batch_of(stage))
    single = []
    for first in (0, 4):
        fresh = Steps(autoencoder(place, **plain), monkeypatch)
        fresh(batch_of(stage, size=4, first=first))
        single.append(fresh.gradients)
    for i in range(2):
        mean = {name: (single[0][i][name] + single[1][i][name]) / 2 for name in single[0][i]}
        assert_close(accumulated.gradients[i], mean)


def test_accumulation_draws_the_same(place, monkeypatch):
    """Noise, times and posterior samples of a sample belong to its position, whatever batch it is in."""
    stage = diffusion(place, network__params__dropout=0.0)
    batch = batch_of(stage)
    seen = []
    objective = stage.objective

    def spy(network, z, noise, u, cond):
        seen.append((z, noise, u))
        return objective(network, z, noise, u, cond)

    stage.objective = spy
    whole = stage.errors(batch, "train")["loss"]
    for part in (slice(0, 3), slice(3, 8)):
        stage.errors({name: value[part] for name, value in batch.items()}, "train")
    for i in range(3):
        assert torch.equal(seen[0][i], torch.cat([seen[1][i], seen[2][i]]))
    assert len(seen[0][2].unique()) == 8 and whole.shape == (8,)
    assert not torch.equal(stage.errors(batch, "validation")["t"], stage.errors(batch, "train")["t"])


# Validation and pictures


def quiet(place: Path, name: str, kind: str, *overrides: str) -> Path:
    """A short run of `kind`; returns its folder."""
    if kind == "ae":
        config = T.autoencoder_config(place / "images", place / "runs", name)
    else:
        config = T.diffusion_config(place / "images", place / "runs", place / "runs" / "ae", name)
    path = T.write_config(place / "config.yaml", config)
    return train(path, ["training.steps=8", "training.checkpoint_every=null", *overrides])


@pytest.mark.parametrize("kind", ["ae", "ldm"])
def test_validation_and_pictures_do_not_change_training(place, kind):
    often = ["logging.validate_every=2", "logging.images_every=3", "logging.images=40"]
    never = ["logging.validate_every=null", "logging.images_every=null", "logging.every=5"]
    a = quiet(place, f"{kind}-often", kind, *often)
    b = quiet(place, f"{kind}-never", kind, *never)
    assert T.differences(T.newest_state(a), T.newest_state(b)) == []
    assert [row["step"] for row in T.rows(a, "validation")] == ["2", "4", "6", "8"]
    assert sorted(p.stem[-2:] for p in (a / "images").iterdir()) == ["03", "06", "08"]
    assert T.rows(b, "validation") == [] and not list((b / "images").iterdir())
    assert [row["step"] for row in T.rows(b)] == ["5", "8"]


def test_validation_gives_the_same_figures_twice(place):
    a = quiet(place, "twice", "ae", "logging.validate_every=8")
    state = T.newest_state(a)
    rows = T.rows(a, "validation")
    b = quiet(place, "again", "ae", "logging.validate_every=4", "logging.validation_batches=null")
    assert T.differences(state, T.newest_state(b)) == []
    assert T.rows(b, "validation")[-1] == rows[-1]
    # Other batch sizes of validation: the images and their noise are the same.
    plain = ("model.params.ddconfig.dropout=0.0", "loss.params.disc_weight=0", "training.optimizer.eps=0.01")
    c = quiet(place, "parts", "ae", "logging.validate_every=8", "training.accumulate=8", *plain)
    d = quiet(place, "whole", "ae", "logging.validate_every=8", *plain)
    for name, value in T.rows(c, "validation")[-1].items():
        assert float(value) == pytest.approx(float(T.rows(d, "validation")[-1][name]), rel=1e-4)


def test_validation_uses_the_averages_and_gives_the_weights_back(place):
    stage = autoencoder(place)
    steps = Steps.__new__(Steps)
    steps.task = stage
    stage.trainer = steps.trainer = SimpleNamespace(world_size=1, global_rank=0)
    stage.configure_optimizers()
    for average in stage.ema.averages:
        average.zero_()
    before, generator = weights(stage), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="out of memory"), stage.evaluating():
        assert not stage.model.training and not any(p.any() for p in stage.model.parameters())
        torch.rand(3)
        raise RuntimeError("out of memory")
    assert stage.model.training
    assert all(torch.equal(before[name], value) for name, value in weights(stage).items())
    assert torch.equal(torch.get_rng_state(), generator)


def test_measures_of_the_autoencoder_in_closed_form(place):
    stage = autoencoder(place, loss__params__disc_weight=0.0)
    task = stage.eval()
    batch = batch_of(stage, 4)
    batch["position"] = batch["index"]
    task.model.forward = lambda x, noise=None: (x + 0.1, task.model.encode(x))
    measures = task.validate({**batch, "image": torch.zeros_like(batch["image"])})
    assert set(measures) == {"l1", "psnr", "kl"} and all(v.shape == (4,) for v in measures.values())
    torch.testing.assert_close(measures["l1"], torch.full((4,), 0.1))
    torch.testing.assert_close(measures["psnr"], torch.full((4,), 10 * math.log10(4 / 0.01)))


def test_held_out_images_are_shared_among_processes(place):
    stage = autoencoder(place, data__params__validation=7)
    training, logging = stage.settings, stage.keys.logging
    logging.validation_batches, logging.validate_every = None, 1

    def indices(rank: int, world: int) -> tuple[list[int], int]:
        data = RunData(stage)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=world)
        batches = list(data.val_dataloader())
        assert data.validation_share in (len(batches), len(batches) - 1)
        counted = batches[: data.validation_share]
        return [i for batch in counted for i in batch["index"].tolist()], len(batches)

    alone, _ = indices(0, 1)
    assert sorted(alone) == list(range(7)) and alone != sorted(alone)
    shared = [indices(rank, 4) for rank in range(4)]  # batches of 8 / 4 = 2 images: 2, 2, 2 and 1
    assert sorted(sum((own for own, _ in shared), [])) == list(range(7))
    lone = [indices(rank, 8) for rank in range(8)]  # seven batches of one for eight processes
    assert [len(own) for own, _ in lone] == [1] * 7 + [0]
    for processes in (shared, lone):  # and each goes through as many
        assert len({count for _, count in processes}) == 1
    logging.validation_batches = 1
    training.batch_size = 4
    assert indices(0, 1)[0] == alone[:4]


# Precision, dropout, weights to start from


def test_bf16_autocast_on_the_cpu(place, monkeypatch):
    seen = set()
    original = torch.Tensor.backward

    def spy(self, *args, **kwargs):
        seen.add(torch.is_autocast_enabled("cpu"))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", spy)
    for kind in ("ae", "ldm"):
        run = quiet(place, f"{kind}-bf16", kind, "training.precision=bf16", "training.accumulate=2")
        state = T.newest_state(run)
        exact = T.newest_state(quiet(place, f"{kind}-fp32", kind, "training.accumulate=2"))
        floats = [t for t in state["model"].values() if t.is_floating_point()]
        assert all(t.dtype == torch.float32 and t.isfinite().all() for t in floats)
        assert T.differences(state["model"], exact["model"])
        assert all(math.isfinite(float(row["grad_norm"])) for row in T.rows(run))
    assert seen == {False}


def test_dropout_is_reproducible_and_depends_on_the_seed(place, monkeypatch):
    runs = []
    for seed in (0, 0, 1):
        stage = diffusion(place, network__params__dropout=0.5)
        stage.seed = seed
        torch.manual_seed(len(runs))  # whatever was drawn before
        runs.append(after_steps(stage, monkeypatch)[1])
    assert T.differences(runs[0], runs[1]) == []
    assert T.differences(runs[0], runs[2])


def test_cached_latents_are_those_encoded_on_the_fly(place, monkeypatch):
    """To rounding: the cache encodes other batches than a step does. Flips and posterior samples included."""
    fixed = {**SMOOTH, "latent_scale": 0.5, "network__params__dropout": 0.0}
    cached, encoded = diffusion(place, **fixed), diffusion(place, **fixed, cache=False)
    assert "mean" in cached.train_set[0] and "image" in encoded.train_set[0]
    for first in (0, 8):
        a, b = (stage.errors(batch_of(stage, first=first), "train") for stage in (cached, encoded))
        torch.testing.assert_close(a["loss"], b["loss"], rtol=1e-4, atol=1e-5)
        assert torch.equal(a["t"], b["t"])


def test_latents_are_encoded_in_float32_under_autocast(place):
    encoded = diffusion(place, latent_scale=0.5, cache=False)
    batch, noise = batch_of(encoded), torch.zeros(8, 2, 8, 8)
    plain = encoded.latents(batch, noise)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoded.latents(batch, noise), plain)


def test_latents_are_normalised(place):
    stage = diffusion(place)
    noise = torch.randn(8, 15, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    z = torch.cat([stage.latents(batch_of(stage, 15, 15 * i), noise[i]) for i in range(8)])
    assert z.mean((0, 2, 3)).abs().max() < 0.03 and (z.std((0, 2, 3)) - 1).abs().max() < 0.03
    fixed = diffusion(place, latent_scale=0.18215).model
    assert fixed.latent_scale.flatten().tolist() == [pytest.approx(0.18215)] * 2
    assert fixed.latent_shift.eq(0).all()


def test_diffusion_of_pixels(place, monkeypatch):
    stage = diffusion(
        place, first_stage=None, network__params__in_channels=3, network__params__out_channels=3
    )
    steps, _ = after_steps(stage, monkeypatch)
    assert stage.model.latent_shape == (3, T.SIZE, T.SIZE) and steps.task.step == 2
    assert stage.keep(Path("nowhere")) is None


def test_init_from_takes_the_weights_of_a_run(place):
    source = quiet(place, "source", "ldm")
    model = diffusion(place, init_from=str(source)).model
    trained = load(source).state_dict()
    assert T.differences(dict(model.state_dict()), dict(trained)) == []  # the latents' scale included
    with pytest.raises(ValueError, match="trained in the latents of another first stage"):
        other = T.autoencoder_config(place / "images", place / "runs", "other")
        train(T.write_config(place / "config.yaml", other), ["training.steps=2", "seed=5"])
        diffusion(place, first_stage=str(place / "runs/other"), init_from=str(source))
    first = autoencoder(place, init_from=str(place / "runs" / "ae")).model
    assert T.differences(dict(first.state_dict()), dict(load(place / "runs" / "ae").state_dict())) == []


# Mistakes that would come up late


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"loss__params__disc_num_layers": 3}, "size 16 is too small for the discriminator, which takes 24"),
        ({"loss__params__disc_in_channels": 1}, "disc_in_channels is 1, the images have 3 channels"),
        (
            {"loss__params__disc_conditional": True, "loss__params__disc_num_classes": 5},
            "disc_num_classes is 5, the data has 2 classes",
        ),
        ({"data__params__size": 15}, "size 15 is not a multiple of the autoencoder's downsampling factor 2"),
        ({"data__params__channels": 1}, "the images have 1 channels, the autoencoder takes 3"),
    ],
)
def test_autoencoder_mistakes_are_told_at_the_start(place, changes, message):
    with pytest.raises(ValueError, match=message):
        autoencoder(place, **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sampling__spacing": "karas"}, "sampling: .*karas"),
        ({"sampling__guidance": 2.0, "conditioner": None}, "guidance 2.0 leans on the absence"),
        ({"data__params__channels": 1}, "the images have 1 channels, the autoencoder takes 3"),
        ({"data__params__size": 17}, "not a multiple of the autoencoder's downsampling factor"),
        ({"network__params__in_channels": 4}, "the network takes 4 channels.*latents have 2"),
        ({"data__params__layout": "flat"}, "num_classes: auto: the data has no classes"),
        ({"data__params__crop": "random"}, "random crops cannot be cached"),
    ],
)
def test_diffusion_mistakes_are_told_at_the_start(place, changes, message):
    with pytest.raises(ValueError, match=message):
        diffusion(place, **changes)


def test_labels_without_classes(place):
    embedder = {
        "target": "ldm.conditioning.ClassEmbedder",
        "params": {"num_classes": 2, "dim": 8, "kind": "vector"},
    }
    conditioner = {"target": "ldm.conditioning.Conditioner", "params": {"embedders": [embedder]}}
    with pytest.raises(ValueError, match="reads labels, but the data has no classes"):
        diffusion(place, conditioner=conditioner, data__params__layout="flat")


# Folders that are small or odd


def test_one_image_and_a_batch_larger_than_the_data(tmp_path):
    images = T.write_images(tmp_path / "images", classes=(), each=1, mode="L")
    config = T.autoencoder_config(images, tmp_path / "runs")
    run = train(T.write_config(tmp_path / "ae.yaml", config), ["training.steps=4", "logging.images_every=2"])
    assert T.steps_saved(run) == [4]
    assert T.rows(run, "validation") == []  # nothing is held out of one image
    assert {p.name for p in (run / "images").iterdir()} == {f"reconstruction-0000000{i}.png" for i in (2, 4)}
    second = T.diffusion_config(images, tmp_path / "runs", run)
    second |= {"conditioner": None, "network": copy.deepcopy(T.NETWORK), "sampling": {"steps": 2}}
    second["network"]["params"] |= {"num_classes": None, "adm_in_channels": None}
    run = train(T.write_config(tmp_path / "ldm.yaml", second), ["training.steps=2", "logging.images=5"])
    with Image.open(run / "images" / "samples-00000002.png") as picture:
        assert picture.size[0] < picture.size[1] and picture.mode == "RGB"  # two columns, three rows


def test_validation_turned_off_in_the_data(place):
    run = quiet(place, "unvalidated", "ae", "data.params.validation=0", "logging.validate_every=2")
    assert T.rows(run, "validation") == [] and len(list((run / "images").iterdir())) == 1


def test_changed_data_is_told(tmp_path, caplog):
    images = T.write_images(tmp_path / "images")
    path = T.write_config(tmp_path / "ae.yaml", T.autoencoder_config(images, tmp_path / "runs"))
    train(path, ["training.steps=4"])
    T.write_images(tmp_path / "images", classes=("cat",), each=12)
    with caplog.at_level("INFO", "ldm"):
        train(path, ["training.steps=6"])
    assert "the training data changed since that checkpoint (15 images then, " in caplog.text


def test_run_that_diverges_stops_and_keeps_its_checkpoints(place, monkeypatch):
    from ldm.training.methods.autoencoder import AutoencoderMethod

    original = AutoencoderMethod.noise

    def noise(self, batch, stream):
        spoilt = float("nan") if self.step >= 5 and stream == "train" else 1.0
        return original(self, batch, stream) * spoilt

    monkeypatch.setattr(AutoencoderMethod, "noise", noise)
    config = T.autoencoder_config(place / "images", place / "runs", "diverging")
    path = T.write_config(place / "config.yaml", config)
    with pytest.raises(method_module.Diverged, match="not finite in the last 3 steps .now at step 8."):
        train(path, ["training.max_bad_steps=3", "training.checkpoint_every=2"])
    run = place / "runs" / "diverging"
    assert T.steps_saved(run) == [4, 6]
    assert all(t.isfinite().all() for t in T.newest_state(run)["model"].values())
    assert [row["rec_loss"] for row in T.rows(run)][5:] == ["nan"] * 3
