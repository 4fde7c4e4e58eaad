"""Bounds for tests that read hostile files."""

import os
import signal
from pathlib import Path

import pytest

TIMEOUT = 60  # seconds for one file, on a busy machine


@pytest.fixture
def little_memory():
    """Half a GiB more than now, and no more: a bomb fails the test, not the machine."""
    resource = pytest.importorskip("resource")
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**29, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture
def alarm():
    """Rings when a test, or what it did since it called this last, takes too long."""

    def ring(*_):
        raise TimeoutError("a file that is never done with")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.alarm(TIMEOUT)
    yield lambda: signal.alarm(TIMEOUT)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)
