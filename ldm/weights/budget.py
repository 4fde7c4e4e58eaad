"""How much one pickle may ask for, and how its errors name the file."""

import contextlib
import pickle
from collections.abc import Iterator

from ldm.weights.errors import CheckpointError, CorruptCheckpoint, UnsafeCheckpoint

# The largest published training states need some 10^5 steps; each step costs at most about a hundred bytes.
MAX_STEPS = 10_000_000
# What goes wrong in code that is fed nonsense.
_FAILURES = (ArithmeticError, AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError)


class Budget:
    """Counts the operations, elements and bytes that a pickle asks for; `where` is the file, for messages.

    Attributes:
        read: bytes of pickle so far.
    """

    def __init__(self, where: str):
        self.where = where
        self.read = 0
        self._spent = 0
        self._encoded = 0

    def spend(self, steps: int) -> None:
        """Raises CorruptCheckpoint when the file has asked for absurdly much."""
        self._spent += steps
        if self._spent > MAX_STEPS:
            raise CorruptCheckpoint(
                self.where, f"the pickle inside asks for more than {MAX_STEPS:,} objects, which is absurd"
            )

    def spend_bytes(self, count: int) -> None:
        """Count bytes made from text: an honest pickle holds each text once, a bomb repeats one."""
        self._encoded += count
        if self._encoded > self.read:
            raise self.damaged("it expands to more bytes than it has")

    def damaged(self, what: object) -> CorruptCheckpoint:
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
