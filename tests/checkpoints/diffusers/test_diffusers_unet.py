"""UNets to diffusers and back: the same numbers, every key, and what does not fit is refused."""

import json

import pytest
import torch
from diffusers_data import loaded_fully, noise, randomized, require_diffusers, same_weights
from reference_data import relative_error
from safetensors.torch import load_file, save_file

from ldm.arguments import arguments_of
from ldm.checkpoints.building import build_empty
from ldm.checkpoints.description import NotExpressible
from ldm.checkpoints.diffusers.export import save_diffusers
from ldm.checkpoints.diffusers.folder import load_diffusers
from ldm.checkpoints.diffusers.names import from_diffusers, places_of
from ldm.checkpoints.diffusers.part import shapes_of
from ldm.checkpoints.diffusers.unet_reading import unet_part
from ldm.checkpoints.diffusers.unet_writing import unet_config
from ldm.checkpoints.strict import KeyMismatch
from ldm.models.dit import DiT
from ldm.models.unet import UNetModel
from ldm.weights.errors import UnsupportedCheckpoint

BASE = {"in_channels": 4, "out_channels": 4, "model_channels": 16, "num_groups": 8, "num_res_blocks": 1}
PLAIN = {**BASE, "channel_mult": [1, 2], "attention_resolutions": [2], "num_head_channels": 8}
CROSS = {**BASE, "channel_mult": [1, 2], "attention_resolutions": [1, 2], "num_heads": 4, "context_dim": 12}
UPDOWN = {"use_scale_shift_norm": True, "resblock_updown": True}

MODELS = {
    "unconditional": PLAIN,
    "unconditional-odd-widths": {**PLAIN, "channel_mult": [1, 1.5, 3], "num_res_blocks": 2},
    "single-head": {**PLAIN, "num_head_channels": -1, "num_heads": 1, "attention_resolutions": [1, 2]},
    "new-attention-order": {**PLAIN, "use_new_attention_order": True},
    "no-attention-in-the-middle": {**PLAIN, "disable_middle_transformer": True},
    "class-scale-shift-updown": {**PLAIN, **UPDOWN, "num_classes": 5, "attention_resolutions": [1, 2]},
    "class-updown-one-level-attends": {**PLAIN, **UPDOWN, "num_classes": 5, "channel_mult": [1, 2, 2]},
    "class-timestep": {**PLAIN, "num_classes": "timestep"},
    "one-level": {**PLAIN, "channel_mult": [1], "attention_resolutions": [1]},
    "cross-attention": CROSS,
    "cross-attention-linear-depth": {
        **CROSS, "use_linear_in_transformer": True, "transformer_depth": [1, 2], "num_heads": -1,
        "num_head_channels": 8, "num_res_blocks": [2, 1],
    },
    "cross-attention-deep-middle": {**CROSS, "attention_resolutions": [1], "transformer_depth_middle": 2},
    "cross-attention-everywhere": {**CROSS, "disable_self_attentions": [True, False]},
    "cross-attention-class": {**CROSS, "num_classes": 5, "use_scale_shift_norm": True},
    "cross-attention-vector": {**CROSS, "num_classes": "sequential", "adm_in_channels": 6},
    "cross-attention-number": {**CROSS, "num_classes": "continuous"},
}  # fmt: skip


def inputs(network: UNetModel):
    """(x, t, context, y) for a network."""
    y = {
        "timestep": torch.tensor([3.0, 40.5]),
        "sequential": noise(2, 6, seed=3),
        "continuous": torch.tensor([[0.3], [-2.0]]),
    }.get(network.num_classes, torch.tensor([1, 4]) if network.num_classes else None)
    context = noise(2, 7, 12, seed=2) if network.context_dim else None
    return noise(2, 4, 8, 8), torch.tensor([7.0, 801.0]), context, y


@torch.no_grad()
def outputs(network: UNetModel, theirs) -> tuple[torch.Tensor, torch.Tensor]:
    x, t, context, y = inputs(network)
    context_given = {} if type(theirs).__name__ == "UNet2DModel" else {"encoder_hidden_states": context}
    return network(x, t, context, y), theirs(x, t, class_labels=y, **context_given).sample


@pytest.mark.parametrize("name", MODELS)
def test_diffusers_loads_our_export_and_computes_the_same(name, tmp_path):
    diffusers = require_diffusers()
    network = randomized(UNetModel(**MODELS[name]))
    save_diffusers(network, tmp_path / "unet")
    kind = json.loads((tmp_path / "unet" / "config.json").read_text())["_class_name"]
    ours, theirs = outputs(network, loaded_fully(getattr(diffusers, kind), tmp_path / "unet"))
    assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_an_export_comes_back_with_the_same_bits_and_numbers(name, tmp_path):
    network = randomized(UNetModel(**MODELS[name]))
    save_diffusers(network, tmp_path / "unet")
    again = load_diffusers(tmp_path / "unet")
    assert not again.training
    if not MODELS[name].get("use_new_attention_order"):  # read in the legacy order, with its rows moved back
        assert same_weights(again, network)
    x, t, context, y = inputs(network)
    with torch.no_grad():
        assert relative_error(again(x, t, context, y), network(x, t, context, y)) < 1e-5


REBUILT = {
    **MODELS,
    "average-pooling": {**PLAIN, "conv_resample": False},
    "channel-attention": {**PLAIN, "attn_type": "se", "attn_options": {"reduction": 4}},
    "some-blocks-attend": {**PLAIN, "num_res_blocks": [2, 2], "num_attention_blocks": [0, 1]},
    "other-heads-in-the-decoder": {**PLAIN, "num_head_channels": -1, "num_heads": 2, "num_heads_upsample": 4},
    "heads-with-a-remainder": {**CROSS, "num_heads": -1, "num_head_channels": 5},
    "heads-that-leave-channels-out": {**CROSS, "num_heads": -1, "num_head_channels": 5, "legacy": False},
    "middle-attends-to-the-context": {**CROSS, "disable_middle_self_attn": True},
    "no-context": {**CROSS, "context_dim": None, "use_spatial_transformer": True},
    "codebook": {**PLAIN, "n_embed": 7},
}


@pytest.mark.parametrize("name", REBUILT)
def test_a_network_is_rebuilt_from_the_arguments_that_it_remembers(name):
    network = randomized(UNetModel(**REBUILT[name]))
    again = UNetModel(**arguments_of(network)).eval()
    again.load_state_dict(network.state_dict())
    x, t, context, y = inputs(network)
    with torch.no_grad():
        assert relative_error(again(x, t, context, y), network(x, t, context, y)) < 1e-5


PLAIN_THEIRS = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 8,
}  # fmt: skip
UPDOWN_THEIRS = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 8,
    "num_class_embeds": 5,
}
CROSS_THEIRS = {
    "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 12, "attention_head_dim": 4,
}  # fmt: skip
THEIRS = {
    "plain": ("UNet2DModel", PLAIN_THEIRS),
    "plain-one-head": ("UNet2DModel", {**PLAIN_THEIRS, "attention_head_dim": None}),
    "plain-updown-class": ("UNet2DModel", {**PLAIN_THEIRS, **UPDOWN_THEIRS}),
    "cross": ("UNet2DConditionModel", CROSS_THEIRS),
    "cross-linear-heads-by-level": (
        "UNet2DConditionModel",
        {**CROSS_THEIRS, "use_linear_projection": True, "attention_head_dim": (2, 4),
         "upcast_attention": True, "transformer_layers_per_block": (1, 2), "class_embed_type": "projection",
         "projection_class_embeddings_input_dim": 6},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", THEIRS)
def test_a_network_saved_by_diffusers_is_read_and_computes_the_same(name, tmp_path):
    diffusers = require_diffusers()
    kind, options = THEIRS[name]
    theirs = randomized(getattr(diffusers, kind)(**options))
    theirs.save_pretrained(tmp_path)
    ours, expected = outputs(load_diffusers(tmp_path), theirs)
    assert relative_error(ours, expected) < 1e-5


def test_sdxl_conditions_are_read_as_one_vector(tmp_path):
    diffusers = require_diffusers()
    theirs = randomized(
        diffusers.UNet2DConditionModel(
            **CROSS_THEIRS,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=5 + 6 * 4,
        )
    )
    theirs.save_pretrained(tmp_path)
    network = load_diffusers(tmp_path)
    assert network.adm_in_channels == 29
    x, t, context, _ = inputs(network)
    text, sizes = noise(2, 5, seed=5), torch.tensor([[64.0, 64, 0, 0, 64, 64], [32.0, 48, 1, 2, 32, 48]])
    with torch.no_grad():
        added = {"text_embeds": text, "time_ids": sizes}
        expected = theirs(x, t, encoder_hidden_states=context, added_cond_kwargs=added).sample
        y = torch.cat([text, theirs.add_time_proj(sizes.flatten()).reshape(2, -1)], dim=1)
        assert relative_error(network(x, t, context, y), expected) < 1e-5


# The configs of the published UNets, without what is at its default; numbers of parameters from their papers.
PUBLISHED = {
    "stable-diffusion-1.5": ({"cross_attention_dim": 768, "attention_head_dim": 8}, 859_520_964),
    "stable-diffusion-2.1": (
        {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True,
         "upcast_attention": True},
        865_910_724,
    ),
    "stable-diffusion-xl": (
        {"cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20], "use_linear_projection": True,
         "block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10],
         "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
         "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
         "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
         "projection_class_embeddings_input_dim": 2816},
        2_567_463_684,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_have_every_name_and_shape(name):
    diffusers = require_diffusers()
    config, size = PUBLISHED[name]
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(**config)
    network = build_empty(unet_part({"_class_name": type(theirs).__name__, **config}, name), name)
    assert sum(p.numel() for p in network.parameters()) == size
    places = places_of(network, "add_embedding" if "addition_embed_type" in config else "class_embedding")
    shapes = shapes_of(network)
    found = from_diffusers(theirs.state_dict(), places, shapes, name, "UNet2DConditionModel")
    assert {n: tuple(t.shape) for n, t in found.items()} == shapes
    written = unet_config(network)
    del written["_class_name"]
    with torch.device("meta"):
        again = diffusers.UNet2DConditionModel(**written)
    assert shapes_of(again) == {
        n.replace("add_embedding", "class_embedding"): tuple(t.shape) for n, t in theirs.state_dict().items()
    }


def test_weights_in_shards_are_read(tmp_path):
    diffusers = require_diffusers()
    theirs = randomized(diffusers.UNet2DModel(**PLAIN_THEIRS))
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").exists()
    ours, expected = outputs(load_diffusers(tmp_path), theirs)
    assert relative_error(ours, expected) < 1e-5


def test_the_legacy_order_matters(tmp_path):
    """What the conversion is for: in the wrong order the weights load all the same, and compute nonsense."""
    network = randomized(UNetModel(**PLAIN))
    wrong = UNetModel(**PLAIN, use_new_attention_order=True).eval()
    wrong.load_state_dict(network.state_dict())
    x, t, _, _ = inputs(network)
    with torch.no_grad():
        assert relative_error(wrong(x, t), network(x, t)) > 0.01


@pytest.fixture
def exported(tmp_path):
    save_diffusers(randomized(UNetModel(**PLAIN)), tmp_path / "unet")
    return tmp_path / "unet"


def change_weights(folder, change) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def change_config(folder, **keys) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def test_missing_extra_and_misshaped_keys_fail_by_their_own_names(exported):
    def change(tensors):
        del tensors["mid_block.attentions.0.to_k.bias"]
        tensors["up_blocks.7.resnets.0.conv1.weight"] = torch.zeros(1)
        tensors["conv_in.bias"] = torch.zeros(3)

    change_weights(exported, change)
    with pytest.raises(KeyMismatch) as caught:
        load_diffusers(exported)
    assert caught.value.missing == {"mid_block.attentions.0.to_k.bias": (32,)}
    assert list(caught.value.extra) == ["up_blocks.7.resnets.0.conv1.weight"]
    assert caught.value.misshaped == {"conv_in.bias": ((3,), (16,))}


def test_names_of_old_folders_are_read(exported):
    expected = load_diffusers(exported)
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def change(tensors):
        for name in list(tensors):
            for now, then in former.items():
                if f".{now}." in name and ".attentions." in name:
                    tensors[name.replace(f".{now}.", f".{then}.")] = tensors.pop(name)

    change_weights(exported, change)
    assert "mid_block.attentions.0.query.weight" in load_file(
        exported / "diffusion_pytorch_model.safetensors"
    )
    assert same_weights(load_diffusers(exported), expected)


@pytest.mark.parametrize(
    "keys, reason",
    [
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos"),
        ({"freq_shift": 1}, "freq_shift"),
        ({"norm_eps": 1e-6}, "norm_eps"),
        ({"downsample_padding": 0}, "downsample_padding"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type"),
        ({"some_later_option": "on"}, "some_later_option"),
        ({"down_block_types": ["SkipDownBlock2D", "AttnDownBlock2D"]}, "SkipDownBlock2D"),
        ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "other levels"),
        ({"down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"]}, "different ways"),
        ({"attention_head_dim": 5}, "does not divide"),
        ({"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": None}, "no norm"),
        ({"class_embed_type": "identity"}, "identity"),
        ({"_class_name": "DiTTransformer2DModel"}, "DiTTransformer2DModel"),
    ],
)
def test_configs_that_cannot_be_built_are_refused(exported, keys, reason):
    change_config(exported, **keys)
    with pytest.raises(UnsupportedCheckpoint, match=reason):
        load_diffusers(exported)


def test_a_later_option_that_is_off_is_no_obstacle(exported):
    change_config(exported, some_later_option=False, another=None, _name_or_path="elsewhere")
    load_diffusers(exported)


@pytest.mark.parametrize(
    "options, reason",
    [
        (
            {**PLAIN, "num_head_channels": -1, "num_heads": 2, "attention_resolutions": [1, 2]},
            "num_head_channels",
        ),
        ({**PLAIN, "num_classes": "sequential", "adm_in_channels": 6}, "projection"),
        ({**PLAIN, "num_res_blocks": [1, 2]}, "num_res_blocks"),
        ({**PLAIN, "conv_resample": False}, "conv_resample"),
        ({**PLAIN, "num_attention_blocks": [1, 1]}, "num_attention_blocks"),
        ({**PLAIN, "channel_mult": [2, 4]}, "model_channels"),
        ({**PLAIN, "n_embed": 7}, "n_embed"),
        ({**PLAIN, "attn_type": "se", "attn_options": {"reduction": 4}}, "attn_type is 'se'"),
        ({**PLAIN, "dims": 1}, "dims"),
        ({**CROSS, "resblock_updown": True}, "resblock_updown"),
        ({**CROSS, "disable_middle_self_attn": True}, "middle"),
        ({**CROSS, "disable_middle_transformer": True}, "middle"),
        ({**CROSS, "transformer_depth_middle": 3}, "depth 3"),
        ({**CROSS, "context_dim": None, "use_spatial_transformer": True}, "context_dim is None"),
    ],
)
def test_networks_that_diffusers_cannot_hold_are_refused(tmp_path, options, reason):
    with pytest.raises(NotExpressible, match=reason):
        save_diffusers(UNetModel(**options), tmp_path / "unet")
    assert list(tmp_path.iterdir()) == []


def test_other_networks_are_refused(tmp_path):
    with pytest.raises(NotExpressible, match="DiT"):
        save_diffusers(
            DiT(input_size=8, patch_size=2, depth=1, hidden_size=32, num_heads=2), tmp_path / "dit"
        )


def test_nothing_is_written_over(exported):
    before = (exported / "config.json").read_bytes()
    with pytest.raises(FileExistsError, match="not empty"):
        save_diffusers(randomized(UNetModel(**CROSS)), exported)
    assert (exported / "config.json").read_bytes() == before
