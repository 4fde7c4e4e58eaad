import math
import os
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data import ArrayDataset, ImageFolder, PositionSampler, SequentialBatches, collate, make_loader
from ldm.data.loading import loader as loader_module
from ldm.data.loading.loader import available_cpus, start_method, worker_count


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(8):
            pixels = rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    return ImageFolder(tmp_path, 16, crop="random", flip=True)


def in_memory(count=20):
    pixels = torch.arange(count * 12).remainder(256).byte().view(count, 3, 2, 2)
    captions = [f"number {i}" for i in range(count)]
    return ArrayDataset(
        "test", pixels, np.arange(count) % 3, ["x", "y", "z"], captions, flip=True, captions=captions
    )


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[k], other[k]) if isinstance(one[k], torch.Tensor) else one[k] == other[k] for k in one
    )


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_the_number_of_workers_changes_nothing(folder, method):
    sampler = PositionSampler(len(folder), 3, 6, steps=5)
    expected = list(make_loader(folder, sampler, num_workers=0))
    found = list(make_loader(folder, sampler, num_workers=2, multiprocessing_context=method))
    assert len(expected) == len(found) == 5
    assert all(same(one, other) for one, other in zip(expected, found, strict=True))
    assert expected[0]["image"].shape == (6, 3, 16, 16) and expected[0]["label"].shape == (6,)


def test_ranks_see_the_slices_of_the_global_batch(folder):
    whole = next(iter(make_loader(folder, PositionSampler(16, 3, 6), num_workers=0)))
    ranks = [
        next(iter(make_loader(folder, PositionSampler(16, 3, 6, r, 3), num_workers=0))) for r in range(3)
    ]
    assert all(torch.equal(torch.cat([rank[key] for rank in ranks]), whole[key]) for key in whole)


def test_whole_batches_pass_through():
    dataset = in_memory()
    entries = [(3, 10), (4, 11), (3, 12)]
    batch = next(iter(make_loader(dataset, [entries], num_workers=0)))
    assert same(batch, collate([dataset[entry] for entry in entries]))
    assert batch["caption"] == ["number 3", "number 4", "number 3"]
    assert dataset.__getitems__(entries)["image"].shape == (3, 3, 2, 2)
    with_worker = next(iter(make_loader(dataset, [entries], num_workers=1)))
    assert same(batch, with_worker)


def test_a_loader_leaves_the_global_random_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(make_loader(in_memory(), SequentialBatches(20, 5), num_workers=0))
    assert torch.equal(torch.rand(1), expected)


class Threads(torch.utils.data.Dataset):
    def __getitem__(self, index):
        return {"threads": torch.tensor(torch.get_num_threads())}


def test_workers_have_one_thread():
    batch = next(iter(make_loader(Threads(), SequentialBatches(2, 2), num_workers=1)))
    assert batch["threads"].tolist() == [1, 1]


def test_worker_counts(folder, monkeypatch):
    assert worker_count(in_memory()) == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for cores, expected in ((1, 0), (2, 1), (4, 2), (64, 8)):
        monkeypatch.setattr(loader_module, "available_cpus", lambda cores=cores: cores)
        assert worker_count(folder) == expected
    assert worker_count(folder, ranks_on_node=8) == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    assert worker_count(folder) == 1
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for cores, expected in ((1, 1), (2, 1), (4, 3), (64, 8)):
        monkeypatch.setattr(loader_module, "available_cpus", lambda cores=cores: cores)
        assert worker_count(folder) == expected


def test_available_cpus_knows_affinity_and_quota(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    for quota, expected in (
        ("max 100000", 12),
        ("350000 100000", 3),
        ("50000 100000", 1),
        ("9900000 100000", 12),
    ):
        monkeypatch.setattr(loader_module.Path, "read_text", lambda self, quota=quota: quota)
        assert available_cpus() == expected

    def missing(self):
        raise FileNotFoundError

    monkeypatch.setattr(loader_module.Path, "read_text", missing)
    assert available_cpus() == 12


def test_start_method(monkeypatch):
    monkeypatch.setattr(loader_module.sys, "platform", "linux")
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    assert start_method() == "fork"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert start_method() == "forkserver"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(threading, "active_count", lambda: 2)
    assert start_method() == "forkserver"
    monkeypatch.setattr(loader_module.sys, "platform", "darwin")
    assert start_method() is None


@pytest.mark.parametrize("workers", [-1, "many", 1.5, True])
def test_bad_worker_counts(workers):
    with pytest.raises(ValueError, match="num_workers"):
        make_loader(in_memory(), SequentialBatches(20, 5), num_workers=workers)


def test_an_endless_loader_can_be_resumed(folder):
    sampler = PositionSampler(16, 0, 4)
    through = iter(make_loader(folder, sampler, num_workers=0))
    expected = [next(through) for _ in range(6)][4:]
    sampler = PositionSampler(16, 0, 4, start_step=4)
    resumed = iter(make_loader(folder, sampler, num_workers=0))
    assert all(same(one, next(resumed)) for one in expected)
    assert math.prod(expected[0]["position"].shape) == 4 and expected[0]["position"][0] == 16
