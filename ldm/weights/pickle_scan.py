"""A walk through a pickle's operations before any of them is carried out.

Python's unpickler is written in C and trusts its input: a memo index of 2^32 makes it allocate that many
entries, and hashing a tuple nested a million deep kills the process. Whatever `find_class` cannot stop is
refused here. For what each operation takes from the stack and leaves there, see Python's `pickletools`.
"""

import pickletools
from dataclasses import dataclass, field
from typing import Any

from ldm.weights.budget import Budget
from ldm.weights.errors import UnsupportedCheckpoint
from ldm.weights.mapped import ByteReader

_MAX_BITS = 2**16
_MAX_KEY_PARTS = 1000  # of a tuple that is a dictionary's key, those of tuples inside included
_HIGHEST_PROTOCOL = 5

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
_GETS = ("GET", "BINGET", "LONG_BINGET")
_PUSHES = {name for name, effect in _EFFECTS.items() if effect == (None, 0, 1)} - {"MARK", *_GETS}
_EXTENSIONS = ("EXT1", "EXT2", "EXT4")
_OUT_OF_BAND = ("NEXT_BUFFER", "READONLY_BUFFER")
_LONGS = ("INT", "LONG", "LONG1", "LONG4")
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")
_CHECKED = {*_EXTENSIONS, *_OUT_OF_BAND, *_LONGS, *_PUTS, "PROTO"}
_TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
# These leave what they change, or are given nothing to do with.
_KEEP = ("BUILD", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "DUP", "MEMOIZE")
# Which of the things taken are hashed.
_KEYS = {
    "SETITEM": slice(1, 2),
    "SETITEMS": slice(1, None, 2),
    "DICT": slice(0, None, 2),
    "ADDITEMS": slice(1, None),
    "FROZENSET": slice(0, None),
}


def scan(file: ByteReader, budget: Budget) -> int:
    """The position behind the pickle that begins where `file` stands.

    Raises:
        CorruptCheckpoint: it is truncated, no pickle, or asks for absurd things.
        UnsafeCheckpoint: it uses copyreg's registry of extensions, whose entries are handed out unseen.
        UnsupportedCheckpoint: a newer protocol, or data that is kept elsewhere.
    """
    sizes, frame_end = _Sizes(budget), None
    for count, (opcode, argument, position) in enumerate(pickletools.genops(file)):
        budget.spend(1)
        # The C unpickler drops what is left of a frame when an operation reaches over its end (PEP 3154
        # forbids that), and would carry out other operations than those seen here.
        if frame_end is not None and position >= frame_end:
            if position > frame_end:
                raise budget.damaged("an operation reaches over the end of its frame")
            frame_end = None
        if opcode.name == "FRAME":
            if frame_end is not None:
                raise budget.damaged("a frame inside a frame")
            frame_end = file.tell() + argument
        if opcode.name in _CHECKED:
            _check_operation(opcode.name, argument, count, budget)
        sizes.follow(opcode.name, argument)
    end = file.tell()
    if frame_end not in (None, end):
        raise budget.damaged("the last frame ends elsewhere than the pickle")
    return end


def _check_operation(name: str, argument: Any, count: int, budget: Budget) -> None:
    if name in _EXTENSIONS:
        raise budget.refusal("copyreg.extension", "looks up something unnamed in")
    if name in _OUT_OF_BAND:
        raise UnsupportedCheckpoint(budget.where, "keeps data outside of its pickle (protocol 5 buffers)")
    if name == "PROTO" and argument > _HIGHEST_PROTOCOL:
        raise UnsupportedCheckpoint(budget.where, f"uses pickle protocol {argument}, newer than 5")
    if name in _PUTS and argument is not None and not 0 <= argument <= count:
        raise budget.damaged(f"memo entry {argument} after {count} operations")
    if name in _LONGS and argument.bit_length() > _MAX_BITS:
        raise budget.damaged(f"a number of {argument.bit_length()} bits")


@dataclass
class _Sizes:
    """The unpickler's stack and memo, where a tuple is its number of parts and all else is 1."""

    budget: Budget
    stack: list[int] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, int] = field(default_factory=dict)

    def follow(self, name: str, argument: int | None) -> None:
        if name in _PUSHES:
            self.stack.append(1)
            return
        if name == "MARK":
            self.marks.append(len(self.stack))
            return
        if name == "POP" and self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
            return
        taken = self._take(name)
        for size in taken[_KEYS[name]] if name in _KEYS else ():
            if size > _MAX_KEY_PARTS:
                raise self.budget.damaged("a dictionary key that is a huge or a deep tuple")
        left = 1
        if name in _TUPLES:
            left = min(1 + sum(taken), _MAX_KEY_PARTS + 1)
        elif name in _KEEP:
            left = taken[0]
        elif name in _GETS:
            left = self.memo[argument]
        self.stack.extend([left] * _EFFECTS[name][2])
        if name in _PUTS:
            self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]

    def _take(self, name: str) -> list[int]:
        below_mark, count, _ = _EFFECTS[name]
        start = len(self.stack) - count if below_mark is None else self.marks.pop() - below_mark
        if start < (self.marks[-1] if self.marks else 0):
            raise self.budget.damaged("an operation without operands")
        taken = self.stack[start:]
        del self.stack[start:]
        return taken
