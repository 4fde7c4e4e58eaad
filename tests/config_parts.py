"""Stand-ins for classes of ours, and what the tests of `ldm.config` ask of its errors."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

import pytest

from ldm.config import ConfigError


class Sizes(TypedDict, total=False):
    width: int
    height: int


class Part:
    """Stands in for a class of ours: `ldm.parts.Part`."""

    def __init__(
        self,
        channels: int,
        rate: float = 0.5,
        name: str = "plain",
        mode: Literal["fast", "exact"] = "fast",
        widths: Sequence[int] = (1, 2),
        inner: Any = None,
        flag: bool = False,
        count: int | Literal["auto"] | None = None,
        sizes: Sizes | None = None,
        untyped=3,
    ):
        if channels < 0:
            raise ValueError("channels must not be negative")
        self.given = dict(channels=channels, rate=rate, name=name, mode=mode, widths=widths, inner=inner)


class AnyKeyword:
    def __init__(self, needed, **options):
        self.options = options


def function(channels: int = 1) -> int:
    return channels


def problems(call, *args, **kwargs) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


@dataclass
class Inner:
    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])


@dataclass
class Training:
    steps: int
    precision: Literal["auto", "32", "bf16"] = "auto"
    inner: Inner = field(default_factory=Inner)
    other: Inner | None = None
    out: Path | None = None
    share: float = 0.5

    def __post_init__(self):
        if self.steps <= 0:
            raise ValueError(f"steps must be positive, got {self.steps}")


@dataclass
class Whole:
    training: Training
    name: str = "run"
    notes: dict = field(default_factory=dict)


MODEL = """\
training:
  steps: 100
  lr: 1e-4
model:
  target: ldm.parts.Part
  params:
    channels: 4
    widths: [1, 2]
    inner:
      target: ldm.parts.Part
      params:
        channels: 8
"""
