"""A walk through a pickle's operations before any of them is carried out, and what it may ask for in all.

Python's unpickler is written in C and trusts its input: a memo index of 2^32 makes it allocate that many
entries, and hashing a tuple nested a million deep kills the process. Whatever `find_class` cannot stop is
refused here. For what each operation takes from the stack and leaves there, see Python's `pickletools`.
"""

import contextlib
import pickle
import pickletools
from collections.abc import Iterator
from typing import BinaryIO

from ldm.weights.errors import CheckpointError, CorruptCheckpoint, UnsafeCheckpoint

# The largest published training states need some 10^5 steps; each step costs at most about a hundred bytes.
MAX_STEPS = 10_000_000
BYTES_A_STEP = 100
_MAX_KEY_PARTS = 1000  # of a tuple that is a dictionary's key, those of tuples inside included

_MARK = pickletools.markobject
# Name -> number of things below the mark that it takes (None without a mark), taken in all, left behind.
_EFFECTS = {
    opcode.name: (
        opcode.stack_before.index(_MARK) if _MARK in opcode.stack_before else None,
        len(opcode.stack_before),
        len(opcode.stack_after),
    )
    for opcode in pickletools.opcodes
}
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")
# Which of the things taken are hashed.
_KEYS = {"SETITEM": slice(1, 2), "SETITEMS": slice(1, None, 2), "DICT": slice(0, None, 2)}
_KEYS |= {"ADDITEMS": slice(1, None), "FROZENSET": slice(0, None)}
# What goes wrong in code that is fed nonsense.
_FAILURES = (ArithmeticError, AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError)


class Budget:
    """Counts what the pickles of one file ask for; `where` is the file, for messages."""

    def __init__(self, where: str):
        self.where = where
        self._spent = 0

    def spend(self, steps: int) -> None:
        """Raises CorruptCheckpoint when the file has asked for absurdly much."""
        self._spent += steps
        if self._spent > MAX_STEPS:
            raise self.damaged(f"it asks for more than {MAX_STEPS:,} objects")

    def require(self, condition: bool, otherwise: str) -> None:
        if not condition:
            raise self.damaged(otherwise)

    def damaged(self, what: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(self.where, f"the pickle inside is damaged or truncated: {what}")

    def refusal(self, name: object, what: str, hint: str = "") -> UnsafeCheckpoint:
        return UnsafeCheckpoint(self.where, str(name), what, hint)

    @contextlib.contextmanager
    def blamed_on_the_file(self) -> Iterator[None]:
        """Code that is fed whatever a file holds: where it fails, the file is damaged."""
        try:
            yield
        except CheckpointError:
            raise
        except (*_FAILURES, pickle.UnpicklingError) as error:
            raise self.damaged(f"{type(error).__name__}: {str(error)[:200]}") from error


def scan(file: BinaryIO, budget: Budget) -> None:
    """Read one pickle from where `file` stands; raises CheckpointError if it asks for absurd things, or uses
    copyreg's registry of extensions, whose entries are handed out unseen."""
    sizes, frame_end = _Sizes(budget), None
    for count, (opcode, argument, position) in enumerate(pickletools.genops(file)):
        name = opcode.name
        budget.spend(1)
        # The C unpickler drops what is left of a frame when an operation reaches over its end (PEP 3154
        # forbids that), and would carry out other operations than those seen here.
        if frame_end is not None and position >= frame_end:
            budget.require(position == frame_end, "an operation reaches over the end of its frame")
            frame_end = None
        if name == "FRAME":
            budget.require(frame_end is None, "a frame inside a frame")
            frame_end = file.tell() + argument
        elif name.startswith("EXT"):
            raise budget.refusal("copyreg.extension", "looks up something unnamed in")
        elif name in _PUTS and argument is not None:
            budget.require(0 <= argument <= count, f"memo entry {argument} after {count} operations")
        budget.require(name != "LONG4", "a number of more than 255 bytes")
        sizes.follow(name, argument)
    budget.require(frame_end in (None, file.tell()), "the last frame ends elsewhere than the pickle")


class _Sizes:
    """The unpickler's stack and memo, with the number of parts in the place of each tuple.

    What stands in the place of other things does not matter; nor what follows an operation that lacks its
    operands, where the unpickler itself stops.
    """

    def __init__(self, budget: Budget):
        self._budget = budget
        self._stack, self._marks, self._memo = [], [], {}

    def follow(self, name: str, argument: int | None) -> None:
        stack = self._stack
        if name == "MARK":
            self._marks.append(len(stack))
            return
        if name == "POP" and self._marks and self._marks[-1] == len(stack):
            self._marks.pop()
            return
        below_mark, count, left = _EFFECTS[name]
        start = len(stack) - count if below_mark is None else self._marks.pop() - below_mark
        taken = stack[start:]
        del stack[start:]
        keys = taken[_KEYS[name]] if name in _KEYS else []
        self._budget.require(max(keys, default=0) <= _MAX_KEY_PARTS, "a key that is a huge or a deep tuple")
        size = taken[0] if taken else 1  # most leave what they change
        if name.startswith("TUPLE"):
            size = min(1 + sum(taken), _MAX_KEY_PARTS + 1)
        elif name.endswith("GET"):
            size = self._memo[argument]
        stack.extend([size] * left)
        if name in _PUTS:
            self._memo[len(self._memo) if argument is None else argument] = stack[-1]
