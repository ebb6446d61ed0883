"""The toy problem of Tsipras et al.: closed forms against Monte Carlo and exhaustive search."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from onmanifold.analysis.theory.tsipras import (
    ToyDistribution,
    accuracies,
    robust_bound,
    sampled_accuracies,
    shifted_against_label,
)
from onmanifold.foundation.errors import InputError

TOY = ToyDistribution()
WIDE = ToyDistribution(probability=0.95, eta=0.3, others=20)


def test_log_odds_are_those_of_the_densities():
    drawn = ToyDistribution(0.8, 0.7, others=3).sample(50)
    toy = ToyDistribution(0.8, 0.7, others=3)
    densities = {
        label: np.where(drawn.features[:, 0] == label, 0.8, 0.2)
        * norm.pdf(drawn.features[:, 1:], loc=label * 0.7).prod(axis=1)
        for label in (-1.0, 1.0)
    }
    wanted = np.log(densities[1.0] / densities[-1.0])
    assert toy.log_odds(drawn.features) == pytest.approx(wanted)


def test_the_example_of_equation_27():
    """x = (-1, 3) of label 1: valid; after the move by 6, (-1, -3): the label is not the most probable."""
    before, after, label = np.array([[-1.0, 3.0]]), np.array([[-1.0, -3.0]]), np.ones(1)
    assert TOY.is_valid(before, label).all()
    assert not TOY.is_valid(after, label).any()
    printed = 0.1 * norm.pdf(-3, loc=3), 0.9 * norm.pdf(-3, loc=-3)
    assert TOY.log_odds(after)[0] == pytest.approx(np.log(printed[0] / printed[1]))


def test_samples_have_the_distribution():
    drawn = WIDE.sample(40_000)
    agree = (drawn.features[:, 0] == drawn.labels).mean()
    assert abs(agree - 0.95) <= 3 * np.sqrt(0.95 * 0.05 / 40_000)
    assert abs(drawn.labels.mean()) <= 3 / np.sqrt(40_000)
    turned = drawn.features[:, 1:] * drawn.labels[:, None]
    assert (np.abs(turned.mean(axis=0) - 0.3) <= 4 / np.sqrt(40_000)).all()
    assert np.array_equal(WIDE.sample(9).features, drawn.features[:9])


@pytest.mark.parametrize("toy", [TOY, WIDE, ToyDistribution(0.9, 1.0, 4, radius=0.3)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0, 1.7, 8.0])
def test_accuracies_against_monte_carlo(toy, share):
    weight = share * toy.bayes_weight
    closed = accuracies(toy, weight)
    sampled = sampled_accuracies(toy, weight, toy.sample(20_000, seed=2))
    for wanted, found in zip(closed[:3], sampled[:3], strict=True):
        assert abs(found.value - wanted) <= 3 * found.standard_error + 1e-9
    # Of hardly any fooled samples there is no share.
    if closed.standard - closed.robust > 0.01:
        error = max(sampled.invalid_share.standard_error, 1e-3)
        assert abs(sampled.invalid_share.value - closed.invalid_share) <= 3 * error


@given(
    st.floats(0.55, 0.95),
    st.floats(0.2, 2.0),
    st.integers(1, 6),
    st.floats(0.0, 3.0),
    st.floats(0.0, 5.0),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_random_toys_against_monte_carlo(probability, eta, others, radius, weight):
    toy = ToyDistribution(probability, eta, others, radius)
    closed = accuracies(toy, weight)
    sampled = sampled_accuracies(toy, weight, toy.sample(4000))
    for name in ("standard", "robust", "valid"):
        wanted = getattr(closed, name)
        # The error of the true share: that of the sample is 0 where nothing was seen.
        error = np.sqrt(wanted * (1 - wanted) / 4000) + 1 / 4000
        assert abs(getattr(sampled, name).value - wanted) <= 5 * error
    assert closed.robust <= closed.valid + 1e-12 <= closed.standard + 2e-12


def test_robust_accuracies_are_those_of_a_search_over_all_moves():
    """Each other feature moves by itself; a grid finds what the interval of their sum says."""
    toy, weight = ToyDistribution(0.8, 0.8, others=2, radius=0.9), 1.1
    drawn = toy.sample(300)
    correct = drawn.labels * (weight * drawn.features[:, 0] + drawn.features[:, 1:].sum(1)) > 0
    robust, valid = correct.copy(), correct.copy()
    for move in itertools.product(np.linspace(-0.9, 0.9, 61), repeat=2):
        moved = drawn.features.copy()
        moved[:, 1:] += move
        wrong = drawn.labels * (weight * moved[:, 0] + moved[:, 1:].sum(1)) <= 0
        robust &= ~wrong
        valid &= ~(wrong & toy.is_valid(moved, drawn.labels))
    found = sampled_accuracies(toy, weight, drawn)
    assert toy.bayes_weight < weight
    # A grid step of 0.03 in each may miss an error by a hair.
    assert robust.mean() == pytest.approx(found.robust.value, abs=0.02)
    assert valid.mean() == pytest.approx(found.valid.value, abs=0.02)
    assert robust.mean() < valid.mean() - 0.05


def test_the_bayes_classifier_has_no_valid_adversarial_examples():
    for toy in (TOY, WIDE):
        bayes = accuracies(toy, toy.bayes_weight)
        assert bayes.valid == bayes.standard
        assert bayes.invalid_share == pytest.approx(1.0)
        for weight in np.geomspace(0.1, 10, 21) * toy.bayes_weight:
            other = accuracies(toy, float(weight))
            assert other.standard <= bayes.standard + 1e-12
            assert other.valid <= bayes.valid + 1e-12
        # Of all classifiers of the family it alone: its neighbours lose those with the wrong first feature.
        near = accuracies(toy, 1.001 * toy.bayes_weight)
        assert near.valid < bayes.valid - 0.01


def test_the_bound_of_tsipras_holds_and_is_reached():
    for toy in (TOY, WIDE):
        for weight in np.geomspace(0.01, 100, 60):
            found = accuracies(toy, float(weight))
            assert found.robust <= robust_bound(toy, found.standard) + 1e-12
    first = accuracies(TOY, 100.0)
    assert first.standard == first.robust == pytest.approx(0.9)
    assert robust_bound(TOY, 0.9) == pytest.approx(0.9)
    assert accuracies(TOY, TOY.bayes_weight).robust < 0.01


def test_the_whole_shift_turns_the_means():
    drawn = TOY.sample(5)
    shifted = shifted_against_label(TOY, drawn)
    assert shifted[:, 1] == pytest.approx(drawn.features[:, 1] - 6 * drawn.labels)
    assert (shifted[:, 0] == drawn.features[:, 0]).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"probability": 0.4}, "probability"),
        ({"probability": 1.0}, "probability"),
        ({"eta": 0.0}, "eta"),
        ({"others": 0}, "others"),
        ({"radius": -1.0}, "radius"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(InputError, match=message):
        ToyDistribution(**settings)
