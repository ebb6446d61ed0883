"""Robust overfitting: a fall that is there is found, and none is found where there is only luck."""

import numpy as np
import pytest

from onmanifold.analysis import robust_overfitting
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


def test_each_half_is_judged_on_the_choice_of_the_other():
    correct = np.zeros((3, 8), dtype=bool)
    correct[0, ::2] = True  # best on even positions, so judged on the odd ones, where it is wrong
    correct[1, 1::2] = True
    correct[2] = [True, False] * 2 + [False] * 4
    drop = robust_overfitting(correct).drop
    assert drop.first_only == 0
    assert drop.difference == pytest.approx(-0.25)


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
