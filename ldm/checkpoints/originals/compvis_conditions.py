"""The models of conditions in CompVis' YAMLs, in our terms.

Each translator takes the part, the batch's key and the kind of the condition, and gives `{target, params}`
of an embedder whose parameter names are the original's.
"""

from collections.abc import Callable
from typing import Any

from ldm.arguments import arguments_of
from ldm.checkpoints.description import node
from ldm.checkpoints.originals.original_yaml import Part
from ldm.conditioning import ClassEmbedder, ClassLabel, Embedder
from ldm.conditioning.bert import BERTEmbedder
from ldm.conditioning.clip import CLIPTextEmbedder
from ldm.conditioning.vectors import ClassFeatures

# Chosen when the model is loaded, or by training.
EMBEDDER_IGNORED = ("device", "freeze")
# Parameters of BERTEmbedder: theirs, ours.
_BERT = {
    "n_embed": "dim",
    "n_layer": "depth",
    "vocab_size": "vocab_size",
    "max_seq_len": "max_length",
    "use_tokenizer": "texts",
    "embedding_dropout": "dropout",
}

# name on the hub: (width, layers, heads). All are OpenAI's: 49408 tokens, 77 of them a text, QuickGELU.
CLIP_VERSIONS = {
    "openai/clip-vit-large-patch14": (768, 12, 12),
    "openai/clip-vit-large-patch14-336": (768, 12, 12),
    "openai/clip-vit-base-patch32": (512, 12, 8),
    "openai/clip-vit-base-patch16": (512, 12, 8),
}
# architecture: (width, layers, heads, length of the projected vector), as in open_clip's model configs.
OPEN_CLIP_VERSIONS = {
    "ViT-H-14": (1024, 24, 16, 1024),
    "ViT-bigG-14": (1280, 32, 20, 1280),
    "ViT-g-14": (1024, 24, 16, 1024),
    "ViT-L-14": (768, 12, 12, 768),
    "ViT-B-32": (512, 12, 8, 512),
    "ViT-B-16": (512, 12, 8, 512),
}


def class_embedder(part: Part, key: str, kind: str) -> dict:
    params = {"num_classes": part.take("n_classes", 1000), "dim": part.take("embed_dim"), "kind": kind}
    also = [name for name in dict.fromkeys((part.take("key", "class"), key)) if name != "label"]
    return part.node("conditioning.vectors.ClassFeatures", **params, key="label", also=also)


def bert_embedder(part: Part, key: str, kind: str, **fixed: Any) -> dict:
    target = "conditioning.bert.BERTEmbedder"
    return part.node(target, renamed=_BERT, ignored=EMBEDDER_IGNORED, key=key, **fixed)


def transformer_embedder(part: Part, key: str, kind: str) -> dict:
    return bert_embedder(part, key, kind, texts=False)


def spatial_rescaler(part: Part, key: str, kind: str, *more: str) -> dict:
    given = ("method", "multiplier", "in_channels", "out_channels", "bias", *more)
    return part.node("conditioning.maps.SpatialRescaler", *given, renamed={"n_stages": "stages"}, key=key)


def clip_embedder(part: Part, key: str, kind: str) -> dict:
    """FrozenCLIPEmbedder, of all three projects."""
    version = part.take("version", "openai/clip-vit-large-patch14")
    sizes = _sizes(part, "version", version, CLIP_VERSIONS)
    params = part.given("max_length", "layer", layer_idx="layer_index", always_return_pooled="pooled")
    if params.get("layer", "last") != "hidden":  # the originals take a layer_idx and do not read it
        params.pop("layer_index", None)
    part.finish(*EMBEDDER_IGNORED)
    return node("conditioning.clip.CLIPTextEmbedder", key=key, **sizes, tokenizer=version, **params)


def open_clip_embedder(part: Part, key: str, kind: str, normed: bool = True, **fixed: Any) -> dict:
    """FrozenOpenCLIPEmbedder: token features behind the last norm."""
    arch, version = part.take("arch", "ViT-H-14"), part.take("version", "laion2b_s32b_b79k")
    fixed |= _sizes(part, "arch", arch, OPEN_CLIP_VERSIONS) | {"layer": part.take("layer", "last")}
    fixed["activation"] = "quick_gelu" if version == "openai" else "gelu"  # OpenAI's own weights
    target = "conditioning.open_clip.OpenCLIPTextEmbedder"
    return part.node(target, "max_length", ignored=EMBEDDER_IGNORED, key=key, normed=normed, **fixed)


def _sizes(part: Part, name: str, version: str, known: dict[str, tuple]) -> dict[str, Any]:
    """Sizes of a published transformer, by the name that YAMLs use."""
    if version not in known:
        part.problem(name, f"{version!r} is not known; known are {', '.join(known)}")
    return dict(zip(("width", "layers", "heads", "embed_dim"), known.get(version, ()), strict=False))


def ready_features(part: Part, key: str, kind: str) -> dict:
    """torch.nn.Identity: the batch holds the condition as the network takes it."""
    part.finish()
    if kind == "concat":
        return node("conditioning.maps.ImageMap", key=key)
    return node("conditioning.vectors.Features", key=key, kind=kind)


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


def original_condition(embedder: Embedder) -> tuple[str, str, dict] | None:
    """(conditioning_key, cond_stage_key, cond_stage_config) of one embedder, if the original has it."""
    if type(embedder) is ClassLabel:
        return "adm", "class_label", {"target": "torch.nn.Identity"}
    describe = _ORIGINALS.get(type(embedder))
    found = describe(embedder) if describe else None
    if found is None:
        return None
    name, params = found
    key = "class_label" if name == "ClassEmbedder" else embedder.key
    return "crossattn", key, {"target": _ENCODERS + name, "params": params}


def _of_classes(embedder: ClassEmbedder | ClassFeatures) -> tuple[str, dict] | None:
    rows, dim = embedder.embedding.weight.shape  # the row of no class, if any, counts as a class there
    params = {"n_classes": rows, "embed_dim": dim, "key": "class_label"}
    return ("ClassEmbedder", params) if embedder.kind == "crossattn" else None


def _of_bert(embedder: BERTEmbedder) -> tuple[str, dict] | None:
    made = arguments_of(embedder)
    params = {theirs: made[ours] for theirs, ours in _BERT.items()}
    return ("BERTEmbedder", params) if (made["heads"], made["dim_head"]) == (8, 64) else None  # fixed there


def _of_clip(embedder: CLIPTextEmbedder) -> tuple[str, dict] | None:
    """By its sizes; which tokenizer it has tells versions of the same size apart."""
    made = arguments_of(embedder)
    sizes = tuple(made[name] for name in ("width", "layers", "heads"))
    published = {"vocab_size": 49408, "max_length": 77, "activation": "quick_gelu", "layer": "last"}
    alike = all(made[name] == value for name, value in published.items()) and not made["pooled"]
    versions = dict.fromkeys((made["tokenizer"], *CLIP_VERSIONS))
    version = next((name for name in versions if CLIP_VERSIONS.get(name) == sizes), None)
    if not alike or made["mlp_width"] not in (None, 4 * made["width"]) or version is None:
        return None
    return "FrozenCLIPEmbedder", {"version": version}


_ORIGINALS: dict[type, Callable] = {
    ClassEmbedder: _of_classes,
    ClassFeatures: _of_classes,
    BERTEmbedder: _of_bert,
    CLIPTextEmbedder: _of_clip,
}
