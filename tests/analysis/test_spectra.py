"""Spectra of classes: against NumPy, invariants, known answers, and the bias that the module warns of."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onmanifold.analysis.spectra import class_directions, class_spectra, compare_variances
from onmanifold.foundation.errors import InputError

SHAPE = (1, 2, 3)
SIZE = 6


def draw(count, seed=0, scales=(0.2, 0.1, 0.05, 0.02, 0.01, 0.005), classes=2):
    """Gaussian images around 1/2, with their labels; each class has its own axes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    rows = torch.randn(count, SIZE, generator=generator).double() * torch.tensor(scales).double()
    axes = torch.stack([rotation(label) for label in range(classes)])
    rows = (rows.unsqueeze(1) @ axes[labels]).squeeze(1)
    return (0.5 + rows).clamp(0, 1).view(-1, *SHAPE), labels


def rotation(seed):
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator).double())[0]


def test_eigenvalues_are_those_of_numpy_covariances():
    images, labels = draw(41)
    found = class_spectra(images.float(), labels)
    assert found.labels.tolist() == [0, 1]
    assert found.counts.tolist() == [21, 20]
    for number in range(2):
        rows = images.float().double()[labels == number].flatten(1).numpy()
        wanted = np.linalg.eigvalsh(np.cov(rows, rowvar=False))[::-1]
        np.testing.assert_allclose(found.eigenvalues[number], wanted, rtol=1e-9)


def test_of_few_images_the_other_eigenvalues_are_nothing():
    images, labels = draw(8)
    eigenvalues = class_spectra(images, labels).eigenvalues
    assert bool((eigenvalues[:, :3] > 0).all())
    assert bool((eigenvalues[:, 3:] == 0).all())


def test_labels_need_not_be_consecutive():
    images, labels = draw(20)
    found = class_spectra(images, labels * 5 + 2)
    assert found.labels.tolist() == [2, 7]
    torch.testing.assert_close(found.eigenvalues, class_spectra(images, labels).eigenvalues)


def test_directions_diagonalise_the_covariance():
    images, labels = draw(60)
    directions = class_directions(images, labels)
    eigenvalues = class_spectra(images, labels).eigenvalues
    for number in range(2):
        covariance = torch.cov(images[labels == number].flatten(1).T)
        turned = directions[number] @ covariance @ directions[number].T
        torch.testing.assert_close(turned, eigenvalues[number].diag(), rtol=0, atol=1e-12)


@settings(max_examples=25)
@given(factor=st.floats(0.2, 1.0), leading=st.integers(1, SIZE - 1), seed=st.integers(0, 50))
def test_a_shrunk_class_has_the_ratio_of_the_square(factor, leading, seed):
    images, labels = draw(24, seed)
    shrunk = 0.5 + factor * (images - 0.5)
    for directions in (None, class_directions(*draw(40, seed + 1))):
        found = compare_variances(
            images, shrunk, labels, directions, leading=leading, draws=20, seed=seed
        )
        for part in ("leading", "rest", "all"):
            # In every bootstrap sample too: pairs are drawn together.
            wanted = torch.full((3, 3), factor**2, dtype=torch.float64)
            torch.testing.assert_close(found.ratios[part], wanted, rtol=1e-8, atol=0)
        added = found.added["leading"] + found.added["rest"]
        torch.testing.assert_close(added[:, 0], torch.full((3,), factor**2 - 1).double())


def test_along_their_own_directions_variances_are_eigenvalues():
    images, labels = draw(50)
    attacked = (images + 0.02 * torch.randn(images.shape).double()).clamp(0, 1)
    found = compare_variances(images, attacked, labels, leading=2, draws=0)
    torch.testing.assert_close(found.clean, class_spectra(images, labels).eigenvalues)
    torch.testing.assert_close(found.attacked, class_spectra(attacked, labels).eigenvalues)
    assert bool(found.ratios["all"][:, 1:].isnan().all())
    total = found.attacked.sum(1) / found.clean.sum(1)
    torch.testing.assert_close(found.ratios["all"][:2, 0], total)


def test_noise_in_one_direction_is_found_there_and_nowhere_else():
    images, labels = draw(4000)
    directions = torch.stack([rotation(0), rotation(1)])
    noise = 0.1 * torch.randn(4000, 1, generator=torch.Generator().manual_seed(5)).double()
    attacked = images + (noise * directions[labels, 4]).view_as(images)
    clean, attacked = images, attacked.clamp(0, 1)
    found = compare_variances(clean, attacked, labels, directions, leading=2, draws=200)
    assert found.attacked[:, 4].tolist() == pytest.approx([0.01 + 0.01**2] * 2, rel=0.1)
    others = [0, 1, 2, 3, 5]
    torch.testing.assert_close(found.attacked[:, others], found.clean[:, others], rtol=0.1, atol=0)
    _, low, high = found.ratios["rest"][-1].tolist()
    assert low > 1
    assert low < (0.01 + 0.05**2 + 0.02**2) / (0.05**2 + 0.02**2) < high + 0.3
    assert float(found.added["difference"][-1, 1]) > 0


def test_directions_of_other_images_avoid_the_bias():
    """Of 12 images in 6 dimensions: eigenvalues spread too far, variances along given directions do not."""
    truth = torch.full((SIZE,), 0.05**2).double()
    own, given_ = [], []
    for seed in range(200):
        images, labels = draw(12, seed, scales=(0.05,) * SIZE, classes=1)
        own.append(class_spectra(images, labels).eigenvalues[0])
        found = compare_variances(
            images, images, labels, rotation(7).unsqueeze(0), leading=1, draws=0
        )
        given_.append(found.clean[0])
    mean = torch.stack(given_).mean(0)
    torch.testing.assert_close(mean, truth, rtol=0.12, atol=0)
    biased = torch.stack(own).mean(0)
    assert float(biased[0]) > 1.8 * float(truth[0])
    assert float(biased[-1]) < 0.4 * float(truth[0])
    # The trace is not biased.
    assert float(biased.sum()) == pytest.approx(float(truth.sum()), rel=0.05)


def test_intervals_cover_the_true_ratio():
    """Independent noise adds a known variance; the 90 % interval holds it about nine times out of ten."""
    covered = 0
    directions = rotation(0).unsqueeze(0)
    for seed in range(120):
        images, labels = draw(80, seed, scales=(0.1,) * SIZE, classes=1)
        generator = torch.Generator().manual_seed(1000 + seed)
        noise = 0.05 * torch.randn(images.shape, generator=generator).double()
        attacked = (images + noise).clamp(0, 1)
        found = compare_variances(
            images, attacked, labels, directions, leading=3, draws=200, confidence=0.9, seed=seed
        )
        _, low, high = found.ratios["rest"][-1].tolist()
        covered += low <= 1.25 <= high
    assert 96 <= covered <= 117


def test_the_bootstrap_is_the_same_for_the_same_seed():
    images, labels = draw(30)
    attacked = images.sqrt()
    one, two, three = (
        compare_variances(images, attacked, labels, leading=2, draws=50, seed=seed).ratios["rest"]
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, two)
    assert torch.equal(one[:, 0], three[:, 0])
    assert not torch.equal(one[:, 1], three[:, 1])


def test_groups_cover_all_directions_once():
    images, labels = draw(40)
    found = compare_variances(images, images.sqrt(), labels, leading=2, draws=0)
    assert found.groups.tolist() == list(range(SIZE + 1))
    pooled = found.attacked.sum(0) / found.clean.sum(0)
    torch.testing.assert_close(found.grouped[:, 0], pooled)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"leading": 6}, r"leading: expected a number of directions in \[1, 6\), found 6"),
        ({"draws": -1}, "draws: expected at least 0"),
        ({"confidence": 1.0}, "confidence"),
        ({"directions": torch.eye(6)}, r"directions: expected shape \(2, 6, 6\)"),
        ({"attacked": torch.rand(10, 1, 3, 3)}, "attacked: expected shape"),
        ({"labels": torch.arange(20)}, "two images of each class"),
    ],
)
def test_wrong_arguments(change, message):
    images, labels = draw(20)
    arguments = {"clean": images, "attacked": images, "labels": labels, "leading": 2} | change
    with pytest.raises(InputError, match=message):
        compare_variances(**arguments)
