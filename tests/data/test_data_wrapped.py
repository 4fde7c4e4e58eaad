"""Data sets of one's own in the shape that training wants."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data import SequentialBatches, Wrapped, make_loader


class Source:
    def __init__(self, make, count=20):
        self.make, self.count = make, count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return self.make(i)


def grey(i, width=6, height=4):
    return Image.new("L", (width, height), 10 * i)


def numbered(i):  # can be pickled, for a worker that is not forked
    return grey(i), {"size": np.float32(i / 2), "caption": f"number {i}", "label": i % 2}


@pytest.mark.parametrize(
    "make",
    [
        lambda i: grey(i),
        lambda i: (grey(i), {}),
        lambda i: {"image": grey(i)},
        lambda i: np.asarray(grey(i)),
        lambda i: np.asarray(grey(i))[..., None],
    ],
    ids=["image", "pair", "mapping", "array", "array with a channel"],
)
def test_images_of_any_kind(make):
    data = Wrapped(Source(make), size=4, channels=1)
    sample = data[3]
    assert sample["image"].shape == (1, 4, 4) and sample["image"].dtype == torch.float32
    torch.testing.assert_close(sample["image"], torch.full((1, 4, 4), 30 / 127.5 - 1))
    assert sample["index"] == 3 and sample["position"] == -1


def test_conditions_stand_beside_the_image_and_reach_batches():
    source = Source(numbered)
    source.classes = ["even", "odd"]
    data = Wrapped(source, size=4, channels=3)
    (batch,) = make_loader(data, SequentialBatches(np.array([1, 4]), 2), 0)
    assert batch["image"].shape == (2, 3, 4, 4) and data.classes == ["even", "odd"]
    assert batch["size"].tolist() == [0.5, 2.0] and batch["label"].tolist() == [1, 0]
    assert batch["caption"] == ["number 1", "number 4"]
    (workers,) = make_loader(data, SequentialBatches(np.array([1, 4]), 2), 1)
    assert torch.equal(workers["image"], batch["image"]) and workers["caption"] == batch["caption"]


def test_parts_flips_and_fingerprints():
    data = Wrapped(
        Source(lambda i: Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4))), 4, 1, flip=True
    )
    train, validation = data.split("train"), data.split("validation")
    assert len(train) + len(validation) == 20 and len(validation) > 0
    assert not set(train.rows) & set(validation.rows)
    train.set_seed(1)
    plain, mirrored = train[0]["image"], train[0]["image"].flip(-1)
    seen = [train[(0, position)]["image"] for position in range(20)]
    assert any(torch.equal(image, plain) for image in seen)
    assert any(torch.equal(image, mirrored) for image in seen)
    assert train.fingerprint() != validation.fingerprint()
    assert train.fingerprint() == Wrapped(data.source, 4, 1).split("train").fingerprint()
    assert train.fingerprint() != Wrapped(Source(grey), 4, 1).split("train").fingerprint()
    named = Source(grey)
    named.fingerprint = lambda: "of my own"
    assert Wrapped(named, 4, 1).fingerprint() == Wrapped(named, 4, 1).fingerprint()


def test_what_is_no_data_set_is_refused():
    with pytest.raises(ValueError, match="length above 0"):
        Wrapped(Source(grey, 0), 4)
    with pytest.raises(ValueError, match="length above 0"):
        Wrapped(3, 4)
    with pytest.raises(ValueError, match=r"source.2. holds no PIL image or array, but a str"):
        Wrapped(Source(lambda i: "a.png"), 4)[2]
