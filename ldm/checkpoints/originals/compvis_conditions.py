"""The models of conditions in CompVis' YAMLs, in our terms.

Each translator takes the part, the batch's key and the kind of the condition, and gives `{target, params}`
of an embedder whose parameter names are the original's.
"""

from collections.abc import Callable
from typing import Any

import torch

from ldm.checkpoints.originals.original_yaml import Part
from ldm.checkpoints.originals.text_versions import (
    CLIP_VERSIONS,
    OPEN_CLIP_VERSIONS,
    clip_sizes,
    open_clip_sizes,
)
from ldm.checkpoints.originals.translation import take_given
from ldm.conditioning import ClassEmbedder, Embedder
from ldm.conditioning.bert import BERTEmbedder
from ldm.conditioning.clip import CLIPTextEmbedder
from ldm.conditioning.vectors import ClassFeatures

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


# And back


def original_condition(embedder: Embedder) -> tuple[str, dict] | None:
    """(cond_stage_key, `{target, params}` of the original's class) of one embedder; None if it has none."""
    describe = _ORIGINALS.get(type(embedder))
    found = describe(embedder) if describe else None
    if found is None:
        return None
    name, params = found
    key = "class_label" if name == "ClassEmbedder" else embedder.key
    return key, {"target": _ENCODERS + name, "params": params}


def _of_classes(embedder: ClassEmbedder | ClassFeatures) -> tuple[str, dict] | None:
    if embedder.kind != "crossattn":
        return None
    rows, dim = embedder.embedding.weight.shape  # the row of no class, if any, counts as a class there
    return "ClassEmbedder", {"n_classes": rows, "embed_dim": dim, "key": "class_label"}


def _of_bert(embedder: BERTEmbedder) -> tuple[str, dict] | None:
    transformer = embedder.transformer
    layers = transformer.attn_layers.layers
    attention = layers[0][1]
    if (attention.heads, attention.to_q.out_features) != (8, 512):  # fixed there
        return None
    vocabulary, dim = transformer.token_emb.weight.shape
    return "BERTEmbedder", {
        "n_embed": dim,
        "n_layer": len(layers) // 2,
        "vocab_size": vocabulary,
        "max_seq_len": embedder.max_length,
        "use_tokenizer": embedder.texts,
        "embedding_dropout": transformer.emb_dropout.p,
    }


def _of_clip(embedder: CLIPTextEmbedder) -> tuple[str, dict] | None:
    """By its sizes; which tokenizer it has tells versions of the same size apart."""
    sizes = {name: tuple(tensor.shape) for name, tensor in embedder.state_dict().items()}
    for version in dict.fromkeys((embedder.source, *CLIP_VERSIONS)):
        if version not in CLIP_VERSIONS or embedder.layer != "last" or embedder.pooled:
            continue
        with torch.device("meta"):
            same = CLIPTextEmbedder(**clip_sizes(version))
        layer, other = (e.transformer.text_model.encoder.layers[0] for e in (embedder, same))
        alike = type(layer.mlp.activation) is type(other.mlp.activation)
        if (
            alike
            and layer.self_attn.heads == other.self_attn.heads
            and sizes == {name: tuple(tensor.shape) for name, tensor in same.state_dict().items()}
        ):
            return "FrozenCLIPEmbedder", {"version": version}
    return None


_ORIGINALS: dict[type, Callable] = {
    ClassEmbedder: _of_classes,
    ClassFeatures: _of_classes,
    BERTEmbedder: _of_bert,
    CLIPTextEmbedder: _of_clip,
}
