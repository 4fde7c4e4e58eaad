import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from ldm.data.loading.order import (
    PositionSampler,
    SequentialBatches,
    flip_mask,
    hash64,
    mix64,
    permuted,
    uniform01,
)

SEEDS = st.integers(0, 2**63 - 1)


def take(sampler, count):
    return list(itertools.islice(sampler, count))


def test_mixer_known_answers():
    """The first outputs of SplitMix64 from state 0, as published with the generator."""
    states = np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert [hex(v) for v in mix64(states).tolist()] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 5000), SEEDS, st.integers(0, 2**40))
def test_an_epoch_is_a_permutation(count, seed, epoch):
    order = permuted(np.arange(count), count, seed, epoch)
    assert np.array_equal(np.sort(order), np.arange(count))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 2**40), SEEDS, st.data())
def test_a_slot_depends_on_its_address_alone(count, seed, data):
    slots = np.array(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=20)))
    epochs = np.arange(len(slots))
    whole = permuted(slots, count, seed, epochs)
    alone = [int(permuted(slots[i : i + 1], count, seed, i)[0]) for i in range(len(slots))]
    assert whole.tolist() == alone
    assert (whole >= 0).all() and (whole < count).all()


def test_a_million_samples_are_permuted_without_pattern():
    count = 1_000_000
    order = permuted(np.arange(count), count, 0, 0)
    assert len(np.unique(order)) == count
    assert abs(np.corrcoef(np.arange(count), order)[0, 1]) < 0.005
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.005


@pytest.mark.parametrize("count", [2, 3, 5, 8, 10, 37])
def test_every_index_is_as_likely_in_every_place(count):
    epochs = 4000
    order = permuted(np.tile(np.arange(count), epochs), count, 1, np.repeat(np.arange(epochs), count))
    seen = np.stack([np.bincount(column, minlength=count) for column in order.reshape(epochs, count).T])
    chi_square = ((seen - epochs / count) ** 2 / (epochs / count)).sum()
    freedom = (count - 1) ** 2
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5 + 3


def test_seeds_and_epochs_give_unrelated_orders():
    orders = [permuted(np.arange(1000), 1000, seed, epoch) for seed in range(4) for epoch in range(4)]
    for one, other in itertools.combinations(orders, 2):
        assert (one == other).mean() < 0.01


def test_the_order_of_a_run_stays_what_it_is():
    """Changing these numbers breaks the resumption of everybody's runs."""
    assert take(PositionSampler(10, 0, 4), 3) == [
        [(3, 0), (5, 1), (0, 2), (6, 3)],
        [(1, 4), (4, 5), (9, 6), (2, 7)],
        [(7, 8), (8, 9), (5, 10), (2, 11)],
    ]
    assert permuted(np.arange(4), 1_000_000, 7, 3).tolist() == [427246, 965867, 698053, 150275]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 300),
    SEEDS,
    st.integers(1, 8),
    st.integers(1, 40),
    st.integers(0, 50),
    st.integers(1, 20),
)
def test_ranks_share_the_global_batch_and_resuming_continues_it(count, seed, world, share, start, steps):
    batch = world * share
    whole = take(PositionSampler(count, seed, batch), start + steps)
    ranks = [
        take(PositionSampler(count, seed, batch, rank, world, start_step=start), steps)
        for rank in range(world)
    ]
    assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == whole[start:]
    flat = sum(whole, [])
    assert [position for _, position in flat] == list(range(len(flat)))
    for epoch in range(len(flat) // count):
        indices = [index for index, _ in flat[epoch * count : (epoch + 1) * count]]
        assert sorted(indices) == list(range(count))


def test_batches_larger_than_the_dataset():
    assert take(PositionSampler(1, 5, 4), 2) == [
        [(0, 0), (0, 1), (0, 2), (0, 3)],
        [(0, 4), (0, 5), (0, 6), (0, 7)],
    ]
    batch = PositionSampler(3, 5, 9).batch(0)
    assert all(sorted(i for i, _ in batch[k : k + 3]) == [0, 1, 2] for k in (0, 3, 6))


def test_iteration_and_lookup_agree_far_out():
    sampler = PositionSampler(12345, 3, 5000, 1, 2, start_step=10**9)
    assert take(sampler, 3) == [sampler.batch(10**9 + i) for i in range(3)]


def test_steps_bound_the_run_not_the_rest_of_it():
    sampler = PositionSampler(10, 0, 2, start_step=7, steps=10)
    assert len(sampler) == len(list(sampler)) == 3
    assert list(sampler)[0][0][1] == 14
    assert list(PositionSampler(10, 0, 2, start_step=10, steps=10)) == []
    with pytest.raises(TypeError, match="never ends"):
        len(PositionSampler(10, 0, 2))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(num_samples=0), "empty"),
        (dict(batch_size=10, world_size=4), "multiple of 4 processes, got 10"),
        (dict(batch_size=0), "positive multiple"),
        (dict(rank=2, world_size=2), "rank"),
        (dict(seed=-1), "seed"),
        (dict(start_step=-1), "start_step"),
        (dict(steps=-1), "steps"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        PositionSampler(**{"num_samples": 10, "seed": 0, "batch_size": 4, **arguments})


def test_slots_outside_the_set():
    with pytest.raises(ValueError, match="slots"):
        permuted(np.array([10]), 10, 0, 0)


def test_sequential_batches():
    assert list(SequentialBatches(5, 2)) == [[0, 1], [2, 3], [4]]
    assert len(SequentialBatches(5, 2)) == 3
    assert list(SequentialBatches(np.array([4, 2]), 8)) == [[4, 2]]
    with pytest.raises(ValueError, match="batch_size"):
        SequentialBatches(5, 0)


@settings(deadline=None, max_examples=50)
@given(SEEDS, st.lists(st.integers(-1, 2**60), min_size=1, max_size=20))
def test_hashes_are_elementwise(seed, values):
    values = np.array(values)
    assert hash64(seed, "a", values).tolist() == [int(hash64(seed, "a", int(v))[0]) for v in values]
    assert (hash64(seed, "a", values) != hash64(seed, "b", values)).all()
    assert (hash64(seed, "a", values) != hash64((seed + 1) % 2**63, "a", values)).all()


def test_flips_are_fair_and_the_plain_view_has_none():
    flips = flip_mask(0, np.arange(100_000))
    assert abs(flips.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(flips[:-1], flips[1:])[0, 1]) < 0.02
    assert not flip_mask(0, np.full(100, -1)).any()


def test_uniform_numbers():
    values = uniform01(3, "u", np.arange(100_000))
    assert values.min() >= 0 and values.max() < 1
    assert abs(values.mean() - 0.5) < 0.005 and abs(values.var() - 1 / 12) < 0.002
