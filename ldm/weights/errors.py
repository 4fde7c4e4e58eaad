"""What can be wrong with a file of weights. All are `ValueError`s that name the file and the reason."""


class CheckpointError(ValueError):
    """A file of weights cannot be used. `where` is the file (or the part of it), `reason` what is wrong."""

    def __init__(self, where: str, reason: str):
        super().__init__(f"{where}: {reason}")
        self.where = str(where)
        self.reason = reason


class CorruptCheckpoint(CheckpointError):
    """The file is truncated, damaged, or contradicts itself."""


class UnsupportedCheckpoint(CheckpointError):
    """The file is whole, but of a kind that this reader does not read."""


class UnsafeCheckpoint(CheckpointError):
    """The file asks for code to be run. Nothing was run.

    `global_name` is what it wanted to use, such as `posix.system`.
    """

    def __init__(self, where: str, global_name: str, what: str, hint: str = ""):
        reason = f"refused: the pickle {what} `{global_name}`, which can run code; nothing was run{hint}"
        super().__init__(where, reason)
        self.global_name = global_name


def require(condition: object, where: str, otherwise: str, kind: type = CorruptCheckpoint) -> None:
    """Raises an error of that kind unless the condition holds."""
    if not condition:
        raise kind(where, otherwise)
