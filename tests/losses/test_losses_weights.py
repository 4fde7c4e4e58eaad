"""Published weight files: where they are looked for, how they are fetched, what a missing one says."""

import dataclasses
import hashlib
import http.server
import threading
import time
from pathlib import Path

import pytest
import torch

from ldm.losses import LPIPS, AutoencoderLoss, WeightsError, pretrained
from ldm.losses.lpips import from_torchvision
from ldm.losses.pretrained import LPIPS_HEADS, VGG16, WeightFile, find_weights, load_weights

CONTENT = bytes(range(256)) * 20


def nowhere():
    yield from ()


def weight_file(url: str, content: bytes = CONTENT, elsewhere=nowhere) -> WeightFile:
    digest = hashlib.sha256(content).hexdigest()
    return WeightFile("some.pth", url, digest, 0.005, "some_path", elsewhere)


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
    assert pretrained.weights_folder() == Path.home() / ".cache" / "ldm"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert pretrained.weights_folder() == tmp_path / "ldm"
    monkeypatch.setenv("LDM_WEIGHTS", str(tmp_path / "shared"))
    assert pretrained.weights_folder() == tmp_path / "shared"


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
    for way_out in ("LDM_WEIGHTS", "some_path", str(folder / "some.pth"), "efficientnet", "perceptual=null"):
        assert way_out in str(caught.value)


def test_a_wrong_checksum_leaves_nothing_behind(source, folder):
    with pytest.raises(WeightsError, match="has SHA-256"):
        find_weights(weight_file(source.as_uri(), b"what was published"))
    assert list(folder.iterdir()) == []


def test_an_interrupt_leaves_nothing_behind(source, folder, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrained.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        find_weights(weight_file(source.as_uri()))
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_written(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("LDM_WEIGHTS", str(tmp_path / "file" / "weights"))
    with pytest.raises(WeightsError, match="could not be fetched into .*file/weights.*LDM_WEIGHTS"):
        find_weights(weight_file(source.as_uri()))


# --- reading


@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_weight_file(tmp_path, zipped):
    path = tmp_path / "w.pth"
    torch.save({"a": torch.zeros(1000)}, path, _use_new_zipfile_serialization=zipped)
    assert load_weights(path)["a"].shape == (1000,)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(WeightsError, match="cannot be read"):
        load_weights(path)


class Malicious:
    def __reduce__(self):
        return (print, ("code from a weight file ran",))


def test_what_is_not_a_state_dict(tmp_path, capsys):
    (tmp_path / "page.pth").write_text("<html>Not found</html>")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save(Malicious(), tmp_path / "code.pth")
    for name in ("page", "list", "code"):
        with pytest.raises(WeightsError, match=f"{name}.pth"):
            load_weights(tmp_path / f"{name}.pth")
    assert capsys.readouterr().out == ""


# --- LPIPS from the published files


def published_vgg(network: LPIPS) -> dict[str, torch.Tensor]:
    """A file as torchvision publishes it: `features.N` by depth, and a classifier."""
    state = {}
    for name, value in network.net.state_dict().items():
        _, index, kind = name.split(".")
        state[f"features.{index}.{kind}"] = value
    classifier = {f"classifier.{i}.{kind}": torch.zeros(2) for i in (0, 3, 6) for kind in ("weight", "bias")}
    return state | classifier


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    torch.manual_seed(0)
    network = LPIPS(pretrained=False)
    directory = tmp_path_factory.mktemp("published")
    torch.save(published_vgg(network), directory / "vgg.pth")
    heads = {name: value for name, value in network.state_dict().items() if name.startswith("lin")}
    torch.save(heads, directory / "heads.pth")
    return network, directory


def test_lpips_loads_the_published_files(files):
    network, directory = files
    loaded = LPIPS(vgg_path=directory / "vgg.pth", lpips_path=directory / "heads.pth")
    assert set(torch.load(directory / "heads.pth")) == {f"lin{i}.model.1.weight" for i in range(5)}
    for name, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_lpips_loads_strictly(files, tmp_path):
    network, directory = files
    state = published_vgg(network)
    state["features.99.weight"] = state.pop("features.28.weight")
    torch.save(state, tmp_path / "vgg.pth")
    with pytest.raises(WeightsError, match="missing slice5.28.weight; unexpected features.99.weight"):
        LPIPS(vgg_path=tmp_path / "vgg.pth", lpips_path=directory / "heads.pth")
    with pytest.raises(WeightsError, match="missing lin0.model.1.weight"):
        LPIPS(vgg_path=directory / "vgg.pth", lpips_path=directory / "vgg.pth")


def test_torchvision_names_by_depth():
    names = set(from_torchvision({f"features.{i}.weight": torch.zeros(1) for i in (0, 7, 14, 21, 28)}))
    assert names == {f"slice{k}.{i}.weight" for k, i in zip(range(1, 6), (0, 7, 14, 21, 28), strict=True)}


def test_the_objective_takes_the_paths_and_says_what_is_missing(files, monkeypatch, tmp_path):
    _, directory = files
    loss = AutoencoderLoss(
        vgg_path=directory / "vgg.pth", lpips_path=directory / "heads.pth", disc_factor=0.0
    )
    assert isinstance(loss.perceptual_loss, LPIPS)
    offline = dataclasses.replace(VGG16, url=(tmp_path / "none.pth").as_uri(), elsewhere=nowhere)
    monkeypatch.setattr("ldm.losses.lpips.VGG16", offline)
    with pytest.raises(ValueError, match="vgg16-397923af.pth .528 MB. is not on this machine") as caught:
        AutoencoderLoss(lpips_path=directory / "heads.pth", disc_factor=0.0)
    assert "loss.params.vgg_path=/path/to/vgg16-397923af.pth" in str(caught.value)


def test_the_heads_come_with_the_lpips_package():
    candidates = [path for path in LPIPS_HEADS.elsewhere() if path.is_file()]
    if not candidates:
        pytest.skip("the lpips package is not installed")
    found = find_weights(dataclasses.replace(LPIPS_HEADS, url="http://unused.invalid"))
    assert found in candidates
    heads = load_weights(found)
    assert [tuple(heads[f"lin{i}.model.1.weight"].shape) for i in range(5)] == [
        (1, channels, 1, 1) for channels in (64, 128, 256, 512, 512)
    ]
    assert all((head >= 0).all() for head in heads.values())
