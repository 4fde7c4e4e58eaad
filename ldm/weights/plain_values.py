"""Values out of what a pickle describes, each made once: what was shared stays shared, and loops end."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ldm.weights.budget import Budget
from ldm.weights.placeholders import GlobalName, Placeholder
from ldm.weights.recovered_objects import recovery_of
from ldm.weights.tensors import DTYPES, REBUILD, Storage, storage_dtype
from ldm.weights.unpickle import Described, Name, StoredStorage

# (key, type of the elements, number of elements, (key of a view, its offset, its size) or None) -> memory
StorageLoader = Callable[[str, torch.dtype, int, Any], torch.UntypedStorage]

_MAX_DEPTH = 100
_MAX_KEY_DEPTH = 4
_HASHABLE = str | bytes | int | float | complex | frozenset | torch.Tensor | Placeholder


class PlainValues:
    """Recovers tensors, containers, numbers, text and arrays (see `ldm.weights.recovered_objects`).

    Every other object becomes a `Placeholder`, every other name a `GlobalName`.
    """

    def __init__(self, budget: Budget, load_storage: StorageLoader):
        self.budget = budget
        self._load_storage = load_storage
        self._done: dict[int, tuple[Any, Any]] = {}
        self._unfilled: list[tuple[Placeholder, Described]] = []
        self._depth = 0

    def recover(self, root: Any) -> Any:
        """The values of a whole description.

        Raises:
            CheckpointError: damaged, absurd or refused, as in `describe`.
        """
        with self.budget.blamed_on_the_file():
            value = self(root)
            while self._unfilled:  # no recursion: objects refer to one another without end
                placeholder, described = self._unfilled.pop()
                placeholder.arguments = tuple(map(self, described.arguments))
                placeholder.state = self(described.state)
                placeholder.items = self(described.items)
                placeholder.mapping = self(described.mapping)
            return value

    def __call__(self, value: Any) -> Any:
        """The value of one part of the description."""
        if isinstance(value, Name):
            dtype = DTYPES.get(value.full.name) if value.full.module == "torch" else None
            return value.full if dtype is None else dtype
        if isinstance(value, str) and not value.isascii():
            return self._remembered(value, self._text)
        if isinstance(value, Described):
            return self._remembered(value, self._object)
        if isinstance(value, dict | list | tuple | set | frozenset):
            return self._remembered(value, self._container)
        return value

    def key(self, value: Any, depth: int = 0) -> Any:
        """The value of a dictionary's key or a set's element: only what is quickly hashed is recovered."""
        if isinstance(value, tuple):
            if depth == _MAX_KEY_DEPTH:
                raise self.budget.damaged("a dictionary key that is a deep nest of tuples")
            self.budget.spend(len(value))
            return tuple(self.key(part, depth + 1) for part in value)
        plain = self(value)
        if isinstance(value, Described) and not isinstance(plain, _HASHABLE):
            return self._placeholder(value)
        return plain

    def fill(self, owner: Any, pairs: Iterable[tuple[Any, Any]]) -> dict:
        """A dict in the place of `owner`, which may be inside of it."""
        result = self._becomes(owner, {})
        for key, value in pairs:
            result[self.key(key)] = self(value)
        return result

    def encode(self, text: str, encoding: str) -> bytes:
        self.budget.spend_bytes(len(text))
        return text.encode(encoding, "surrogateescape")

    def _becomes(self, value: Any, result: Any) -> Any:
        self._done[id(value)] = value, result  # an id is good for as long as its object lives
        return result

    def _remembered(self, value: Any, recover: Callable[[Any], Any]) -> Any:
        if id(value) not in self._done:
            if self._depth > _MAX_DEPTH:
                raise self.budget.damaged(f"containers more than {_MAX_DEPTH} deep")
            self._depth += 1
            self._becomes(value, recover(value))
            self._depth -= 1
        return self._done[id(value)][1]

    def _text(self, value: str) -> str | bytes:
        try:
            value.encode()
        except UnicodeEncodeError:  # bytes of Python 2 that are no text, see `ldm.weights.unpickle`
            return self.encode(value, "utf-8")
        return value

    def _container(self, value: dict | list | tuple | set | frozenset) -> Any:
        if isinstance(value, dict):
            return self.fill(value, value.items())
        if isinstance(value, list):
            result = self._becomes(value, [])
            result.extend(map(self, value))
            return result
        if isinstance(value, tuple):
            self._becomes(value, GlobalName("builtins", "tuple"))  # what it sees if it contains itself
            return tuple(map(self, value))
        return type(value)(map(self.key, value))

    def _object(self, value: Described) -> Any:
        if isinstance(value, StoredStorage):
            key, count, view = value.arguments
            dtype = storage_dtype(value.kind, self.budget.where)
            return Storage(self._load_storage(key, dtype, count, view), dtype)
        self._becomes(value, value.kind)  # what it sees if it contains itself
        if str(value.kind) in REBUILD:
            return REBUILD[str(value.kind)](self.budget, *map(self, value.arguments))
        recover = recovery_of(value)
        result = value if recover is None else recover(self, value)
        return self._placeholder(value) if result is value else result

    def _placeholder(self, value: Described) -> Placeholder:
        """A placeholder, to be filled when everything that is not inside of one is done."""
        placeholder = Placeholder(value.kind)
        self._unfilled.append((placeholder, value))
        return placeholder
