import json
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections import namedtuple

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from PIL import Image

from ldm import files
from ldm.data import (
    ArrayDataset,
    ChannelStatistics,
    ImageFolder,
    LatentCache,
    PositionSampler,
    make_loader,
    measure_latents,
)
from ldm.data.latents import shards


def images(count=11, flip=False, **options):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (count, 3, 8, 8), dtype=np.uint8))
    keys = [f"image {i}" for i in range(count)]
    return ArrayDataset("test", pixels, np.arange(count) % 3, ["x", "y", "z"], keys, flip=flip, **options)


def moments(x):
    """A little encoder: (B, 3, 8, 8) -> (B, 4, 4, 4), not symmetric, with some spread."""
    pooled = torch.nn.functional.avg_pool2d(x, 2)
    ramp = torch.linspace(0.5, 1.5, 4)
    mean = torch.cat([pooled, pooled[:, :1] ** 2 - 3], 1) * ramp + 0.1
    return mean, 0.05 + 0.01 * mean.abs()


def no_spread(x):
    mean, std = moments(x)
    return mean, torch.zeros_like(std)


class Counting:
    def __init__(self, fn=moments):
        self.fn, self.calls = fn, 0

    def __call__(self, x):
        self.calls += 1
        return self.fn(x)


def build(dataset, directory, fn=moments, first_stage="f", **options):
    return LatentCache.build(
        dataset, fn, directory, first_stage=first_stage, batch_size=4, num_workers=0, **options
    )


# -- what comes back


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shard_bytes", [1, 3000, 1 << 20])
def test_cached_training_sees_what_encoding_would_give(tmp_path, flip, shard_bytes):
    dataset = images(flip=flip)
    cache = build(dataset, tmp_path / "c", shard_bytes=shard_bytes)
    latents = cache.dataset()
    for seed in (0, 9):
        dataset.set_seed(seed)
        latents.set_seed(seed)
        sampler = PositionSampler(len(dataset), 1, 6, steps=7)
        for x, z in zip(make_loader(dataset, sampler), make_loader(latents, sampler), strict=True):
            mean, std = moments(x["image"])
            assert torch.allclose(z["mean"], mean, atol=1e-6) and torch.allclose(z["std"], std, atol=1e-6)
            assert all(torch.equal(x[key], z[key]) for key in ("label", "index", "position"))
            assert z["mean"].dtype == torch.float32
    sizes = [path.stat().st_size for path in cache.directory.glob("shard-*.npy")]
    assert len(sizes) == (11 if shard_bytes == 1 else 1 if shard_bytes > 10**5 else len(sizes))
    assert max(sizes) <= max(shard_bytes, 2 * 2 * 4 * 4 * 4 * 4) + 200


def test_one_sample_equals_its_place_in_a_batch(tmp_path):
    latents = build(images(flip=True, captions=[f"c{i}" for i in range(11)]), tmp_path / "c").dataset()
    entries = [(3, 5), (10, 6), (3, 7), (0, 8)]
    batch = latents.__getitems__(entries)
    assert batch["caption"] == ["c3", "c10", "c3", "c0"]
    for i, entry in enumerate(entries):
        sample = latents[entry]
        assert all(torch.equal(sample[k], batch[k][i]) for k in sample if k != "caption")
    assert latents[3]["position"] == -1
    assert torch.allclose(latents[3]["mean"], moments(images()[3]["image"][None])[0][0])
    with pytest.raises(IndexError):
        latents[11]


def test_attributes(tmp_path):
    cache = build(images(), tmp_path / "c")
    assert len(cache) == 11 and cache.shape == (4, 4, 4) and not cache.flips and cache.dtype == "float32"
    assert cache.classes == ["x", "y", "z"] and cache.beside["label"].tolist() == images().labels.tolist()
    latents = cache.dataset()
    assert latents.num_classes == 3 and latents.in_memory and len(latents) == 11
    again = LatentCache.open(tmp_path / "c")
    assert again.fingerprint == cache.fingerprint == latents.fingerprint()
    with pytest.raises(ValueError, match="no mirrored"):
        cache.read(np.array([0]), np.array([True]))


def test_half_precision_keeps_its_promise(tmp_path):
    exact = build(images(), tmp_path / "exact", dtype="float32").dataset().__getitems__(list(range(11)))
    half = build(images(), tmp_path / "half", dtype="float16")
    rounded = half.dataset().__getitems__(list(range(11)))
    for key in ("mean", "std"):
        error = (rounded[key] - exact[key]).abs() / exact[key].abs()
        assert 0 < error.max() <= 2**-11
    assert half.dtype == "float16"
    with pytest.raises(ValueError, match='70000.* dtype="float32"'):
        build(
            images(),
            tmp_path / "over",
            lambda x: (torch.full((len(x), 1, 2, 2), 70000.0), None),
            dtype="float16",
        )


def test_auto_precision_depends_on_the_size(tmp_path, monkeypatch):
    assert build(images(), tmp_path / "small").dtype == "float32"
    monkeypatch.setattr(shards, "_EXACT_BELOW", 1000)
    assert build(images(), tmp_path / "large").dtype == "float16"


@pytest.mark.parametrize("fn", [no_spread, lambda x: (moments(x)[0], None)])
def test_a_first_stage_without_spread_takes_half_the_space(tmp_path, fn):
    cache = build(images(), tmp_path / "c", fn)
    item = cache.dataset()[4]
    assert torch.equal(item["std"], torch.zeros(4, 4, 4))
    assert torch.allclose(item["mean"], moments(images()[4]["image"][None])[0][0])
    size = (cache.directory / "shard-00000.npy").stat().st_size
    assert size == 11 * 64 * 4 + 128


def test_folders_captionless_and_classless(tmp_path):
    (tmp_path / "i").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "i" / f"{i}.png")
    cache = build(ImageFolder(tmp_path / "i", 8), tmp_path / "c")
    assert not cache.beside and cache.classes is None
    assert set(cache.dataset()[(1, 0)]) == {"mean", "std", "index", "position"}


def test_a_loader_worker_reads_the_same(tmp_path):
    latents = build(images(flip=True), tmp_path / "c", shard_bytes=3000).dataset()
    latents[0]
    assert len(pickle.dumps(latents)) < 5000  # no mapped file travels along
    sampler = PositionSampler(11, 0, 4, steps=4)
    for workers in (0, 1):
        for one, other in zip(
            make_loader(latents, sampler, 0), make_loader(latents, sampler, num_workers=workers), strict=True
        ):
            assert all(torch.equal(one[key], other[key]) for key in one)


# -- statistics


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.integers(1, 4),
    st.floats(-1e4, 1e4),
    st.integers(0, 2**31),
)
def test_streaming_statistics_equal_those_of_all_at_once(sizes, channels, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    batches = [
        torch.randn(n, channels, 3, 2, generator=generator, dtype=torch.float64) + offset for n in sizes
    ]
    spreads = [torch.rand(n, channels, 3, 2, generator=generator, dtype=torch.float64) for n in sizes]
    statistics = ChannelStatistics()
    for mean, std in zip(batches, spreads, strict=True):
        statistics.update(mean, std)
    mean, std = torch.cat(batches), torch.cat(spreads)
    variance = mean.var((0, 2, 3), unbiased=False) + (std**2).mean((0, 2, 3))
    assert torch.allclose(statistics.mean, mean.mean((0, 2, 3)), rtol=1e-12, atol=1e-12)
    assert torch.allclose(statistics.std, variance.sqrt(), rtol=1e-9)
    assert statistics.count == 6 * sum(sizes)


def test_statistics_are_those_of_sampled_latents(tmp_path):
    cache = build(images(200, flip=True), tmp_path / "c")
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for flipped in (False, True):
        mean, std = cache.read(np.arange(200), np.full(200, flipped))
        drawn += [mean + std * torch.randn(mean.shape, generator=generator) for _ in range(20)]
    z = torch.cat(drawn).double()
    assert torch.allclose(z.mean((0, 2, 3)), cache.latent_mean.double(), atol=5e-3)
    assert torch.allclose(z.std((0, 2, 3)), cache.latent_std.double(), rtol=5e-3)
    normalized = (z - cache.latent_mean[:, None, None]) / cache.latent_std[:, None, None]
    assert abs(float(normalized.var()) - 1) < 0.01


def test_measuring_without_a_cache(tmp_path):
    cache = build(images(), tmp_path / "c")
    measured = measure_latents(images(), moments, batch_size=3, num_workers=0)
    assert torch.allclose(measured.mean.float(), cache.latent_mean, atol=1e-6)
    assert torch.allclose(measured.std.float(), cache.latent_std, atol=1e-6)
    some = measure_latents(images(), moments, samples=5, num_workers=0)
    assert some.count == 5 * 16 and not torch.equal(some.mean, measured.mean)
    with pytest.raises(ValueError, match="at least one"):
        measure_latents(images(), moments, samples=0)
    with pytest.raises(ValueError, match="no latents"):
        ChannelStatistics().mean  # noqa: B018


# -- when it is made anew


def test_a_fresh_cache_is_reused(tmp_path):
    fn = Counting()
    first = build(images(), tmp_path / "c", fn)
    assert fn.calls == 3
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "c").iterdir()}
    second = build(images(), tmp_path / "c", fn)
    assert fn.calls == 3 and first.fingerprint == second.fingerprint
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "c").iterdir()}
    build(images(), tmp_path / "c", fn, reuse=False)
    assert fn.calls == 6


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(first_stage="g"), "the first stage"),
        (dict(dataset=images(12)), "the images"),
        (dict(dataset=images().split("train")), "the images"),
        (dict(flips=True), "flips"),
        (dict(dtype="float16"), "dtype"),
    ],
)
def test_a_stale_cache_is_rebuilt_with_the_reason(tmp_path, caplog, change, reason):
    caplog.set_level(logging.INFO)
    old = build(images(), tmp_path / "c")
    fn = Counting(lambda x: (moments(x)[0] + 1, moments(x)[1]))
    new = build(change.pop("dataset", images()), tmp_path / "c", fn, **change)
    assert fn.calls and new.fingerprint != old.fingerprint
    assert "changed since the last time" in caplog.text and reason in caplog.text
    assert torch.allclose(new.latent_mean, old.latent_mean + 1, atol=0.2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".c.lock", "c"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: cut(c / "shard-00001.npy"),
        lambda c: (c / "shard-00000.npy").unlink(),
        lambda c: (c / "label.npy").unlink(),
        lambda c: (c / "manifest.json").write_text("{"),
        lambda c: (c / "manifest.json").write_text("[]"),
        lambda c: (c / "manifest.json").write_text('{"made_from": {"version": 1}}'),
        lambda c: (c / "manifest.json").write_text('{"made_from": {"version": 0}}'),
    ],
)
def test_a_damaged_cache_is_never_used(tmp_path, damage):
    build(images(), tmp_path / "c", shard_bytes=3000)
    damage(tmp_path / "c")
    with pytest.raises(ValueError, match="no usable latent cache"):
        LatentCache.open(tmp_path / "c")
    fn = Counting()
    cache = build(images(), tmp_path / "c", fn)
    assert fn.calls == 3
    assert torch.allclose(cache.dataset()[10]["mean"], moments(images()[10]["image"][None])[0][0])


def test_opening_nothing(tmp_path):
    with pytest.raises(ValueError, match="there is none yet"):
        LatentCache.open(tmp_path / "c")


# -- builds that do not finish


def failing(x):
    if failing.left == 0:
        raise RuntimeError("out of luck")
    failing.left -= 1
    return moments(x)


def test_a_failed_build_leaves_nothing_and_keeps_the_old_one(tmp_path):
    failing.left = 1
    with pytest.raises(RuntimeError, match="out of luck"):
        build(images(), tmp_path / "c", failing)
    assert [p.name for p in tmp_path.iterdir()] == [".c.lock"]
    old = build(images(), tmp_path / "c")
    failing.left = 1
    with pytest.raises(RuntimeError, match="out of luck"):
        build(images(), tmp_path / "c", failing, reuse=False)
    assert LatentCache.open(tmp_path / "c").fingerprint == old.fingerprint


def _killed(directory):
    def fn(x):
        fn.calls += 1
        if fn.calls == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return moments(x)

    fn.calls = 0
    build(images(), directory, fn)


def test_a_killed_build_is_cleaned_up_by_the_next(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(tmp_path / "c",))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert any(".tmp-" in path.name for path in tmp_path.iterdir()) and not (tmp_path / "c").exists()
    (tmp_path / "c.tmp-of-mine").mkdir()
    assert len(build(images(), tmp_path / "c")) == 11
    assert sorted(p.name for p in tmp_path.iterdir()) == [".c.lock", "c", "c.tmp-of-mine"]


def test_two_builders_at_once(tmp_path):
    fn = Counting(lambda x: (time.sleep(0.02), moments(x))[1])
    found, start = [], threading.Barrier(3)

    def work():
        start.wait()
        found.append(build(images(), tmp_path / "c", fn).fingerprint)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len(set(found)) == 1
    assert fn.calls == 3  # one of them did the work
    assert sorted(p.name for p in tmp_path.iterdir()) == [".c.lock", "c"]


def test_without_file_locks_builders_tolerate_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    other = build(images(), tmp_path / "other")

    def race(x):
        """While this one builds, another process puts its own in place."""
        if not (tmp_path / "c").exists():
            os.rename(tmp_path / "other", tmp_path / "c")
        return moments(x)

    cache = build(images(), tmp_path / "c", race)
    assert cache.fingerprint == other.fingerprint
    assert sorted(p.name for p in tmp_path.iterdir()) == [".c.lock", ".other.lock", "c"]


def test_no_space_is_said_before_the_work(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    fn = Counting()
    with pytest.raises(ValueError, match=r'0.00 GB needed, 0.00 GB free.*dtype="float16".*cache=false'):
        build(images(), tmp_path / "c", fn)
    assert fn.calls == 1


def test_other_folders_are_not_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.txt").write_text("precious")
    with pytest.raises(ValueError, match="no latent cache; it will not be replaced"):
        build(images(), tmp_path / "photos")
    with pytest.raises(ValueError, match="is a file"):
        build(images(), tmp_path / "photos" / "a.txt")
    assert (tmp_path / "photos" / "a.txt").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    assert len(build(images(), tmp_path / "empty")) == 11


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(dtype="bfloat16"), "dtype"),
        (dict(shard_bytes=0), "shard_bytes"),
        (dict(first_stage=""), "first_stage"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        build(images(), tmp_path / "c", **options)


def test_random_crops_cannot_be_cached(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match='crop="center", or cache=false'):
        build(ImageFolder(tmp_path, 8, crop="random"), tmp_path / "c")


def test_an_empty_part(tmp_path):
    with pytest.raises(ValueError, match="empty"):
        build(images(validation=0).split("validation"), tmp_path / "c")


def test_latents_that_are_no_numbers(tmp_path):
    def broken(x):
        mean, std = moments(x)
        mean[1, 0, 0, 0] = float("nan")
        return mean, std

    with pytest.raises(ValueError, match=r"not finite for images \[1\]"):
        build(images(), tmp_path / "c", broken)
    with pytest.raises(ValueError, match=r"both must be \(B, c, h, w\)"):
        build(images(), tmp_path / "c", lambda x: (moments(x)[0], moments(x)[1][:, :1]))


def test_progress_and_manifest(tmp_path):
    calls = []
    cache = build(images(), tmp_path / "c", progress=lambda done, total: calls.append((done, total)))
    assert calls == [(4, 11), (8, 11), (11, 11)]
    manifest = json.loads((cache.directory / "manifest.json").read_text())
    assert manifest["made_from"]["first_stage"] == "f" and manifest["count"] == 11
