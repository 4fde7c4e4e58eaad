"""The text encoder of a Stable Diffusion 1 pipeline: transformers' CLIPTextModel beside its tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoints.diffusers.model_config import read_config
from ldm.weights.errors import CorruptCheckpoint
from ldm.weights.reading import read_weights

ENCODER, TOKENIZER = "text_encoder", "tokenizer"
_END_OF_TEXT = "<|endoftext|>"
_PREFIX = "text_model."
_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_SIZES = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_length",
    "hidden_size": "width",
    "intermediate_size": "mlp_width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "hidden_act": "activation",
}


def text_part(folder: Path, classes: Mapping[str, str]) -> tuple[dict[str, Any] | None, str]:
    """(target and params of the conditioner that does what the pipeline does with texts, or None; why not).

    Args:
        folder: of the pipeline.
        classes: name of each part -> its class.
    """
    kinds = [kind for name, kind in classes.items() if name.startswith(ENCODER)]
    if kinds != ["CLIPTextModel"] or classes.get(ENCODER) != "CLIPTextModel":
        return None, f"text encoders {', '.join(kinds)}" if kinds else "no text encoder"
    padding = _padding(folder / TOKENIZER)
    if padding != _END_OF_TEXT:  # CLIPTextEmbedder's empty text is padded with the end of text, as SD 1's is
        return None, f"a tokenizer that pads with {padding!r}"
    config = read_config(folder / ENCODER / "config.json")
    missing = [name for name in _SIZES if name not in config]
    if missing:
        raise CorruptCheckpoint(str(folder / ENCODER / "config.json"), f"lacks {', '.join(missing)}")
    if config["hidden_act"] not in ("gelu", "quick_gelu") or config.get("layer_norm_eps", 1e-5) != 1e-5:
        return None, f"hidden_act={config['hidden_act']!r}, layer_norm_eps={config.get('layer_norm_eps')}"
    params = {ours: config[theirs] for theirs, ours in _SIZES.items()}
    embedder = {
        "target": "ldm.conditioning.clip.CLIPTextEmbedder",
        "params": {**params, "tokenizer": str((folder / TOKENIZER).resolve())},
    }
    return {"target": "ldm.conditioning.Conditioner", "params": {"embedders": [embedder]}}, ""


def text_tensors(folder: Path) -> dict[str, Tensor]:
    """The encoder's weights under the conditioner's names, constant buffers left out."""
    part = folder / ENCODER
    file = next((part / name for name in _FILES if (part / name).is_file()), None)
    if file is None:
        raise CorruptCheckpoint(str(part), f"has none of {', '.join(_FILES)}")
    tensors = read_weights(file).tensors
    # Later releases of transformers write the names without their beginning.
    named = {
        n if n.startswith(_PREFIX) else _PREFIX + n: t
        for n, t in tensors.items()
        if not n.endswith("position_ids")
    }
    return {f"embedders.0.transformer.{name}": tensor for name, tensor in named.items()}


def _padding(folder: Path) -> str | None:
    """The token with which a tokenizer's folder says that texts are padded."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            token = read_config(folder / name).get("pad_token")
            if token is not None:
                return token.get("content") if isinstance(token, dict) else token
    return None
