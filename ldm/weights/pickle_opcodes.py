"""The opcodes of pickle protocols 0 to 5, as Python's `pickletools` documents them.

Opcodes that can only serve to call something (INST, OBJ, NEWOBJ_EX, EXT) are refused here; what GLOBAL,
REDUCE, NEWOBJ and BUILD may do is decided by the machine (`ldm.weights.unpickle`).
"""

from collections.abc import Callable
from typing import Any, Protocol

from ldm.weights.errors import CorruptCheckpoint, UnsafeCheckpoint, UnsupportedCheckpoint
from ldm.weights.pickle_builders import checked_key
from ldm.weights.placeholders import name_of


class Stack(Protocol):
    """What an opcode needs of the unpickler: input, a stack with marks, a memo, and the six decisions."""

    where: str
    stack: list[Any]
    marks: list[int]
    memo: dict[int, Any]

    def spend(self, work: int) -> None: ...
    def spend_bytes(self, count: int) -> None: ...
    def damaged(self, what: str) -> CorruptCheckpoint: ...
    def take(self, count: int) -> memoryview: ...
    def number(self, form: str) -> Any: ...
    def line(self) -> str: ...
    def pop(self) -> Any: ...
    def top(self) -> Any: ...
    def pop_to_mark(self) -> list: ...
    def mention(self, module: Any, name: Any) -> Any: ...
    def call(self, function: Any, arguments: Any) -> Any: ...
    def construct(self, kind: Any, arguments: Any) -> Any: ...
    def build(self, target: Any, state: Any) -> None: ...
    def persistent(self, identity: Any) -> Any: ...
    def append(self, target: Any, values: list) -> None: ...
    def set_items(self, target: Any, flat: list) -> None: ...


STOP = ord(".")
OPCODES: dict[int, Callable[[Stack], None]] = {}


def _opcode(*codes: int) -> Callable:
    def register(handler: Callable[[Stack], None]) -> Callable[[Stack], None]:
        OPCODES.update(dict.fromkeys(codes, handler))
        return handler

    return register


def _push(code: str | int, value: Callable[[Stack], Any]) -> None:
    """An opcode that pushes what `value` reads."""
    OPCODES[ord(code) if isinstance(code, str) else code] = lambda reader: reader.stack.append(value(reader))


def _text(reader: Stack, length: int) -> str:
    return str(reader.take(length), "utf-8", "surrogatepass")


def _old_text(reader: Stack, length: int) -> str | bytes:
    """Python 2's `str`: text where it is, else bytes."""
    raw = bytes(reader.take(length))
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw


def _long(reader: Stack, length: int) -> int:
    if length > 8192:
        raise reader.damaged(f"a number of {length} bytes")
    return int.from_bytes(reader.take(length), "little", signed=True)


def _line_int(reader: Stack) -> int | bool:
    text = reader.line()
    return {"00": False, "01": True}[text] if text in ("00", "01") else int(text.rstrip("L"))


_push("N", lambda reader: None)
_push(0x88, lambda reader: True)
_push(0x89, lambda reader: False)
_push("I", _line_int)
_push("L", _line_int)
_push("J", lambda reader: reader.number("<i"))
_push("K", lambda reader: reader.number("<B"))
_push("M", lambda reader: reader.number("<H"))
_push(0x8A, lambda reader: _long(reader, reader.number("<B")))
_push(0x8B, lambda reader: _long(reader, reader.number("<i")))
_push("F", lambda reader: float(reader.line()))
_push("G", lambda reader: reader.number(">d"))
_push("V", lambda reader: reader.line().encode("utf-8").decode("raw-unicode-escape"))
_push("U", lambda reader: _old_text(reader, reader.number("<B")))
_push("T", lambda reader: _old_text(reader, reader.number("<i")))
_push("X", lambda reader: _text(reader, reader.number("<I")))
_push(0x8C, lambda reader: _text(reader, reader.number("<B")))
_push(0x8D, lambda reader: _text(reader, reader.number("<Q")))
_push("C", lambda reader: bytes(reader.take(reader.number("<B"))))
_push("B", lambda reader: bytes(reader.take(reader.number("<I"))))
_push(0x8E, lambda reader: bytes(reader.take(reader.number("<Q"))))
_push(0x96, lambda reader: bytes(reader.take(reader.number("<Q"))))
_push(")", lambda reader: ())
_push("t", lambda reader: tuple(reader.pop_to_mark()))
_push(0x85, lambda reader: (reader.pop(),))
_push(0x86, lambda reader: (reader.pop(), reader.pop())[::-1])
_push(0x87, lambda reader: (reader.pop(), reader.pop(), reader.pop())[::-1])
_push("]", lambda reader: [])
_push("l", lambda reader: reader.pop_to_mark())
_push("}", lambda reader: {})
_push(0x8F, lambda reader: set())
_push(0x91, lambda reader: frozenset(checked_key(reader, value) for value in reader.pop_to_mark()))
_push("2", lambda reader: reader.top())
_push("g", lambda reader: reader.memo[int(reader.line())])
_push("h", lambda reader: reader.memo[reader.number("<B")])
_push("j", lambda reader: reader.memo[reader.number("<I")])
_push("c", lambda reader: reader.mention(reader.line(), reader.line()))
_push("Q", lambda reader: reader.persistent(reader.pop()))


@_opcode(0x80)
def _protocol(reader: Stack) -> None:
    if reader.number("<B") > 5:
        raise UnsupportedCheckpoint(reader.where, "uses a pickle protocol newer than 5")


@_opcode(0x95)
def _frame(reader: Stack) -> None:
    reader.number("<Q")  # a hint for buffering


@_opcode(ord("("))
def _mark(reader: Stack) -> None:
    reader.marks.append(len(reader.stack))


@_opcode(ord("0"))
def _pop(reader: Stack) -> None:
    if reader.marks and len(reader.stack) == reader.marks[-1]:
        reader.marks.pop()
    else:
        reader.pop()


@_opcode(ord("1"))
def _pop_mark(reader: Stack) -> None:
    reader.pop_to_mark()


@_opcode(0x94)
def _memoize(reader: Stack) -> None:
    reader.memo[len(reader.memo)] = reader.top()


@_opcode(ord("p"))
def _put(reader: Stack) -> None:
    reader.memo[int(reader.line())] = reader.top()


@_opcode(ord("q"))
def _binary_put(reader: Stack) -> None:
    reader.memo[reader.number("<B")] = reader.top()


@_opcode(ord("r"))
def _long_binary_put(reader: Stack) -> None:
    reader.memo[reader.number("<I")] = reader.top()


@_opcode(0x93)
def _stack_global(reader: Stack) -> None:
    name, module = reader.pop(), reader.pop()
    reader.stack.append(reader.mention(module, name))


@_opcode(ord("R"))
def _reduce(reader: Stack) -> None:
    arguments, function = reader.pop(), reader.pop()
    reader.stack.append(reader.call(function, arguments))


@_opcode(0x81)
def _new_object(reader: Stack) -> None:
    arguments, kind = reader.pop(), reader.pop()
    reader.stack.append(reader.construct(kind, arguments))


@_opcode(ord("b"))
def _build(reader: Stack) -> None:
    state = reader.pop()
    reader.build(reader.top(), state)


@_opcode(ord("a"))
def _append(reader: Stack) -> None:
    value = reader.pop()
    reader.append(reader.top(), [value])


@_opcode(ord("e"))
def _appends(reader: Stack) -> None:
    values = reader.pop_to_mark()
    reader.append(reader.top(), values)


@_opcode(0x90)
def _add_items(reader: Stack) -> None:
    values = reader.pop_to_mark()
    target = reader.top()
    if not isinstance(target, set):
        raise reader.damaged(f"elements for a {name_of(target)}")
    target.update(checked_key(reader, value) for value in values)


@_opcode(ord("s"))
def _set_item(reader: Stack) -> None:
    value, key = reader.pop(), reader.pop()
    reader.set_items(reader.top(), [key, value])


@_opcode(ord("u"))
def _set_items(reader: Stack) -> None:
    flat = reader.pop_to_mark()
    reader.set_items(reader.top(), flat)


@_opcode(ord("d"))
def _dict(reader: Stack) -> None:
    flat, made = reader.pop_to_mark(), {}
    reader.set_items(made, flat)
    reader.stack.append(made)


@_opcode(ord("i"))
def _inst(reader: Stack) -> None:
    raise UnsafeCheckpoint(reader.where, f"{reader.line()}.{reader.line()}", "calls (opcode INST)")


@_opcode(ord("o"))
def _obj(reader: Stack) -> None:
    raise UnsafeCheckpoint(reader.where, name_of((*reader.pop_to_mark(), None)[0]), "calls (opcode OBJ)")


@_opcode(0x92)
def _new_object_ex(reader: Stack) -> None:
    _keywords, _arguments, kind = reader.pop(), reader.pop(), reader.pop()
    raise UnsafeCheckpoint(reader.where, name_of(kind), "constructs with keywords (opcode NEWOBJ_EX)")


@_opcode(0x82, 0x83, 0x84)
def _extension(reader: Stack) -> None:
    raise UnsafeCheckpoint(reader.where, "copyreg.extension", "looks up something unnamed in")


@_opcode(ord("P"))
def _text_persistent(reader: Stack) -> None:
    raise reader.damaged("a persistent object that is no storage")


@_opcode(0x97, 0x98)
def _out_of_band(reader: Stack) -> None:
    raise UnsupportedCheckpoint(reader.where, "keeps data outside of its pickle (protocol 5 buffers)")
