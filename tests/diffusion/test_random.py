import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from ldm.diffusion.random import normal, philox, subseed, uniform


def _tensor(*values):
    return tuple(torch.tensor([v]) for v in values)


@pytest.mark.parametrize(
    "counter, key, expected",
    [  # known answers published with Random123
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    assert tuple(int(w) for w in philox(_tensor(*counter), key)) == expected


def test_moments():
    x = normal(3, "noise", torch.arange(200), (1000,)).double()
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01
    assert abs((x**4).mean() - 3) < 0.1
    u = uniform(3, "time", torch.arange(100_000)).double()
    assert abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.001
    assert u.min() > 0 and u.max() < 1


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**63 - 1), st.integers(0, 2**40), st.integers(1, 9), st.integers(1, 7))
def test_value_depends_on_its_address_alone(seed, start, batch, size):
    positions = torch.arange(start, start + batch)
    whole = normal(seed, "noise", positions, (size, 3))
    alone = torch.cat([normal(seed, "noise", positions[i : i + 1], (size, 3)) for i in range(batch)])
    assert torch.equal(whole, alone)
    assert not torch.equal(whole, normal(seed, "time", positions, (size, 3)))


def test_bad_positions_and_seed():
    with pytest.raises(ValueError, match="int64"):
        normal(0, "noise", torch.zeros(2), (3,))
    with pytest.raises(ValueError, match="seed"):
        uniform(-1, "time", torch.arange(2))


def test_subseed_is_stable_and_varies():
    assert subseed(0, "step", 5) == subseed(0, "step", 5)
    assert len({subseed(0, "step", i) for i in range(100)}) == 100
