"""Running commands: in this process, which is quick, and for real."""

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from ldm.cli import run_verb

ROOT = Path(__file__).resolve().parents[1]


class Result(NamedTuple):
    status: int
    out: str
    err: str


def environment() -> dict[str, str]:
    """One thread, no terminal, this checkout before anything that is installed."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "100", "TERM": "dumb"}


def run(*arguments, cwd=None, timeout: float = 120) -> Result:
    """A real process: `run("sample.py", ...)` or `run("ldm", "encode", ...)`."""
    first, *rest = (str(argument) for argument in arguments)
    start = [str(ROOT / first)] if first.endswith(".py") else ["-c", "from ldm.cli import main; main()"]
    done = subprocess.run(
        [sys.executable, *start, *rest],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment(),
        timeout=timeout,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def cli(capsys, monkeypatch) -> Callable[..., Result]:
    """`cli(verb, *arguments)` in this process, which is left as it was."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    log = logging.getLogger("ldm")
    level = log.level

    def call(verb: str, *arguments) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_verb(verb, [str(argument) for argument in arguments])
        return Result(ended.value.code or 0, *capsys.readouterr())

    yield call
    log.setLevel(level)
