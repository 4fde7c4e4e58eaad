"""Configs that lean on other runs and on the data: `from_run`, `auto`, conditions held against networks."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
import training_runs as T
from omegaconf import OmegaConf

from ldm.checkpoints import native
from ldm.conditioning import ClassLabel, Conditioner
from ldm.config import ConfigError
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.schedule import FlowSchedule
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.autoencoder import IdentityFirstStage
from ldm.models.dit import DiT
from ldm.models.unet import UNetModel
from ldm.training import train
from ldm.training.run_config import complete_yaml, load_run

CPU = torch.device("cpu")
SHIPPED = T.ROOT / "configs" / "diffusion"
CLASS_UNET = SHIPPED / "class-unet-f8.yaml"
NETWORK = [
    *("network.params.in_channels=2", "network.params.out_channels=2", "network.params.model_channels=32"),
    *("network.params.channel_mult=[1,1]", "network.params.num_res_blocks=1"),
    "network.params.num_head_channels=8",
]
VECTOR = ["network.params.adm_in_channels=8", "conditioner.params.embedders.0.params.dim=8"]
QUICK = [
    *("training.steps=2", "training.batch_size=4", "training.workers=0", "training.accelerator=cpu"),
    *("training.checkpoint_every=2", "sampling.steps=1", "logging.images=2", "logging.progress=false"),
    "logging.tensorboard=false",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Images, and a first stage trained on them in `runs/ae`, for configs that name it."""
    place = tmp_path_factory.mktemp("configs")
    train_first_stage(place, T.write_images(place / "images"))
    return place


def train_first_stage(place: Path, images: Path, name: str = "ae", **data) -> Path:
    config = copy.deepcopy(T.autoencoder_config(images, place / "runs", name))
    config["data"]["params"] |= data
    channels = data.get("channels", 3)
    config["model"]["params"]["ddconfig"] |= {"in_channels": channels, "out_ch": channels}
    config["loss"]["params"]["disc_in_channels"] = channels
    return train(T.write_config(place / f"{name}.yaml", config), ["training.steps=1"])


def settings(place: Path, first_stage: Path, *more: str) -> list[str]:
    return [f"first_stage={first_stage}", f"runs={place / 'runs'}", *NETWORK, *QUICK, *more]


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_run(path, overrides)
    return caught.value.problems


def stage(path: Path, overrides: list[str]):
    return T.build_method(path, overrides, rehearsal=True)


# Values from the first stage's run


@pytest.fixture
def own(tmp_path) -> Path:
    """A first stage of one's own, to be moved about."""
    train_first_stage(tmp_path, T.write_images(tmp_path / "images"))
    return tmp_path


def test_a_run_goes_on_without_its_first_stage(own):
    command = settings(own, own / "runs" / "ae", *VECTOR)
    run = train(CLASS_UNET, command)
    assert T.newest_state(run)["step"] == 2
    (own / "runs" / "ae").rename(own / "elsewhere")
    train(CLASS_UNET, [*command, "training.steps=3"])
    assert T.newest_state(run)["step"] == 3
    assert any("does not exist" in p for p in problems(CLASS_UNET, *command, "name=another"))


def test_a_run_keeps_its_images_when_the_first_stage_is_trained_on_others(own):
    command = settings(own, own / "runs" / "ae", *VECTOR)
    run = train(CLASS_UNET, command)
    shutil.rmtree(own / "runs" / "ae")
    others = T.write_images(own / "others", classes=("ant", "bee", "cow"))
    train_first_stage(own, others)
    assert load_run(CLASS_UNET, [*command, "name=fresh"])[0].data.params.root == str(others)
    train(CLASS_UNET, [*command, "training.steps=3"])
    assert T.newest_state(run)["step"] == 3
    assert OmegaConf.load(run / "config.yaml").data.params.root == str(own / "images")
    # Another size is another run all the same.
    with pytest.raises(ValueError, match="holds a run of another config:\n  data.params.size: 16 -> 8"):
        train(CLASS_UNET, [*command, "data.params.size=8"])


def test_a_run_that_never_took_a_checkpoint_begins_anew(own):
    command = settings(own, own / "runs" / "ae", *VECTOR)
    run = train(CLASS_UNET, command)
    shutil.rmtree(run / "checkpoints")
    (own / "runs" / "ae").rename(own / "elsewhere")
    assert "runs/ae does not exist" in problems(CLASS_UNET, *command)[0]


def test_a_first_stage_that_is_not_there_is_told_once(place):
    runs = place / "runs"
    for given, reason in ((runs / "a", "does not exist"), (runs, "is no run folder (it has no config.yaml)")):
        (said,) = problems(CLASS_UNET, f"first_stage={given}")
        assert said.startswith(f"first_stage {given} {reason}; {runs} has ae; give data.params.root=... and")
    (said,) = problems(CLASS_UNET, f"first_stage={place / 'images'}")
    assert "give data.params.root=... and data.params.size=..., or a run folder" in said


def test_a_file_as_first_stage_says_what_to_give(place):
    file = place / "runs" / "ae" / native.MODEL_FILE
    (said,) = problems(CLASS_UNET, f"first_stage={file}")
    assert said.startswith(f"first_stage {file} is a file, which does not say what images")
    assert "give data.params.root=... and data.params.size=..., or a run folder" in said
    (said,) = problems(CLASS_UNET, "first_stage=null", "data.params.size=8")
    assert said == (
        "first_stage is null, so there is no run to take the images from; give data.params.root=..."
    )
    images = [f"data.params.root={place / 'images'}", "data.params.size=16"]
    cfg, _ = load_run(CLASS_UNET, [f"first_stage={file}", *images])
    assert cfg.data.params.channels == 3 and list(cfg.data.params.background) == [255, 255, 255]


def test_a_gray_first_stage_says_its_channels_and_background_itself(own, caplog):
    images = T.write_images(own / "gray", mode="L")
    first_stage = train_first_stage(own, images, "gray", channels=1, background="black", on_error="report")
    command = settings(own, first_stage, *VECTOR)
    built = stage(CLASS_UNET, command)
    assert built._shown_set.channels == 1 and built._shown_set.background == (0, 0, 0)
    hint = "the first stage was trained with data.params.on_error=report, which this config does not say"
    assert hint in caplog.text and "channels" not in caplog.text
    caplog.clear()
    stage(CLASS_UNET, [*command, "data.params.on_error=report"])
    assert "which this config does not say" not in caplog.text


def test_only_keys_of_the_task_are_offered(place):
    for key in ("augmnt.rotate=1", "samplin.steps=3"):
        (said,) = problems(place / "ae.yaml", key)
        assert "augment" not in said and "sampling" not in said
    (said,) = problems(CLASS_UNET, "first_stage=x", "samplin.steps=3")
    assert "did you mean sampling?" in said and "augment" not in said


def test_one_step_is_no_steps(own, caplog):
    caplog.set_level("INFO", logger="ldm")
    train(own / "ae.yaml", ["training.steps=1", "name=one"])
    assert "3 held out; 1 step of 8" in caplog.text


def test_shipped_configs_take_a_shift(place):
    shift = ["objective.params.time.params.shift=auto", "sampling.shift=auto"]
    built = stage(CLASS_UNET, settings(place, place / "runs" / "ae", *VECTOR, *shift))
    assert built.objective.time.shift == built.sampling["shift"] == (2 * 8 * 8 / 4096) ** 0.5


# Classes


def class_labels(place: Path, network: dict, drop: float = 0.2) -> Path:
    embedder = {"target": "ldm.conditioning.ClassLabel", "params": {"num_classes": "auto", "drop": drop}}
    config = copy.deepcopy(T.diffusion_config(place / "images", place / "runs", place / "runs" / "ae"))
    config["conditioner"]["params"]["embedders"] = [embedder]
    config["network"] = network
    return T.write_config(place / "labels.yaml", config)


UNET = {key: value for key, value in T.NETWORK["params"].items() if key != "adm_in_channels"}
DIT = dict(input_size=8, in_channels=2, patch_size=4, hidden_size=24, depth=1, num_heads=2)


@pytest.mark.parametrize(
    "network, count",
    [
        ({"target": "ldm.models.unet.UNetModel", "params": {**UNET, "num_classes": "auto"}}, 3),
        ({"target": "ldm.models.dit.DiT", "params": {**DIT, "num_classes": "auto"}}, 2),
    ],
    ids=["unet", "dit"],
)
def test_auto_counts_the_absent_class_of_a_network(place, network, count):
    built = stage(class_labels(place, network), [])
    assert built.model.network.num_classes == count
    assert built.model.conditioner.embedders[0].num_classes == 2
    x, t = torch.zeros(3, 2, 8, 8), torch.zeros(3)
    out = built.model.network(x, t, y=torch.tensor([0, 1, 2]))  # 2 is the absent class
    assert out.shape == x.shape


def test_a_table_that_is_too_small_is_refused_when_the_model_is_built(place):
    small = {"target": "ldm.models.unet.UNetModel", "params": {**UNET, "num_classes": 2}}
    with pytest.raises(ValueError, match="embeds 2 labels.* the absent class, label 2: .*num_classes=3"):
        stage(class_labels(place, small), [])
    stage(class_labels(place, small, drop=0.0), ["sampling.guidance=1"])  # label 2 never comes up


@pytest.mark.parametrize("rows", [2, 3])
def test_tables_of_both_networks_are_held_against_the_labels(rows):
    def build(network):
        return LatentDiffusion(
            IdentityFirstStage(2),
            network,
            Denoiser(FlowSchedule(), "flow"),
            Conditioner([ClassLabel(3)]),
            image_size=8,
        )

    with pytest.raises(ValueError, match="num_classes=4"):
        build(UNetModel(**UNET | {"num_classes": rows}))
    build(UNetModel(**UNET | {"num_classes": 4}))
    if rows == 2:
        with pytest.raises(ValueError, match="num_classes=3"):
            build(DiT(**DIT, num_classes=2))
    else:
        build(DiT(**DIT, num_classes=3))


def test_discriminator_counts_the_classes_itself(place):
    config = copy.deepcopy(T.autoencoder_config(place / "images", place / "runs"))
    config["loss"]["params"] |= {"disc_conditional": True, "disc_num_classes": "auto"}
    path = T.write_config(place / "conditional.yaml", config)
    assert stage(path, []).objective.discriminator.class_map.num_embeddings == 2
    with pytest.raises(ValueError, match="disc_num_classes: auto: the data has no classes"):
        stage(path, ["data.params.layout=flat"])


# Conditions against the network


def test_a_flat_folder_is_shown_the_way_to_the_config_without_classes(own):
    command = settings(own, own / "runs" / "ae", *VECTOR, "data.params.layout=flat")
    with pytest.raises(ValueError, match="num_classes: auto: the data has no classes"):
        stage(CLASS_UNET, command)
    less = [s for s in command if "conditioner" not in s]
    with pytest.raises(
        ValueError, match="network.params.num_classes=null network.params.adm_in_channels=null"
    ):
        stage(CLASS_UNET, [*less, "conditioner=null"])
    plain = settings(own, own / "runs" / "ae", "data.params.layout=flat")
    assert stage(SHIPPED / "uncond-unet-f8.yaml", plain).model.network.num_classes is None


@pytest.mark.parametrize(
    "changes, message",
    [
        (["network.params.adm_in_channels=16"], "gives a vector of 8, .* 16; set .*adm_in_channels=8$"),
        (
            ["network.params.num_classes=null", "network.params.adm_in_channels=null"],
            "vector of 8, but the network takes none; set network.params.num_classes=sequential "
            "network.params.adm_in_channels=8",
        ),
        (["network.params.context_dim=8"], "context_dim is 8, but the conditioner gives no tokens"),
        (
            ["conditioner.params.embedders.0.params.kind=crossattn"],
            "num_classes is sequential, but the conditioner gives no class or vector",
        ),
        (
            [
                *("conditioner.params.embedders.0.params.kind=crossattn", "network.params.num_classes=null"),
                *("network.params.adm_in_channels=null", "network.params.context_dim=12"),
            ],
            "tokens of 8 for cross-attention, but network.params.context_dim is 12; .*context_dim=8",
        ),
        (
            ["conditioner.params.embedders.0.target=ldm.conditioning.ClassLabel"],
            "gives labels, but network.params.num_classes is sequential; set network.params.num_classes=auto",
        ),
    ],
)
def test_conditions_that_do_not_fit_the_network(place, changes, message):
    config = copy.deepcopy(T.diffusion_config(place / "images", place / "runs", place / "runs" / "ae"))
    if any("ClassLabel" in change for change in changes):
        for name in ("dim", "kind"):
            del config["conditioner"]["params"]["embedders"][0]["params"][name]
    with pytest.raises(ValueError, match=message):
        stage(T.write_config(place / "unfit.yaml", config), changes)


# The shift of a flow model's times


def test_shift_auto_follows_from_the_latents(place):
    config = copy.deepcopy(T.diffusion_config(place / "images", place / "runs", place / "runs" / "ae"))
    time = {"target": "ldm.diffusion.objective.TimeUniform", "params": {"shift": "auto"}}
    config["objective"]["params"] = {"time": time}
    config["sampling"]["shift"] = "auto"
    path = T.write_config(place / "shifted.yaml", config)
    built = stage(path, [])
    shift = (2 * 8 * 8 / 4096) ** 0.5
    assert built.objective.time.shift == shift
    # t' = s t / (1 + (s - 1) t)
    u = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(built.objective.time(u), shift * u / (1 + (shift - 1) * u))
    assert built.sampling["shift"] == shift
    assert stage(path, ["sampling.shift=3"]).sampling["shift"] == 3
    assert load_run(path)[0].sampling.shift == "auto"  # as the run folder keeps it


def test_options_of_the_sampler_in_a_config(place):
    """Under `options`; beside the sampler, as older files have `eta`, it is read and written anew."""
    config = copy.deepcopy(T.diffusion_config(place / "images", place / "runs", place / "runs" / "ae"))
    for name, own in (("new", {"options": {"eta": 0.5}}), ("old", {"eta": 0.5})):
        config["sampling"] = {"sampler": "ddim", "steps": 2, **own}
        path = T.write_config(place / f"options-{name}.yaml", config)
        built = stage(path, [])
        assert built._sampling.options == built.describe().sampling["options"] == {"eta": 0.5}
        assert "eta" not in built.describe().sampling and "eta: 0.5" in complete_yaml(*load_run(path))
    path = place / "options-new.yaml"
    assert load_run(path, ["sampling.options.eta=1"])[1].sampling.options == {"eta": 1}
    other = ["sampling.sampler=ddpm", "sampling.options.variance=large"]
    with pytest.raises(ConfigError, match="sampling: eta belongs to the ddim sampler, not to ddpm"):
        load_run(path, other)
    without = load_run(path, [*other, "sampling.options.eta=null"])[1].sampling
    assert without.options == {"variance": "large"}
    with pytest.raises(ConfigError, match="options-old.yaml:.* eta belongs to the ddim sampler, not to plms"):
        load_run(place / "options-old.yaml", ["sampling.sampler=plms"])


def test_shift_of_discrete_steps_is_refused(place):
    config = copy.deepcopy(T.diffusion_config(place / "images", place / "runs", place / "runs" / "ae"))
    schedule = {"target": "ldm.diffusion.schedule.DiscreteSchedule"}
    config["denoiser"]["params"] = {"prediction": "eps", "schedule": schedule}
    path = T.write_config(place / "discrete.yaml", config)
    with pytest.raises(ValueError, match="sampling: shift 2 belongs to flow models .*DiscreteSchedule"):
        stage(path, ["sampling.shift=2"])
    with pytest.raises(ConfigError, match="shift must be a finite number above 0"):
        load_run(path, ["sampling.shift=0"])
