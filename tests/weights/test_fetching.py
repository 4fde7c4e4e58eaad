"""Published weight files: where they are looked for, how they are fetched, what a missing one says."""

import hashlib
import http.server
import os
import threading
import time
from pathlib import Path

import pytest

from ldm.weights.fetching import WeightFile, WeightsError, find_weights, weights_folder

CONTENT = bytes(range(256)) * 20


def weight_file(url: str, content: bytes = CONTENT, elsewhere=tuple) -> WeightFile:
    digest = hashlib.sha256(content).hexdigest()
    return WeightFile("some.pth", url, digest, 0.005, "some_path", elsewhere, "; or do something else")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty weights folder of the test's own; nothing outside of it is found."""
    monkeypatch.delenv("LDM_WEIGHTS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ldm"


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "published.pth"
    path.write_bytes(CONTENT)
    return path


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        if self.path != "/unannounced":
            self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: len(CONTENT) // 2])
        if self.path == "/whole":
            self.wfile.write(CONTENT[len(CONTENT) // 2 :])
        if self.path == "/stalled":
            self.wfile.flush()
            time.sleep(1.0)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    instance = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    instance.daemon_threads = True
    thread = threading.Thread(target=instance.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{instance.server_port}"
    instance.shutdown()
    instance.server_close()
    thread.join()


# --- where


def test_folder_by_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert weights_folder() == Path.home() / ".cache" / "ldm"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert weights_folder() == tmp_path / "ldm"
    monkeypatch.setenv("LDM_WEIGHTS", str(tmp_path / "shared"))
    assert weights_folder() == tmp_path / "shared"


def test_a_given_path_is_used_as_it_is(source):
    assert find_weights(weight_file("http://unused.invalid", b"something else"), source) == source


def test_a_given_path_without_a_file():
    with pytest.raises(WeightsError, match="some_path: no file at /nowhere/some.pth"):
        find_weights(weight_file("http://unused.invalid"), "/nowhere/some.pth")


def test_a_file_in_the_weights_folder_is_found_without_network(monkeypatch, tmp_path):
    monkeypatch.setenv("LDM_WEIGHTS", str(tmp_path))
    (tmp_path / "some.pth").write_bytes(CONTENT)
    assert find_weights(weight_file("http://unused.invalid")) == tmp_path / "some.pth"


def test_a_file_of_another_package_is_found_if_it_is_the_published_one(source, tmp_path):
    other = tmp_path / "other.pth"
    other.write_bytes(b"another version")
    file = weight_file("http://unused.invalid", elsewhere=lambda: iter([tmp_path / "no.pth", other, source]))
    assert find_weights(file) == source


def test_a_damaged_file_in_the_folder_is_reported_and_kept(folder):
    folder.mkdir(parents=True)
    (folder / "some.pth").write_bytes(CONTENT[:-1])
    with pytest.raises(WeightsError, match="is not the published some.pth.*Delete it"):
        find_weights(weight_file("http://unused.invalid"))
    assert (folder / "some.pth").stat().st_size == len(CONTENT) - 1


# --- fetching


def test_fetched_once_and_whole(source, folder):
    file = weight_file(source.as_uri())
    assert find_weights(file) == folder / "some.pth"
    assert (folder / "some.pth").read_bytes() == CONTENT
    source.unlink()
    assert find_weights(file) == folder / "some.pth"
    assert [path.name for path in folder.iterdir()] == ["some.pth"]


def test_fetched_over_http(server, folder):
    assert find_weights(weight_file(f"{server}/whole")).read_bytes() == CONTENT


@pytest.mark.parametrize(
    "path, message",
    [
        ("/cut", "broke off after 2560 of 5120 bytes|IncompleteRead"),
        ("/unannounced", "has SHA-256"),
        ("/missing", "404"),
        ("/stalled", "timed out"),
    ],
)
def test_a_bad_answer_leaves_nothing_behind(server, folder, path, message):
    with pytest.raises(WeightsError, match=message) as caught:
        find_weights(weight_file(server + path), timeout=0.3)
    assert list(folder.iterdir()) == []
    for way_out in ("LDM_WEIGHTS", "some_path", str(folder / "some.pth"), "do something else"):
        assert way_out in str(caught.value)


def test_a_wrong_checksum_leaves_nothing_behind(source, folder):
    with pytest.raises(WeightsError, match="has SHA-256"):
        find_weights(weight_file(source.as_uri(), b"what was published"))
    assert list(folder.iterdir()) == []


def test_an_interrupt_leaves_nothing_behind(source, folder, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        find_weights(weight_file(source.as_uri()))
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_written(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("LDM_WEIGHTS", str(tmp_path / "file" / "weights"))
    with pytest.raises(WeightsError, match="could not be fetched into .*file/weights.*LDM_WEIGHTS"):
        find_weights(weight_file(source.as_uri()))
