"""Attacks on single levels move those levels alone; the frequency of a change is that of its waves."""

import math

import pytest
import torch

from onmanifold.analysis import attack_levels, mean_frequency
from onmanifold.attacks import PGD
from onmanifold.classifiers import build_classifier
from onmanifold.foundation.errors import InputError
from onmanifold.manifolds.factory import build_manifold
from onmanifold.threats import LatentBall

SHAPE = (1, 8, 8)
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = 0.2 + 0.6 * torch.rand(6, *SHAPE, generator=GENERATOR)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.fixture(scope="module")
def glow():
    return build_manifold("glow", 3, SHAPE, seed=0, levels=2, steps=1, width=4).double()


@pytest.fixture(scope="module")
def classifier():
    spec = {"type": "conv_net", "channels": [4]}
    return build_classifier(spec, num_classes=3, image_shape=SHAPE, seed=0).double().eval()


def test_only_the_chosen_level_moves(glow, classifier):
    images = IMAGES.double()
    before = glow.encode(images, LABELS)
    found = list(attack_levels(classifier, glow, images, LABELS, (0.02, 0.1), steps=3))
    assert [result.levels for result in found] == [(1,), (1,), (2,), (2,), None, None]
    assert [result.radius for result in found] == [0.02, 0.1] * 3
    for result in found:
        moved = (glow.encode(result.images, LABELS) - before).abs()
        for level, columns in glow.levels.items():
            reach = moved[:, columns].amax()
            if result.levels is None or level in result.levels:
                assert 0 < reach <= result.radius + 1e-6
            else:
                assert reach <= 1e-6
        # What is said of the images is true of the images.
        change = (result.images - images).flatten(1)
        torch.testing.assert_close(result.linf, change.abs().amax(1))
        torch.testing.assert_close(result.l2, change.norm(dim=1))
        assert torch.equal(result.success, classifier(result.images).argmax(1) != LABELS)


def test_the_attack_is_pgd_whatever_the_batches(glow, classifier):
    images, indices = IMAGES.double(), torch.arange(6) + 40
    attack = PGD(LatentBall(glow, radius=0.1, levels=(2,)), steps=4, early_stop=False)
    expected = attack(classifier, images, LABELS, seed=3, indices=indices)
    settings = {"levels": [(2,)], "steps": 4, "seed": 3, "indices": indices, "batch_size": 4}
    (found,) = attack_levels(classifier, glow, images, LABELS, (0.1,), **settings)
    torch.testing.assert_close(found.images, expected.images, rtol=0, atol=1e-9)
    assert torch.equal(found.success, expected.success)


def test_wrong_arguments(glow, classifier):
    images = IMAGES.double()
    with pytest.raises(InputError, match="radii, images"):
        list(attack_levels(classifier, glow, images, LABELS, ()))
    with pytest.raises(InputError, match="levels"):
        list(attack_levels(classifier, glow, images, LABELS, levels=[(7,)]))


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (1, 0), (3, 4), (8, 8)])
def test_a_wave_has_its_own_frequency(rows, columns):
    height, width = 16, 16
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    wave = torch.cos(2 * math.pi * (rows * y / height + columns * x / width))
    expected = math.hypot(rows / height, columns / width)
    assert mean_frequency(wave.expand(2, 3, -1, -1)).tolist() == pytest.approx([expected] * 2)


def test_frequencies_of_sums_and_of_nothing():
    noise = torch.randn(200, 1, 16, 16, generator=GENERATOR)
    assert mean_frequency(noise).mean() == pytest.approx(0.38, abs=0.005)
    assert mean_frequency(torch.zeros(1, 1, 4, 4)).isnan().all()
    # The mean is by power, over channels.
    chess = (-1.0) ** torch.arange(4)[:, None] * (-1.0) ** torch.arange(4)
    both = torch.stack([3 * torch.ones(4, 4), chess])[None]
    assert mean_frequency(both).item() == pytest.approx(math.sqrt(0.5) / 10)
