"""Where and how precisely a command computes, how far it is, and how it is stopped."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import torch
from torch import nn
from tqdm.auto import tqdm

from ldm.wording import counted

_TYPES = {"32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """`auto` is a GPU where there is one; ValueError where there is no such device here."""
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        name = next(kind for kind, count in there.items() if count)
    kind, colon, number = name.partition(":")
    if kind not in there or (colon and not number.isdecimal()):
        raise ValueError(f"--device {name} is none of auto, cpu, cuda, cuda:1, ..., mps")
    if int(number or 0) >= there[kind]:
        what = counted(there[kind], {"cuda": "GPU", "mps": "Metal device", "cpu": "CPU"}[kind])
        raise ValueError(f"--device {name}: torch sees {what} here, counted from 0")
    return torch.device(name)


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """A context for a model's computations."""
    if precision == "auto":
        good = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if good else "32"
    if precision not in _TYPES:
        raise ValueError(f"--precision {precision} is unknown; there are auto, {', '.join(_TYPES)}")
    return torch.autocast(device.type, _TYPES[precision], enabled=precision != "32")


def arranged(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on the device, in the memory layout that its convolutions like there."""
    model = model.to(device)
    return model.to(memory_format=torch.channels_last) if device.type == "cuda" else model


def progress_bar(total: int | None, text: str, shown: bool = True) -> tqdm:
    """A bar counting images, on stderr: a terminal follows every tenth of a second; a log file should not."""
    least, most = (0.1, 10.0) if sys.stderr.isatty() else (15.0, 60.0)
    bar = {"desc": text, "unit": "image", "dynamic_ncols": True, "disable": not shown}
    return tqdm(total=total, mininterval=least, maxinterval=most, **bar)


@contextlib.contextmanager
def lasting_interruption() -> Iterator[Callable[[], None]]:
    """Inside, Ctrl-C raises KeyboardInterrupt as ever, and the function given raises it again.

    Python drops what is raised in a destructor; a loop that calls the function ends all the same.
    """
    asked = threading.Event()

    def handler(number: int, frame) -> None:
        asked.set()
        raise KeyboardInterrupt

    def check() -> None:
        if asked.is_set():
            raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield check
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
