"""Robust overfitting: a fall that is there is found, and none is found where there is only luck."""

import numpy as np
import pytest

from onmanifold.evaluation import robust_overfitting
from onmanifold.evaluation.statistics import compare_paired
from onmanifold.foundation.errors import InputError


def test_a_fall_that_is_there():
    correct = np.zeros((3, 100), dtype=bool)
    correct[0, :50], correct[1, :80], correct[2, :60] = True, True, True
    found = robust_overfitting(correct)
    assert found.best == 1
    assert found.drop == compare_paired(correct[1], correct[2])
    assert found.drop.difference == pytest.approx(0.2)
    assert found.drop.low > 0


def test_no_sample_has_a_say_in_the_choice_it_is_judged_on():
    # One sample alone decides between two snapshots: it is judged on the other one.
    correct = np.zeros((2, 10), dtype=bool)
    correct[0, :5], correct[1, 5:] = True, True
    correct[0, 9] = True
    found = robust_overfitting(correct)
    assert found.best == 0
    # Without a sample that only the first has right the second is not worse; of equals the later is best.
    assert found.drop.first_only == 0
    assert found.drop.second_only == 4


def test_the_order_of_the_samples_tells_nothing():
    """Classes in turns, as in FONTS, whose snapshots differ: the choice is made on all of them."""
    correct = np.zeros((2, 1000), dtype=bool)
    correct[0, ::2], correct[1, 1::2] = True, True
    correct[0, 1:400:2] = True
    found = robust_overfitting(correct)
    assert found.best == 0
    assert found.drop == compare_paired(correct[0], correct[1])


def test_luck_is_no_overfitting():
    generator = np.random.default_rng(0)
    drops, naive = [], []
    for _ in range(200):
        correct = generator.random((10, 200)) < 0.5
        drops.append(robust_overfitting(correct).drop.difference)
        naive.append(correct.mean(axis=1).max() - correct[-1].mean())
    # Standard error of the mean of 200 differences of two proportions of 200 samples: about 0.0035.
    assert abs(np.mean(drops)) < 0.0125
    assert np.mean(naive) > 0.04


def test_a_training_that_only_gets_better_does_not_fall():
    correct = np.tri(5, 20, dtype=bool)
    found = robust_overfitting(correct)
    assert found.best == 4
    assert found.drop.difference == 0


@pytest.mark.parametrize(
    "correct",
    [np.zeros((2, 1), bool), np.zeros((0, 5), bool), np.zeros(5, bool), np.zeros((2, 5))],
)
def test_wrong_arguments(correct):
    with pytest.raises(InputError, match="correct: expected bool"):
        robust_overfitting(correct)
