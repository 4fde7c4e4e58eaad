"""The models of conditions in CompVis' YAMLs, in our terms.

Each translator takes the part, the batch's key and the kind of the condition, and gives `{target, params}`
of an embedder whose parameter names are the original's.
"""

from collections.abc import Callable
from typing import Any

from ldm.checkpoints.original_yaml import Part
from ldm.checkpoints.text_versions import CLIP_VERSIONS, OPEN_CLIP_VERSIONS, clip_sizes, open_clip_sizes
from ldm.checkpoints.translation import take_given

EMBEDDER_IGNORED = {"device": "chosen when the model is loaded", "freeze": "what training changes"}


def class_embedder(part: Part, key: str, kind: str) -> dict:
    own = part.take("key", "class")
    params = {
        "num_classes": part.take("n_classes", 1000),
        "dim": part.take("embed_dim"),
        "kind": kind,
        "key": "label",
        "also": list(dict.fromkeys(name for name in (own, key) if name != "label")),
    }
    part.finish()
    return {"target": "ldm.conditioning.vectors.ClassFeatures", "params": params}


def bert_embedder(part: Part, key: str, kind: str) -> dict:
    renames = {"n_embed": "dim", "n_layer": "depth", "vocab_size": "vocab_size", "max_seq_len": "max_length"}
    renames |= {"use_tokenizer": "texts", "embedding_dropout": "dropout"}
    params = {"key": key} | take_given(part, renames)
    part.ignore(EMBEDDER_IGNORED)
    part.finish()
    return {"target": "ldm.conditioning.bert.BERTEmbedder", "params": params}


def transformer_embedder(part: Part, key: str, kind: str) -> dict:
    node = bert_embedder(part, key, kind)
    node["params"]["texts"] = False
    return node


def spatial_rescaler(part: Part, key: str, kind: str) -> dict:
    names = ("method", "multiplier", "in_channels", "out_channels", "bias")
    params = {"key": key} | take_given(part, {"n_stages": "stages"} | {name: name for name in names})
    part.finish()
    return {"target": "ldm.conditioning.maps.SpatialRescaler", "params": params}


def clip_embedder(part: Part, key: str, kind: str) -> dict:
    """FrozenCLIPEmbedder, of all three projects."""
    version = part.take("version", "openai/clip-vit-large-patch14")
    params = {"key": key, **clip_sizes(version)} if version in CLIP_VERSIONS else {"key": key}
    if version not in CLIP_VERSIONS:
        part.problem("version", f"{version!r} is not known; known are {', '.join(CLIP_VERSIONS)}")
    params |= take_given(
        part,
        {
            "max_length": "max_length",
            "layer": "layer",
            "layer_idx": "layer_index",
            "always_return_pooled": "pooled",
        },
    )
    if params.get("layer", "last") != "hidden":  # the originals take a layer_idx and do not read it
        params.pop("layer_index", None)
    part.ignore(EMBEDDER_IGNORED)
    part.finish()
    return {"target": "ldm.conditioning.clip.CLIPTextEmbedder", "params": params}


def open_clip_embedder(part: Part, key: str, kind: str) -> dict:
    """FrozenOpenCLIPEmbedder: token features behind the last norm."""
    params = {"key": key, **_open_clip(part), "layer": part.take("layer", "last"), "normed": True}
    part.ignore(EMBEDDER_IGNORED)
    part.finish()
    return {"target": "ldm.conditioning.open_clip.OpenCLIPTextEmbedder", "params": params}


def _open_clip(part: Part) -> dict[str, Any]:
    arch, version = part.take("arch", "ViT-H-14"), part.take("version", "laion2b_s32b_b79k")
    length = take_given(part, {"max_length": "max_length"})
    if arch not in OPEN_CLIP_VERSIONS:
        part.problem("arch", f"{arch!r} is not known; known are {', '.join(OPEN_CLIP_VERSIONS)}")
        return length
    return open_clip_sizes(arch, version) | length


def ready_features(part: Part, key: str, kind: str) -> dict:
    """torch.nn.Identity: the batch holds the condition as the network takes it."""
    part.finish()
    if kind == "concat":
        return {"target": "ldm.conditioning.maps.ImageMap", "params": {"key": key}}
    return {"target": "ldm.conditioning.vectors.Features", "params": {"key": key, "kind": kind}}


_ENCODERS = "ldm.modules.encoders.modules."
EMBEDDERS: dict[str, Callable[[Part, str, str], dict]] = {
    _ENCODERS + "ClassEmbedder": class_embedder,
    _ENCODERS + "BERTEmbedder": bert_embedder,
    _ENCODERS + "TransformerEmbedder": transformer_embedder,
    _ENCODERS + "SpatialRescaler": spatial_rescaler,
    _ENCODERS + "FrozenCLIPEmbedder": clip_embedder,
    _ENCODERS + "FrozenOpenCLIPEmbedder": open_clip_embedder,
    "torch.nn.Identity": ready_features,
}
