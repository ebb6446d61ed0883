import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from onmanifold.foundation import randomness

MASK = (1 << 64) - 1


def mixed(bits: int) -> int:
    """The finaliser of SplitMix64, in unbounded integers."""
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & MASK
    return bits ^ (bits >> 31)


def test_splitmix_against_integers_and_the_published_sequence():
    # First outputs of SplitMix64 from the state 1234567 (Vigna's splitmix64.c).
    golden, state = 0x9E3779B97F4A7C15, 1234567
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [mixed((state + k * golden) & MASK) for k in (1, 2, 3)] == published
    words = [0, 1, 2**63, 2**64 - 1, *published]
    signed = torch.tensor([word - (1 << 64) if word >> 63 else word for word in words])
    ours = [int(value) & MASK for value in randomness._mix(signed)]
    assert ours == [mixed(word) for word in words]


@pytest.mark.parametrize("draw", [randomness.uniform, randomness.normal])
@given(
    seed=st.integers(-(2**70), 2**70),
    indices=st.lists(st.integers(0, 2**62), min_size=1, max_size=6),
    stream=st.text(max_size=8),
)
@settings(max_examples=25, deadline=None)
def test_a_number_depends_on_seed_stream_and_index_alone(draw, seed, indices, stream):
    rows = draw(seed, torch.tensor(indices), (2, 3), stream=stream)
    assert rows.shape == (len(indices), 2, 3)
    for row, index in zip(rows, indices, strict=True):
        assert torch.equal(row, draw(seed, torch.tensor([index]), (2, 3), stream=stream)[0])


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"stream": "b"},
        {"indices": torch.arange(1000, 2000)},
    ],
)
@pytest.mark.parametrize("draw", [randomness.uniform, randomness.normal])
def test_other_seed_stream_or_index_is_other_and_uncorrelated(draw, other):
    arguments = {"seed": 0, "indices": torch.arange(1000), "stream": "a"}
    one = draw(**arguments, shape=(20,)).flatten()
    two = draw(**(arguments | other), shape=(20,)).flatten()
    assert (one == two).float().mean() < 0.001
    assert torch.corrcoef(torch.stack([one, two]))[0, 1].abs() < 0.03


def test_neighbouring_indices_and_positions_are_uncorrelated():
    table = randomness.uniform(3, torch.arange(20_000), (2,), dtype=torch.float64)
    for one, two in ((table[:-1, 0], table[1:, 0]), (table[:, 0], table[:, 1])):
        assert torch.corrcoef(torch.stack([one, two]))[0, 1].abs() < 0.03


def test_uniform_is_uniform_in_0_1():
    draw = randomness.uniform(0, torch.arange(100), (200,), dtype=torch.float64).flatten()
    assert 0 <= draw.min() < 0.001
    assert 0.999 < draw.max() < 1
    assert stats.kstest(draw.numpy(), "uniform").pvalue > 0.001


def test_uniform_never_rounds_to_1():
    # The largest number there is must be below 1 also in float32.
    assert torch.tensor((2**24 - 1) * 2.0**-24, dtype=torch.float32) < 1
    draw = randomness.uniform(0, torch.arange(4000), (1000,))
    assert draw.dtype == torch.float32
    assert draw.max() < 1
    assert torch.equal(draw * 2**24, (draw * 2**24).round())


def test_normal_is_standard_normal():
    draw = randomness.normal(0, torch.arange(100), (200,), dtype=torch.float64).flatten()
    assert draw.isfinite().all()
    assert stats.kstest(draw.numpy(), "norm").pvalue > 0.001


@pytest.mark.parametrize("draw", [randomness.uniform, randomness.normal])
def test_float32_and_float64_receive_the_same_numbers(draw):
    narrow = draw(5, torch.arange(50), (30,), dtype=torch.float32)
    wide = draw(5, torch.arange(50), (30,), dtype=torch.float64)
    assert torch.equal(narrow, wide.float())


def test_integers_cover_their_range_evenly():
    draw = randomness.integers(0, torch.arange(7000), 7)
    assert draw.dtype == torch.int64
    counts = torch.bincount(draw, minlength=7)
    assert len(counts) == 7
    assert stats.chisquare(counts.numpy()).pvalue > 0.001


def test_permutation_holds_every_item_once_and_depends_on_the_seed_and_stream():
    orders = [
        randomness.permutation(seed, 500, stream=stream) for seed in (0, 1) for stream in "ab"
    ]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(500))
    assert len({tuple(order.tolist()) for order in orders}) == 4
    assert torch.equal(orders[0], randomness.permutation(0, 500, stream="a"))


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = randomness.normal(0, torch.arange(3), (4,))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(first, randomness.normal(0, torch.arange(3), (4,)))
