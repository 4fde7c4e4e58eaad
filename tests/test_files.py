"""Whole files or none, on a disk that fills up and in a process that is killed."""

import os
import stat
import time

import pytest

from ldm import files
from ldm.files import Busy, locked, whole_file


def write(path, writer):
    with whole_file(path, durable=True) as file:
        writer(file)


def test_a_failed_write_leaves_the_previous_file(tmp_path):
    path = tmp_path / "a.ckpt"
    write(path, lambda file: file.write(b"first"))

    def fail(file):
        file.write(b"second")
        raise RuntimeError("disk full, say")

    with pytest.raises(RuntimeError):
        write(path, fail)
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match="gone"):
        write(tmp_path / "gone" / "a", lambda file: None)
    with pytest.raises(IsADirectoryError):
        write(tmp_path, lambda file: None)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_write_leaves_the_previous_file(tmp_path):
    path = tmp_path / "a.ckpt"
    write(path, lambda file: file.write(b"first"))
    child = os.fork()
    if child == 0:

        def die(file):
            file.write(b"second")
            file.flush()
            os.kill(os.getpid(), 9)

        write(path, die)
    os.waitpid(child, 0)
    assert path.read_bytes() == b"first"
    (partial,) = (other for other in tmp_path.iterdir() if other != path)
    assert partial.read_bytes() == b"second"
    write(path, lambda file: file.write(b"third"))
    assert partial.exists()  # it may be another process at work
    os.utime(partial, (time.time() - 7200,) * 2)
    write(path, lambda file: file.write(b"fourth"))
    assert path.read_bytes() == b"fourth" and list(tmp_path.iterdir()) == [path]


def test_data_is_on_the_disk_before_it_has_the_name(tmp_path, monkeypatch):
    calls = []
    sync, replace = os.fsync, os.replace

    def note_sync(descriptor):
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def note_replace(source, target):
        calls.append((os.path.getsize(source), os.path.exists(target)))
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", note_sync)
    monkeypatch.setattr(files.os, "replace", note_replace)
    write(tmp_path / "a", lambda file: file.write(b"12345"))
    assert calls == ["file", (5, False), "folder"]


def test_files_have_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()
    write(tmp_path / "a", lambda file: None)
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_lock_is_for_one_process_and_goes_with_it(tmp_path):
    path = tmp_path / ".lock"
    ready, hold = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with locked(path, wait=False):
            os.write(ready[1], b"x")
            os.read(hold[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    with pytest.raises(Busy), locked(path, wait=False):
        pass
    os.kill(child, 9)
    os.waitpid(child, 0)
    with locked(path, wait=False) as real:
        assert real
