"""Points of the plane as datasets: where they lie, and that they depend on their number alone."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onmanifold.data import load_dataset
from onmanifold.data.points import SIDE, moon
from onmanifold.foundation.errors import ConfigError

NAMES = ("two_moons", "blobs")


def places(dataset):
    """Around the middle of the data, in radii."""
    return SIDE * (dataset.batch(torch.arange(len(dataset))).images.flatten(1).double() - 0.5)


@pytest.mark.parametrize("name", NAMES)
def test_images_of_two_pixels(name):
    dataset = load_dataset(name, "train", size=101)
    assert dataset.image_shape == (1, 1, 2)
    assert dataset.labels.bincount().tolist() == [51, 50]
    assert 0 <= float(dataset.images.min()) <= float(dataset.images.max()) <= 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [0, 3])
def test_a_point_depends_on_seed_split_and_number(name, seed):
    few, many = (load_dataset(name, "train", size=size, seed=seed) for size in (20, 50))
    assert torch.equal(few.images, many.images[:20])
    others = [
        load_dataset(name, "test", size=20, seed=seed),
        load_dataset(name, "train", size=20, seed=seed + 1),
    ]
    for other in others:
        assert not torch.equal(few.images, other.images)
        assert few.fingerprint != other.fingerprint
    assert few.fingerprint == load_dataset(name, "train", size=20, seed=seed).fingerprint


def test_without_noise_moons_are_half_circles():
    dataset = load_dataset("two_moons", size=300, noise=0.0)
    found = places(dataset) + torch.tensor([0.5, 0.25])
    upper, lower = found[dataset.labels == 0], found[dataset.labels == 1]
    assert upper.norm(dim=1).tolist() == pytest.approx([1.0] * 150, abs=1e-5)
    assert (lower - torch.tensor([1.0, 0.5])).norm(dim=1).tolist() == pytest.approx(
        [1.0] * 150, abs=1e-5
    )
    assert float(upper[:, 1].min()) >= -1e-5
    assert float(lower[:, 1].max()) <= 0.5 + 1e-5


@given(angle=st.floats(0, math.pi))
def test_the_moons_are_one_another_turned_by_half_a_turn(angle):
    pair = moon(torch.full((2,), angle, dtype=torch.float64), torch.tensor([0, 1]))
    middle = torch.tensor([0.5, 0.25], dtype=torch.float64)
    torch.testing.assert_close(pair[1] - middle, -(pair[0] - middle))


def test_noise_has_the_deviation_asked_for():
    clean, noisy = (load_dataset("two_moons", size=4000, noise=noise) for noise in (0.0, 0.1))
    difference = places(noisy) - places(clean)
    assert difference.std(0).tolist() == pytest.approx([0.1, 0.1], rel=0.05)
    # Independent of each other and of the place along the moon.
    both = torch.cat([difference, places(clean)], dim=1)
    correlations = torch.corrcoef(both[noisy.labels == 0].T)[:2]
    assert float(correlations.fill_diagonal_(0).abs().max()) < 0.08


def test_blobs_have_their_means_in_turn():
    dataset = load_dataset("blobs", size=4000, classes=2, components=2, deviation=0.1)
    found = places(dataset)
    means = [found[torch.arange(4000) % 4 == part].mean(0).tolist() for part in range(4)]
    wanted = [[1, 0], [0, 1], [-1, 0], [0, -1]]
    for mean, place in zip(means, wanted, strict=True):
        assert mean == pytest.approx(place, abs=0.02)
    assert dataset.labels[:4].tolist() == [0, 1, 0, 1]
    one = found[torch.arange(4000) % 4 == 1]
    assert one.std(0).tolist() == pytest.approx([0.1, 0.1], rel=0.08)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("two_moons", {"size": 0}),
        ("two_moons", {"noise": -0.1}),
        ("blobs", {"classes": 0}),
        ("blobs", {"components": 0}),
        ("blobs", {"deviation": float("inf")}),
    ],
)
def test_wrong_numbers(name, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        load_dataset(name, **options)
