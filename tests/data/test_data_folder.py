import logging
import os
import pickle
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from PIL import Image

from ldm.data.images.bad_files import verify
from ldm.data.images.dataset import StringTable, name_hash, parse_entries, validation_mask
from ldm.data.images.image_folder import ImageFolder
from ldm.data.images.pixels import BadImageError
from ldm.data.loading.loader import make_loader
from ldm.data.loading.order import PositionSampler, flip_mask

# Text that a file system can hold, though some of it is no UTF-8.
NAMES = st.lists(st.binary(min_size=0, max_size=30).map(os.fsdecode), max_size=20)


def put(root, *paths, size=(16, 16)):
    """Write images whose colour says which of the paths they are."""
    for i, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (i + 1, 0, 0)).save(root / path)


def names(dataset):
    return [os.path.relpath(dataset.path(i), dataset.root) for i in range(len(dataset))]


def reds(dataset):
    return [round((float(dataset[i]["image"][0].mean()) + 1) * 127.5) for i in range(len(dataset))]


def break_file(path):
    Path(path).write_bytes(Path(path).read_bytes()[:40])


# -- what is found


def test_flat_folder_is_sorted_and_has_no_classes(tmp_path):
    put(tmp_path, "b.png", "a.PNG", "c.webp", "B.jpg")
    dataset = ImageFolder(tmp_path, 8)
    assert names(dataset) == ["B.jpg", "a.PNG", "b.png", "c.webp"]
    assert dataset.classes is None and dataset.labels is None and dataset.num_classes == 0
    sample = dataset[1]
    assert set(sample) == {"image", "index", "position"}
    assert sample["image"].shape == (3, 8, 8) and sample["image"].dtype == torch.float32
    assert sample["index"] == 1 and sample["position"] == -1
    assert reds(dataset)[1:3] == [2, 1]


def test_one_subfolder_a_class_to_any_depth(tmp_path):
    put(tmp_path, "dog/x.png", "cat/deep/er/y.png", "cat/z.png", "ant/1.png")
    (tmp_path / "empty").mkdir()
    dataset = ImageFolder(tmp_path, 8)
    assert dataset.classes == ["ant", "cat", "dog"] and dataset.num_classes == 3
    assert names(dataset) == ["ant/1.png", "cat/deep/er/y.png", "cat/z.png", "dog/x.png"]
    assert dataset.labels.tolist() == [0, 1, 1, 2]
    assert [int(dataset[i]["label"]) for i in range(4)] == [0, 1, 1, 2]
    assert dataset[0]["label"].dtype == torch.int64
    assert ImageFolder(tmp_path, 8, layout="flat").classes is None


def test_loose_images_beside_subfolders(tmp_path, caplog):
    put(tmp_path, "a/1.png", "b/2.png", "loose.png")
    dataset = ImageFolder(tmp_path, 8)
    assert len(dataset) == 3 and dataset.classes is None
    assert (
        "loose images (1) and subfolders with images (2)" in caplog.text and 'layout="classes"' in caplog.text
    )
    caplog.clear()
    dataset = ImageFolder(tmp_path, 8, layout="classes")
    assert names(dataset) == ["a/1.png", "b/2.png"] and dataset.labels.tolist() == [0, 1]
    assert reds(dataset) == [1, 2]
    assert "1 image beside the class folders" in dataset.summary()
    ImageFolder(tmp_path, 8, layout="flat")
    assert "both" not in caplog.text
    (tmp_path / "flat").mkdir()
    put(tmp_path / "flat", "1.png")
    with pytest.raises(ValueError, match="one subfolder a class"):
        ImageFolder(tmp_path / "flat", 8, layout="classes")


def test_parts_of_a_dataset_are_not_silently_classes(tmp_path, caplog):
    put(tmp_path, "train/a/1.png", "val/a/2.png")
    ImageFolder(tmp_path, 8)
    assert "train, val, like the parts of a dataset" in caplog.text


def test_what_is_ignored_is_counted(tmp_path, caplog):
    put(tmp_path, "a.png", ".hidden.png", ".git/x.png")
    for name in ("Thumbs.db", "notes.txt", "more.txt", "README"):
        (tmp_path / name).write_text("x")
    os.symlink(tmp_path / "nowhere.png", tmp_path / "broken.png")
    with caplog.at_level(logging.INFO):
        dataset = ImageFolder(tmp_path, 8)
    for words in ("4 files of other kinds (.txt 2", ".db 1", "no extension 1", "2 hidden", "(broken.png)"):
        assert words in dataset.summary() and words in caplog.text
    assert names(dataset) == ["a.png"]


def test_links_are_followed_once(tmp_path):
    put(tmp_path, "set/cat/1.png", "outside/2.png", "file.png")
    root = tmp_path / "set"
    os.symlink(root, root / "cat" / "loop")
    os.symlink(root / "cat", root / "also_cat")
    os.symlink(tmp_path / "outside", root / "ant")
    os.symlink(tmp_path / "file.png", root / "cat" / "linked.png")
    dataset = ImageFolder(root, 8)
    assert names(dataset) == ["ant/2.png", "cat/1.png", "cat/linked.png"]
    assert dataset.classes == ["ant", "cat"]
    assert dataset.scan.repeated_folders == ["also_cat", "cat/loop"]
    assert "2 repeated folders (also_cat" in dataset.summary()


def test_the_order_does_not_come_from_the_disk(tmp_path, monkeypatch):
    put(tmp_path, *[f"{c}/{i}.png" for c in "ba" for i in range(5)])
    expected = names(ImageFolder(tmp_path, 8))
    real = os.scandir

    class Backwards:
        def __init__(self, path):
            with real(path) as entries:
                self.entries = sorted(entries, key=lambda e: e.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    assert names(ImageFolder(tmp_path, 8)) == expected == sorted(expected)


def test_no_images_says_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        ImageFolder(tmp_path / "gone", 8)
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match=r"looked for .*\.png.* in 2 folders, found nothing"):
        ImageFolder(tmp_path, 8)
    (tmp_path / "a" / "b.txt").write_text("x")
    with pytest.raises(ValueError, match=r"found 1 file of another kind \(\.txt 1\)"):
        ImageFolder(tmp_path, 8)
    with pytest.raises(ValueError, match="is a file"):
        ImageFolder(tmp_path / "a" / "b.txt", 8)


def test_empty_files_are_an_error_or_named(tmp_path, caplog):
    put(tmp_path, "a.png")
    (tmp_path / "zero.jpg").touch()
    with pytest.raises(ValueError, match="1 empty image file: zero.jpg.*on_error"):
        ImageFolder(tmp_path, 8)
    dataset = ImageFolder(tmp_path, 8, on_error="report")
    assert len(dataset) == 1 and "zero.jpg" in caplog.text
    assert dataset.bad_files() == dataset.empty_files() == [str(tmp_path / "zero.jpg")]


def test_other_extensions(tmp_path):
    put(tmp_path, "a.png", "b.webp")
    os.rename(tmp_path / "b.webp", tmp_path / "b.IMG")
    assert names(ImageFolder(tmp_path, 8, extensions=["img", ".PNG"])) == ["a.png", "b.IMG"]
    with pytest.raises(ValueError, match="list"):
        ImageFolder(tmp_path, 8, extensions=".png")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(size=0), "size"),
        (dict(size=8.0), "size"),
        (dict(crop="centre"), "crop must be one of center, random"),
        (dict(layout="tree"), "layout"),
        (dict(on_error="skip"), "on_error"),
        (dict(channels=4), "channels"),
        (dict(crop_scale=(0.9, 0.5)), "crop_scale"),
        (dict(flip="no"), "flip"),
        (dict(validation=1.0), "validation"),
        (dict(validation=-1), "validation"),
        (dict(validation=True), "validation"),
        (dict(background="nocolour"), "background"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):  # before the folder is looked for
        ImageFolder(tmp_path / "gone", **{"size": 8, **arguments})


# -- paths


@settings(deadline=None, max_examples=100)
@given(NAMES)
def test_string_tables_hold_any_name(names):
    table = StringTable.from_strings(names)
    assert [table[i] for i in range(len(table))] == names
    assert [pickle.loads(pickle.dumps(table))[i] for i in range(len(names))] == names
    assert len(table.select(np.arange(0, len(names), 2))) == (len(names) + 1) // 2
    with pytest.raises(IndexError):
        table[len(names)]


def test_a_hundred_thousand_paths_take_little_memory():
    paths = [f"class_{i % 100:03d}/image_{i:08d}.jpg" for i in range(100_000)]
    table = StringTable.from_strings(paths)
    assert len(pickle.dumps(table)) < sum(map(len, paths)) + 8 * 100_001 + 1000


def test_names_without_a_valid_encoding(tmp_path):
    name = b"caf\xe9.png"
    try:
        Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
        os.rename(os.fsencode(tmp_path / "x.png"), os.path.join(os.fsencode(tmp_path), name))
    except OSError:
        pytest.skip("this file system refuses such names")
    dataset = ImageFolder(tmp_path, 8)
    assert dataset[0]["image"].shape == (3, 8, 8)
    assert len(dataset.fingerprint()) == 64


# -- samples


def noise_folder(root, count=12, size=(40, 30)):
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(
            root / f"{i:02d}.png"
        )
    return root


def test_augmentation_is_a_function_of_seed_and_position(tmp_path):
    noise_folder(tmp_path, 2)
    dataset = ImageFolder(tmp_path, 16, crop="random", flip=True)
    first = [dataset[(0, p)]["image"] for p in range(20)]
    assert all(torch.equal(image, dataset[(0, p)]["image"]) for p, image in enumerate(first))
    assert len({tuple(image.flatten()[:50].tolist()) for image in first}) == 20
    dataset.set_seed(1)
    assert not any(torch.equal(image, dataset[(0, p)]["image"]) for p, image in enumerate(first))
    plain = ImageFolder(tmp_path, 16)[0]["image"]
    assert torch.equal(dataset[0]["image"], plain)
    assert dataset[(1, 7)]["index"] == 1 and dataset[(1, 7)]["position"] == 7


def test_flips_are_mirrors(tmp_path):
    noise_folder(tmp_path, 1)
    dataset = ImageFolder(tmp_path, 16, flip=True)
    dataset.set_seed(5)
    flipped = flip_mask(5, np.arange(30))
    assert 5 < flipped.sum() < 25
    for position in range(30):
        expected = dataset[0]["image"].flip(-1) if flipped[position] else dataset[0]["image"]
        assert torch.equal(dataset[(0, position)]["image"], expected)


def test_grey_and_background(tmp_path):
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert ImageFolder(tmp_path, 8, channels=1, background="white")[0]["image"].eq(1).all()
    assert ImageFolder(tmp_path, 8, background=(0, 0, 0))[0]["image"].eq(-1).all()
    assert ImageFolder(tmp_path, 8, channels=1)[0]["image"].shape == (1, 8, 8)


def test_small_images_are_enlarged_and_counted(tmp_path, caplog):
    put(tmp_path, "a.png", "b.png", size=(5, 7))
    put(tmp_path, "c.png", size=(8, 8))
    dataset = ImageFolder(tmp_path, 8)
    assert all(dataset[i]["image"].shape == (3, 8, 8) for i in (0, 1, 2, 0))
    assert dataset.enlarged == 2
    assert caplog.text.count("is enlarged") == 1 and "a.png is 5x7" in caplog.text
    assert "2 smaller than 8 pixels enlarged" in dataset.summary()


def test_indices_out_of_range(tmp_path):
    put(tmp_path, "a.png")
    dataset = ImageFolder(tmp_path, 8)
    for wrong in (1, -1, (1, 0)):
        with pytest.raises(IndexError, match="of 1 samples"):
            dataset[wrong]
    with pytest.raises(ValueError, match="position"):
        dataset[(0, -2)]
    assert parse_entries([3, (4, 9)], 5)[1].tolist() == [-1, 9]


# -- bad files


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_file_stops_and_is_named(tmp_path, workers):
    noise_folder(tmp_path)
    break_file(tmp_path / "03.png")
    dataset = ImageFolder(tmp_path, 8)
    with pytest.raises(BadImageError, match="03.png: .*`ldm verify .*` lists .*data.params.on_error=report"):
        list(make_loader(dataset, PositionSampler(12, 0, 4, steps=3), num_workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_is_replaced_named_once_and_counted(tmp_path, workers, caplog):
    noise_folder(tmp_path)
    for name in ("03.png", "07.png"):
        break_file(tmp_path / name)
    dataset = ImageFolder(tmp_path, 8, on_error="report", validation=0)
    loader = make_loader(dataset, PositionSampler(12, 0, 4, steps=6), num_workers=workers)
    batches = list(loader)
    drawn = torch.cat([batch["index"] for batch in batches])
    assert len(drawn) == 24 and not {3, 7} & set(drawn.tolist())
    assert torch.cat([batch["position"] for batch in batches]).tolist() == list(range(24))
    bad = [str(tmp_path / "03.png"), str(tmp_path / "07.png")]
    assert dataset.bad_files() == bad  # known here, whichever process met them
    again = [dataset[(int(i), int(p))] for i, p in sum(PositionSampler(12, 0, 4, steps=6), [])]
    assert [int(sample["index"]) for sample in again] == drawn.tolist()
    assert dataset.bad_files() == bad
    assert "2 unreadable" in dataset.summary()
    if workers == 0:
        assert caplog.text.count("another takes its place") == 2 and "03.png" in caplog.text


def test_replacements_stay_in_their_part_and_bring_their_label(tmp_path):
    put(tmp_path, *[f"{c}/{i}.png" for c in "ab" for i in range(10)])
    whole = ImageFolder(tmp_path, 8, on_error="report", validation=5)
    train, validation = whole.split("train"), whole.split("validation")
    break_file(validation.path(2))
    replaced = validation[2]
    assert replaced["index"] != 2 and replaced["label"] == validation.labels[int(replaced["index"])]
    assert torch.equal(replaced["image"], validation[int(replaced["index"])]["image"])
    assert train.bad_files() == whole.bad_files() == [validation.path(2)]


def test_nothing_readable_ends(tmp_path):
    put(tmp_path, "a.png", "b.png")
    for name in ("a.png", "b.png"):
        break_file(tmp_path / name)
    with pytest.raises(BadImageError, match="no readable image"):
        ImageFolder(tmp_path, 8, on_error="report")[0]


def test_verify_lists_every_bad_file(tmp_path):
    noise_folder(tmp_path, 5)
    break_file(tmp_path / "02.png")
    (tmp_path / "04.png").write_text("text")
    (tmp_path / "zero.png").touch()
    Image.fromarray(np.full((8, 8), 7.0, dtype=np.float32)).save(tmp_path / "float.tif")
    calls = []
    dataset = ImageFolder(tmp_path, 8, on_error="report")
    bad = verify(dataset, num_workers=0, progress=lambda done, total: calls.append((done, total)))
    assert [os.path.basename(path) for path, _ in bad] == ["zero.png", "02.png", "04.png", "float.tif"]
    assert bad[0].reason == "empty file" and "cannot identify" in bad[2].reason and "[0, 1]" in bad[3].reason
    assert calls[-1] == (6, 6)
    for path, _ in bad:
        os.remove(path)
    assert verify(ImageFolder(tmp_path, 8), num_workers=0) == []


# -- the split


def test_split_is_complete_disjoint_and_stable(tmp_path):
    put(tmp_path, *[f"{i:03d}.png" for i in range(0, 120, 2)], size=(2, 2))
    old = ImageFolder(tmp_path, 8, validation=0.2)
    parts = [set(names(old.split(part))) for part in ("train", "validation")]
    assert not parts[0] & parts[1] and parts[0] | parts[1] == set(names(old))
    assert 4 <= len(parts[1]) <= 24
    put(tmp_path, *[f"{i:03d}.png" for i in range(1, 120, 2)], size=(2, 2))
    new = ImageFolder(tmp_path, 8, validation=0.2)
    assert parts[0] < set(names(new.split("train"))) and parts[1] < set(names(new.split("validation")))
    assert len(ImageFolder(tmp_path, 8, validation=7).split("validation")) == 7
    assert len(ImageFolder(tmp_path, 8, validation=0).split("validation")) == 0
    assert len(ImageFolder(tmp_path, 8, validation=0.0).split("train")) == 120


def test_split_of_one_image_and_of_a_part(tmp_path):
    put(tmp_path, "a.png")
    dataset = ImageFolder(tmp_path, 8, validation=0.9)
    assert len(dataset.split("train")) == 1 and len(dataset.split("validation")) == 0
    assert dataset.split("train")[(0, 3)]["image"].shape == (3, 8, 8)
    with pytest.raises(ValueError, match="already the train part"):
        dataset.split("train").split("validation")
    with pytest.raises(ValueError, match='"train" or "validation"'):
        dataset.split("test")
    with pytest.raises(ValueError, match="leaves nothing to train on"):
        ImageFolder(tmp_path, 8, validation=1).split("train")


@settings(deadline=None, max_examples=200)
@given(
    st.sets(st.binary(max_size=8), min_size=1, max_size=60),
    st.floats(0, 1, exclude_max=True, allow_subnormal=False) | st.integers(0, 59),
)
def test_validation_law(keys, validation):
    hashes = np.array([name_hash(key) for key in keys], dtype=np.uint64)
    if isinstance(validation, int) and validation >= len(keys) and validation:
        with pytest.raises(ValueError, match="nothing to train on"):
            validation_mask(hashes, validation)
        return
    chosen = validation_mask(hashes, validation)
    if isinstance(validation, int):
        assert chosen.sum() == validation
    assert not chosen.all()
    assert chosen.any() == (validation > 0 and len(keys) >= 2)
    assert not chosen.any() or hashes[chosen].max() < hashes[~chosen].min()


def test_name_hashes_stay_what_they_are():
    """Changing this moves images between everybody's training and validation parts."""
    assert name_hash(b"cat/001.png") == 6470101607939607530


# -- the fingerprint


def test_fingerprint_changes_with_content_and_with_how_it_is_seen(tmp_path):
    root = tmp_path / "one"
    put(root, "a/1.png", "b/2.png")
    base = ImageFolder(root, 8).fingerprint()
    assert ImageFolder(root, 8).fingerprint() == base
    os.rename(root, tmp_path / "moved")
    root = tmp_path / "moved"
    assert ImageFolder(root, 8).fingerprint() == base
    different = {
        ImageFolder(root, 9).fingerprint(),
        ImageFolder(root, 8, channels=1).fingerprint(),
        ImageFolder(root, 8, background="black").fingerprint(),
        ImageFolder(root, 8, layout="flat").fingerprint(),
        ImageFolder(root, 8, validation=1).split("train").fingerprint(),
        ImageFolder(root, 8, validation=1).split("validation").fingerprint(),
    }
    os.utime(root / "a" / "1.png", ns=(0, 1))
    different.add(ImageFolder(root, 8).fingerprint())
    os.rename(root / "a" / "1.png", root / "a" / "3.png")
    different.add(ImageFolder(root, 8).fingerprint())
    assert len(different | {base}) == 9
