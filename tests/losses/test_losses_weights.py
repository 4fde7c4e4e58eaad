"""The perceptual networks from the files that others published."""

import dataclasses

import pytest
import torch

from ldm.losses import LPIPS, AutoencoderLoss
from ldm.losses.lpips import from_torchvision
from ldm.losses.pretrained import LPIPS_HEADS, VGG16
from ldm.weights import CheckpointError, read_weights
from ldm.weights.fetching import WeightsError, find_weights


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty weights folder of the test's own; nothing outside of it is found."""
    monkeypatch.delenv("LDM_WEIGHTS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ldm"


class Malicious:
    def __reduce__(self):
        return (print, ("code from a weight file ran",))


def test_what_is_not_a_state_dict(tmp_path, capsys):
    (tmp_path / "page.pth").write_text("<html>Not found</html>")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save(Malicious(), tmp_path / "code.pth")
    torch.save({"lin0.model.1.weight": torch.zeros(1000)}, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:-500])
    for name in ("page", "list", "code", "cut"):
        with pytest.raises(CheckpointError, match=f"{name}.pth"):
            LPIPS(lpips_path=tmp_path / f"{name}.pth")
    assert capsys.readouterr().out == ""


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
    heads = read_weights(directory / "heads.pth").tensors
    assert set(heads) == {f"lin{i}.model.1.weight" for i in range(5)}
    for name, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_lpips_loads_strictly(files, tmp_path):
    network, directory = files
    state = published_vgg(network)
    state["features.99.weight"] = state.pop("features.28.weight")
    torch.save(state, tmp_path / "vgg.pth")
    with pytest.raises(CheckpointError, match=r"(?s)Missing.*slice5.28.w.*Unexpected.*features.99.w"):
        LPIPS(vgg_path=tmp_path / "vgg.pth", lpips_path=directory / "heads.pth")
    with pytest.raises(CheckpointError, match=r"(?s)Missing.*lin0.model.1.weight"):
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
    offline = dataclasses.replace(VGG16, url=(tmp_path / "none.pth").as_uri(), elsewhere=tuple)
    monkeypatch.setattr("ldm.losses.lpips.VGG16", offline)
    with pytest.raises(WeightsError, match="vgg16-397923af.pth .528 MB. is not on this machine") as caught:
        AutoencoderLoss(lpips_path=directory / "heads.pth", disc_factor=0.0)
    for way_out in ("vgg_path=/path/to/vgg16-397923af.pth", "perceptual=efficientnet", "perceptual=null"):
        assert f"loss.params.{way_out}" in str(caught.value)


def test_the_heads_come_with_the_lpips_package():
    candidates = [path for path in LPIPS_HEADS.elsewhere() if path.is_file()]
    if not candidates:
        pytest.skip("the lpips package is not installed")
    found = find_weights(dataclasses.replace(LPIPS_HEADS, url="http://unused.invalid"))
    assert found in candidates
    heads = read_weights(found).tensors
    assert [tuple(heads[f"lin{i}.model.1.weight"].shape) for i in range(5)] == [
        (1, channels, 1, 1) for channels in (64, 128, 256, 512, 512)
    ]
    assert all((head >= 0).all() for head in heads.values())
