"""How batches leave worker processes: small, in memory that is surely there; and errors, as they were
raised."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from ldm.data.images.dataset import Entry
from ldm.data.images.decode import BadImageError
from ldm.data.images.pixels import normalize_pixels
from ldm.data.loading.shared_memory import SharedMemoryFull, to_shared


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """`value` with a function applied to each tensor in its dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [map_tensors(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


class Parcel:
    """A batch in shared memory; where `compact`, its "image" is still uint8, a quarter of the bytes."""

    def __init__(self, batch: Any, compact: bool):
        self.batch, self.compact = batch, compact

    def unpack(self) -> Any:
        """The batch in this process's own memory: what lies in the shared one is freed with the parcel."""
        if not self.compact:
            return map_tensors(torch.clone, self.batch)
        images = normalize_pixels(self.batch["image"])
        others = {key: map_tensors(torch.clone, value) for key, value in self.batch.items() if key != "image"}
        return {key: images if key == "image" else others[key] for key in self.batch}

    def pin_memory(self) -> Any:
        """For the DataLoader's pinning thread, which knows this name; it does the unpacking, too."""
        return map_tensors(torch.Tensor.pin_memory, self.unpack())


class Failure:
    """An error that is for the user to read, on its way to the main process."""

    def __init__(self, error: Exception):
        self.error = error


class WorkerSide(Dataset):
    """What a worker process has of a data set: it makes whole batches, or says why it cannot.

    torch would send an error as a new one of the same class whose message is the traceback. That is right for
    a bug, and hides what a bad file or a full disk means.

    Args:
        dataset: map-style. With a method `compact(entry)`, which gives a sample whose image is uint8, and
            `compact` set here, samples come from that.
        collate_fn: makes a batch of a list of samples.
    """

    def __init__(self, dataset: Dataset, collate_fn: Callable, compact: bool):
        self.dataset, self.collate_fn, self.compact = dataset, collate_fn, compact

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, entries: Sequence[Entry]) -> Parcel | Failure:
        try:
            return Parcel(map_tensors(to_shared, self.collate_fn(self._samples(entries))), self.compact)
        except (BadImageError, SharedMemoryFull) as error:
            return Failure(error)
        except OSError as error:  # of a plain kind: one of its subclasses need not survive pickling
            plain = (error.errno, error.strerror, error.filename) if error.errno else (str(error),)
            return Failure(OSError(*plain))

    def _samples(self, entries: Sequence[Entry]) -> Any:
        if self.compact:
            return [self.dataset.compact(entry) for entry in entries]
        if hasattr(self.dataset, "__getitems__"):
            return self.dataset.__getitems__(entries)
        return [self.dataset[entry] for entry in entries]


def as_it_is(batch: Any) -> Any:
    return batch


def open_parcel(parcel: Any) -> Any:
    """The batch of a parcel or of what the pinning thread made of one; raises the error of a failure."""
    if isinstance(parcel, Failure):
        raise parcel.error
    return parcel.unpack() if isinstance(parcel, Parcel) else parcel
