"""Where and how precisely a model computes, from the words of the command line."""

import contextlib

import torch
from torch import nn

_TYPES = {"32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """`auto` is a GPU where there is one.

    Raises:
        ValueError: no such device here, in terms of what there is.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"--device {name} is no device; there are auto, cpu, cuda, cuda:1, ..., mps"
        ) from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {name} is not supported; there are auto, cpu, cuda, cuda:1, ..., mps")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch sees no GPU here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, counted from 0")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: torch has no Metal device here; use --device cpu")
    return device


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """A context for a model's computations."""
    if precision == "auto":
        good = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if good else "32"
    if precision not in _TYPES:
        raise ValueError(f"--precision {precision} is unknown; there are auto, {', '.join(_TYPES)}")
    dtype = _TYPES[precision]
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def arranged(model: nn.Module, device: torch.device) -> nn.Module:
    """The model in the memory layout that the device's convolutions like."""
    return model.to(memory_format=torch.channels_last) if device.type == "cuda" else model


def out_of_memory(error: torch.OutOfMemoryError, batch_size: int) -> ValueError:
    hint = "a smaller --batch-size" if batch_size > 1 else "--precision bf16, or a device with more memory"
    return ValueError(f"the GPU's memory does not hold {batch_size} images at a time; try {hint} ({error})")
