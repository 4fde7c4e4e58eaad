"""What makes networks fast without changing what they compute: memory and its layout, compilation."""

import ctypes

import torch
from torch import nn

from ldm.models import vit
from ldm.models.dit import DiTBlock
from ldm.nn.attention import AttentionBlock
from ldm.nn.resblock import ResBlock, TimestepResBlock
from ldm.nn.transformer import SpatialTransformer

BLOCKS: tuple[type[nn.Module], ...] = (
    ResBlock,
    TimestepResBlock,
    AttentionBlock,
    SpatialTransformer,
    DiTBlock,
    vit.Block,
)


def channels_last(module: nn.Module) -> nn.Module:
    """Lay out the weights of 2D convolutions so that images are computed channels last, in place.

    That is what tensor cores want, and it saves a quarter of a small autoencoder's step on a CPU too.
    """
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return module


def keep_freed_memory() -> None:
    """Let glibc keep what a step on the CPU frees for the next step; does nothing where there is no glibc.

    Otherwise it gives the memory of all activations back after each step and gets it again page by page: 4 %
    of the quickstart's time.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    for parameter in (trim_threshold, mmap_threshold):
        mallopt(parameter, 1 << 30)


#: Forms of one block: in training and evaluation, with gradients and without, with autocast and without.
_MODES = 4


def compile_blocks(module: nn.Module, **options) -> int:
    """Compile every repeated block of the networks in place; returns how many. Names of parameters stay.

    Blocks that are alike share one compiled form, so compiling stays short. All others are forms of the same
    code to torch, which gives up after eight and goes on without a word: it is told how many to expect.

    Args:
        options: of `torch.compile`.
    """
    blocks = [block for block in module.modules() if isinstance(block, BLOCKS)]
    limits, forms = torch._dynamo.config, _MODES * max(len(blocks), 1)
    limits.recompile_limit = max(limits.recompile_limit, forms)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, forms * len(BLOCKS))
    for block in blocks:
        block.compile(**options)
    return len(blocks)
