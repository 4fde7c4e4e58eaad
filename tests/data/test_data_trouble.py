"""What a run says and does when its images, their folder or the machine make trouble."""

import logging
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import training_runs as T
from PIL import Image

from ldm.data import (
    ArrayDataset,
    BadImageError,
    ImageFolder,
    LatentCache,
    PositionSampler,
    SequentialBatches,
    make_loader,
)
from ldm.data.loading import loader as loader_module
from ldm.data.loading import workers as workers_module
from ldm.data.loading.loader import batch_bytes, needed_bytes, worker_count, workers_that_fit
from ldm.data.loading.workers import LostWorker, Parcel, SharedMemoryFull, clear_worker_errors, map_tensors

MB = 1 << 20


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Images, one of them broken, and a config without workers."""
    place = tmp_path_factory.mktemp("trouble")
    images = T.write_images(place / "my images", each=12)
    config = T.autoencoder_config(images, place / "runs")
    # In epoch 0 the broken image comes late, so that there is a checkpoint to resume from.
    config["data"]["params"] |= {"validation": 0}
    config["training"] |= {"checkpoint_every": 1, "keep": 2, "batch_size": 4, "steps": 8}
    config["logging"] |= {"images_every": None, "validate_every": None}
    T.write_config(place / "ae.yaml", config)
    last, _ = PositionSampler(24, 0, 4).batch(5)[-1]
    Path(ImageFolder(images, 16).path(last)).write_bytes(b"no picture")
    return place


# -- unreadable images


def errors_of(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("error:")]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_one_line_and_its_advice_works(place, workers):
    name = f"bad-{workers}"
    arguments = (place / "ae.yaml", f"name={name}", f"training.workers={workers}")
    said = T.finish(*arguments, log=place / "log", code=1)
    assert "Traceback" not in said
    (error,) = errors_of(said)
    assert ".png: " in error and said.rstrip().endswith(error)
    assert f"`ldm verify '{place / 'my images'}'` lists all such files" in error
    assert "data.params.on_error=report goes on without them" in error
    assert T.steps_saved(place / "runs" / name) == [4, 5]
    said = T.finish(*arguments, "data.params.on_error=report", log=place / "log")
    assert "continuing" in said and "at step 5 of 8" in said
    assert T.newest_state(place / "runs" / name)["step"] == 8
    # Nor does a later start without it have to repeat it.
    assert "is complete" in T.finish(*arguments, "data.params.max_pixels=1000000", log=place / "log")


def test_errors_of_workers_arrive_as_they_were_raised(tmp_path):
    T.write_images(tmp_path, classes=(), each=3)
    (tmp_path / "1.png").write_bytes(b"no picture")
    found = []
    for workers in (0, 1):
        with pytest.raises(BadImageError) as caught:
            list(make_loader(ImageFolder(tmp_path, 8), SequentialBatches(3, 3), workers))
        found.append(str(caught.value))
        assert multiprocessing.active_children() == []
    assert found[0] == found[1] and "\n" not in found[0]


class Raises(torch.utils.data.Dataset):
    def __init__(self, kind: type[Exception], *arguments):
        self.kind, self.arguments = kind, arguments

    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise self.kind(*self.arguments)


class Unsendable(OSError):
    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")


def test_which_errors_keep_their_traceback():
    def raised(expected, kind, *arguments):
        with pytest.raises(expected) as caught:
            list(make_loader(Raises(kind, *arguments), SequentialBatches(2, 2), 1))
        return caught.value

    assert str(raised(OSError, Unsendable, "one", "two")) == "one and two"
    stale = raised(FileNotFoundError, OSError, 2, "No such file or directory", "x.png")
    assert stale.filename == "x.png" and "Traceback" not in str(stale)
    assert "Traceback" in str(raised(TypeError, TypeError, "a bug"))


# -- moving the images


def test_images_may_move_if_they_stay_the_same(place):
    images = T.write_images(place / "here", each=6)
    fixed = (place / "ae.yaml", "name=moved", f"runs={place / 'runs'}")
    T.finish(*fixed, f"data.params.root={images}", "training.steps=2", log=place / "log")
    moved = shutil.move(images, place / "there")
    said = T.finish(*fixed, f"data.params.root={moved}", "training.steps=3", log=place / "log")
    assert "the same images, in another place" in said and "at step 2 of 3" in said
    assert "changed since" not in said
    assert str(moved) in (place / "runs/moved/config.yaml").read_text()
    for other in (T.write_images(place / "others", each=5), shutil.copytree(moved, place / "copied")):
        for path in other.rglob("*.png"):
            os.utime(path, (1e9, 1e9))
        said = T.finish(*fixed, f"data.params.root={other}", "training.steps=3", log=place / "log", code=1)
        assert "holds a run of another config:\n  data.params.root: " in said
        assert "The images there are not those of this run" in said and "`rsync -a`" in said
    changes = (f"data.params.root={place / 'others'}", "seed=1")
    said = T.finish(*fixed, *changes, "training.steps=3", log=place / "log", code=1)
    assert "seed: 0 -> 1" in said and "data.params.root: " in said


def test_a_missing_folder_is_told_before_anything_slow(place, tmp_path):
    code = f"""
import sys
from ldm.cli import run_verb
for more in ([], ["--dry-run"]):
    try:
        run_verb("train", [{str(place / "ae.yaml")!r}, "name=gone", "data.params.root=~/gone"] + more)
    except SystemExit as end:
        print(end.code)
print(*(name for name in ("ldm.training.fit", "pytorch_lightning") if name in sys.modules))
"""
    environment = {**os.environ, "PYTHONPATH": str(T.ROOT), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stderr == f"error: image folder {tmp_path}/gone does not exist\n" * 2
    assert done.stdout == "1\n1\n\n"
    assert not (place / "runs/gone").exists()


# -- what goes through shared memory


def test_images_leave_a_worker_as_bytes_and_arrive_as_the_same_floats(tmp_path):
    T.write_images(tmp_path)
    dataset = ImageFolder(tmp_path, 16, crop="random", flip=True)
    sampler = PositionSampler(len(dataset), 5, 6, steps=4)
    plain = list(make_loader(dataset, sampler, 0))
    loader = make_loader(dataset, sampler, 2)
    sent = loader.dataset.__getitems__(sampler.batch(0))
    assert isinstance(sent, Parcel) and sent.batch["image"].dtype == torch.uint8
    assert all(value.is_shared() for value in sent.batch.values())
    unpacked = sent.unpack()
    assert list(unpacked) == list(plain[0]) and not any(value.is_shared() for value in unpacked.values())
    for one, other in zip(plain, loader, strict=True):
        assert T.differences(one, other) == []
        assert other["image"].dtype == torch.float32 and other["image"].is_contiguous()
    for entry in ((3, 7), 3):
        one, other = dataset[entry], dataset.compact(entry)
        assert torch.equal(one["image"], other["image"].float() / 127.5 - 1)
    assert batch_bytes(dataset, sampler) - batch_bytes(dataset, SequentialBatches(9, 5)) == 3 * 16 * 16


def test_the_pinning_thread_unpacks(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.flip(0))  # there may be no GPU
    batch = {"image": torch.arange(12, dtype=torch.uint8).view(2, 3, 1, 2), "index": torch.tensor([4, 5])}
    pinned = Parcel(batch, compact=True).pin_memory()
    assert list(pinned) == ["image", "index"] and pinned["index"].tolist() == [5, 4]
    assert torch.equal(pinned["image"], batch["image"].flip(0).float() / 127.5 - 1)
    assert torch.equal(Parcel(batch, compact=False).pin_memory()["image"], batch["image"].flip(0))


def test_a_collate_function_of_ones_own_gets_whole_samples(tmp_path):
    T.write_images(tmp_path, classes=())
    for workers in (0, 1):
        (batch,) = make_loader(ImageFolder(tmp_path, 16), SequentialBatches(9, 9), workers, collate_fn=list)
        assert isinstance(batch, list) and batch[0]["image"].dtype == torch.float32


def test_tensors_are_found_wherever_they_are():
    value = {"a": [torch.ones(1), "x"], "b": (torch.ones(2), {"c": torch.ones(3)}), "d": None}
    doubled = map_tensors(lambda t: 2 * t, value)
    assert doubled["a"][1] == "x" and doubled["d"] is None and isinstance(doubled["b"], tuple)
    assert doubled["a"][0].item() == 2 and doubled["b"][1]["c"].tolist() == [2, 2, 2]


class LittleRoom(torch.utils.data.Dataset):
    """In a worker, files (and so shared memory) may have 1 MB; a sample has 4."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if torch.utils.data.get_worker_info() is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (MB, resource.RLIM_INFINITY))
        return {"image": torch.zeros(MB)}


@pytest.mark.skipif(sys.platform != "linux", reason="shared memory is a file there")
def test_full_shared_memory_is_an_error_with_the_ways_out():
    with pytest.raises(SharedMemoryFull, match="4.2 MB .*training.workers=0 .*--shm-size") as caught:
        list(make_loader(LittleRoom(), SequentialBatches(4, 1), 1))
    assert "\n" not in str(caught.value) and isinstance(caught.value, OSError)


@pytest.fixture
def room(monkeypatch):
    monkeypatch.setattr(loader_module, "_told", set())

    def has(count):
        monkeypatch.setattr(loader_module, "free_bytes", lambda: count)

    return has


def test_fewer_workers_where_shared_memory_is_small(room):
    batch = 10 * MB
    for free, ranks, expected in ((None, 1, 8), (1000 * MB, 1, 8), (1000 * MB, 4, 5), (64 * MB, 1, 0)):
        room(free)
        assert workers_that_fit(8, batch, 2, ranks) == expected
    for workers in range(1, 9):
        room(2 * needed_bytes(batch, workers, 2))
        assert workers_that_fit(8, batch, 2, 1) == workers
        room(2 * needed_bytes(batch, workers, 2) - 1)
        assert workers_that_fit(8, batch, 2, 1) == workers - 1
    assert workers_that_fit(8, 0, 2, 1) == 8 and workers_that_fit(0, batch, 2, 1) == 0


def test_the_loader_asks_for_room(tmp_path, room, monkeypatch, caplog):
    T.write_images(tmp_path)
    dataset = ImageFolder(tmp_path, 256)
    monkeypatch.setattr("ldm.data.loading.loader.available_cpus", lambda: 16)
    batches = PositionSampler(len(dataset), 0, 64, world_size=2)
    assert worker_count(dataset) >= 8 - 1
    room(64 * MB)  # a batch of 32 has 6.3 MB
    assert make_loader(dataset, batches).num_workers == 1
    assert make_loader(dataset, batches, ranks_on_node=2).num_workers == 0
    (record,) = caplog.records  # once
    assert record.levelno == logging.WARNING
    for words in ("8 worker processes", "67.1 MB free", "1 start instead", "--shm-size", "--ipc=host"):
        assert words in record.getMessage()
    caplog.clear()
    for workers, warned in ((0, 0), (4, 0), (5, 1), (6, 1)):
        assert make_loader(dataset, batches, workers).num_workers == workers
        assert caplog.text.count("may need") == warned
    assert "training.workers=0" in caplog.text and "--shm-size" in caplog.text and "--ipc=host" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a small /dev/shm")
def test_a_run_with_a_small_dev_shm(place):
    """As in a container. Without a guard the process waits for ever for a batch that was dropped."""
    mount = "mount -t tmpfs -o size=256k tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "bash", "-c", mount], capture_output=True).returncode:
        pytest.skip("mounting takes rights that this process does not have")
    code = f"""
import torch
from ldm.data import ImageFolder, SequentialBatches, make_loader
from ldm.data.loading.workers import SharedMemoryFull

images = ImageFolder({str(place / "my images")!r}, 256, on_error="report")
for workers in ("auto", 4):
    loader = make_loader(images, SequentialBatches(24, 8), workers)
    try:
        print(workers, loader.num_workers, len(list(loader)))
    except SharedMemoryFull as error:
        print(workers, error)
"""
    script = f"{mount} && exec {sys.executable} - <<'EOF'\n{code}\nEOF"
    environment = {**os.environ, "PYTHONPATH": str(T.ROOT)}
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "auto 0 3" and lines[1].startswith("4 the shared memory (/dev/shm), with "), done
    assert "Traceback" not in done.stderr and "may need" in done.stderr


# -- workers that die or hang


class Dies(torch.utils.data.Dataset):
    """The third sample takes its worker down in one way or another."""

    def __init__(self, how):
        self.how = how

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 2:
            self.how()
        return {"index": torch.tensor(index)}


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def left():
    os._exit(3)


def sleeps():
    time.sleep(4)


@pytest.mark.parametrize("how", [killed, left])
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_dead_worker_is_one_sentence(how, method, monkeypatch):
    monkeypatch.setattr("ldm.data.loading.loader.LOOK_AFTER", 1)
    loader = make_loader(Dies(how), SequentialBatches(4, 1), 1, multiprocessing_context=method)
    began = time.monotonic()
    with pytest.raises(LostWorker, match="ended unexpectedly.*out of memory") as caught:
        list(loader)
    assert "\n" not in str(caught.value) and time.monotonic() - began < 20


@pytest.mark.parametrize(
    "said, expected",
    [
        ("(pid 7) is killed by signal: Killed. ", r"unexpectedly \(killed\): .*out of memory"),
        ("(pid 7) is killed by signal: Bus error. It is possible", "shared memory is full: .*--shm-size"),
        ("(pid 7) exited unexpectedly with exit code 3. Details", "unexpectedly: .*out of memory"),
        ("(pid(s) 7, 8) exited unexpectedly", "unexpectedly: .*out of memory"),
    ],
)
def test_a_death_that_is_noticed_elsewhere(said, expected):
    """A signal tells the main process, wherever it is; torch may raise another error from that."""
    with pytest.raises(LostWorker, match=expected), clear_worker_errors():
        raise RuntimeError(f"DataLoader worker {said}")
    with pytest.raises(LostWorker, match=expected), clear_worker_errors():
        raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly") from RuntimeError(
            f"DataLoader worker {said}"
        )
    with pytest.raises(RuntimeError, match="^of another kind$"), clear_worker_errors():
        raise RuntimeError("of another kind")


def test_slow_workers_are_waited_for_and_stuck_ones_are_not(monkeypatch, caplog):
    monkeypatch.setattr("ldm.data.loading.loader.LOOK_AFTER", 1)
    loader = make_loader(Dies(sleeps), SequentialBatches(4, 1), 1)
    assert [batch["index"].item() for batch in loader] == [0, 1, 2, 3]
    assert "waiting for images for 1 s now" in caplog.text  # once for each batch that is late
    monkeypatch.setattr(workers_module, "_GIVE_UP_AFTER", 2)
    with pytest.raises(LostWorker, match="no image has come .*training.workers=0"):
        list(make_loader(Dies(sleeps), SequentialBatches(4, 1), 1))


# -- words


def test_counts_and_names_read_well(tmp_path, caplog):
    T.write_images(tmp_path, classes=("bird", "red, my cat"), each=1)
    (tmp_path / "notes.txt").touch()
    summary = ImageFolder(tmp_path, 8).summary()
    assert '2 images in 2 classes (bird, "red, my cat"); ignored 1 file of another kind (.txt 1)' in summary
    assert ImageFolder(tmp_path / "bird", 8).summary().endswith(": 1 image")
    Image.new("RGB", (4, 4)).save(tmp_path / "bird" / "small.png")
    ImageFolder(tmp_path, 8)[1]
    assert "small.png is 4x4, smaller than size=8, and is enlarged, as are others like it" in caplog.text


# -- old caches


def moments(images):
    return images[:, :2, ::4, ::4], None


def test_older_caches_of_the_same_images_are_named(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    pixels = torch.arange(5 * 3 * 64).remainder(256).byte().view(5, 3, 8, 8)
    data = ArrayDataset("a", pixels, None, None, list("abcde"))
    other = ArrayDataset("b", pixels, None, None, list("abcde"))

    def build(name, first_stage, dataset=data):
        caplog.clear()
        LatentCache.build(dataset, moments, tmp_path / name, first_stage=first_stage)
        return [text for text in caplog.messages if "older latents" in text]

    assert build("one", "f") == [] and "encoding 5 images into" in caplog.text
    assert build("else", "f", other) == []
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "manifest.json").write_text("[1]")
    (said,) = build("two", "g")
    assert "in 1 folder under" in said and str(tmp_path) in said and "(one)" in said and "GB" in said
    assert build("two", "g") == []  # there is nothing to build
    (said,) = build("three", "h")
    assert "in 2 folders under" in said and "(one, two)" in said
    assert (tmp_path / "one" / "manifest.json").exists()
    taken = sum(path.stat().st_size for name in ("one", "two") for path in (tmp_path / name).iterdir())
    from ldm.data.latents.cache import other_caches

    assert sum(other_caches(tmp_path / "three", data.fingerprint()).values()) == taken


def test_one_image(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    data = ArrayDataset("a", torch.zeros(1, 3, 8, 8, dtype=torch.uint8), None, None, ["a"])
    LatentCache.build(data, moments, tmp_path / "c", first_stage="f")
    assert "encoding 1 image into" in caplog.text
