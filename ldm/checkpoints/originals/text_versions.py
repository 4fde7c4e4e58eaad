"""Sizes of the published CLIP text encoders, by the names that YAMLs use."""

from typing import Any

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


def clip_sizes(version: str) -> dict[str, Any]:
    """Arguments of `CLIPTextEmbedder`."""
    width, layers, heads = CLIP_VERSIONS[version]
    return {"width": width, "layers": layers, "heads": heads, "tokenizer": version}


def open_clip_sizes(arch: str, version: str) -> dict[str, Any]:
    """Arguments of `OpenCLIPTextEmbedder`; OpenAI's own weights have QuickGELU."""
    width, layers, heads, embed_dim = OPEN_CLIP_VERSIONS[arch]
    activation = "quick_gelu" if version == "openai" else "gelu"
    return {
        "width": width,
        "layers": layers,
        "heads": heads,
        "embed_dim": embed_dim,
        "activation": activation,
    }
