"""How sure a number is: intervals of proportions, paired comparisons, and means over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from onmanifold.foundation.errors import InputError

Verdict = Literal["holds", "does not hold", "within noise", "not measured"]


class Interval(NamedTuple):
    """The two ends of a confidence interval."""

    low: float
    high: float


class Estimate(NamedTuple):
    """A mean over independent runs.

    Attributes:
        mean: The mean.
        low: Lower end of its confidence interval.
        high: Upper end.
        deviation: Standard deviation between the runs; NaN for one run.
        runs: Number of runs.
    """

    mean: float
    low: float
    high: float
    deviation: float
    runs: int


class PairedComparison(NamedTuple):
    """Two classifiers, or one under two attacks, on the same samples.

    Attributes:
        difference: First proportion minus second.
        low: Lower end of the difference's confidence interval.
        high: Upper end.
        p_value: Of McNemar's exact test that both proportions are equal.
        first_only: Samples right only the first time.
        second_only: Samples right only the second time.
        samples: Number of samples.
    """

    difference: float
    low: float
    high: float
    p_value: float
    first_only: int
    second_only: int
    samples: int


def wilson_interval(successes: int, count: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927).

    Args:
        successes: At least 0, at most ``count``.
        count: Number of samples; with none nothing is known, and the interval is [0, 1].
        confidence: In (0, 1).

    Raises:
        InputError: A number out of its range.

    >>> "{:.4f} {:.4f}".format(*wilson_interval(81, 263))
    '0.2553 0.3662'
    """
    _check_confidence(confidence)
    if not 0 <= successes <= count:
        raise InputError(f"successes: expected 0 to count = {count}, found {successes}.")
    if count == 0:
        return Interval(0.0, 1.0)
    from scipy.stats import binomtest

    interval = binomtest(int(successes), int(count)).proportion_ci(confidence, method="wilson")
    return Interval(float(interval.low), float(interval.high))


def compare_paired(
    first: npt.ArrayLike, second: npt.ArrayLike, confidence: float = 0.95
) -> PairedComparison:
    """Compare two yes-or-no outcomes of the same samples.

    The interval is Newcombe's from the two Wilson intervals and their correlation (Newcombe 1998, Statistics
    in Medicine 17:2635, method 10), the p-value that of McNemar's exact test: the binomial one on the samples
    whose outcomes differ.

    Args:
        first: (N,) bool, for instance which samples the first classifier gets right.
        second: (N,) bool, the same samples in the same order.
        confidence: In (0, 1).

    Raises:
        InputError: Lengths that differ, no samples, or values that are not bool.
    """
    one, two = np.asarray(first), np.asarray(second)
    if (
        one.dtype != bool
        or two.dtype != bool
        or one.ndim != 1
        or one.shape != two.shape
        or not len(one)
    ):
        raise InputError(
            "first, second: expected two bool arrays (N,) of the same samples, found "
            f"{one.dtype} {one.shape} and {two.dtype} {two.shape}."
        )
    from scipy.stats import binomtest

    both, neither = int((one & two).sum()), int((~one & ~two).sum())
    first_only, second_only = int((one & ~two).sum()), int((~one & two).sum())
    differing = first_only + second_only
    low, high = _newcombe(both, first_only, second_only, neither, confidence)
    return PairedComparison(
        difference=(first_only - second_only) / len(one),
        low=low,
        high=high,
        p_value=float(binomtest(first_only, differing).pvalue) if differing else 1.0,
        first_only=first_only,
        second_only=second_only,
        samples=len(one),
    )


def _newcombe(
    both: int, first_only: int, second_only: int, neither: int, confidence: float
) -> Interval:
    count = both + first_only + second_only + neither
    first, second = both + first_only, both + second_only
    p1, p2 = first / count, second / count
    low1, high1 = wilson_interval(first, count, confidence)
    low2, high2 = wilson_interval(second, count, confidence)
    covariance: float = both * neither - first_only * second_only
    if covariance > 0:  # the paper's continuity correction
        covariance = max(covariance - count / 2, 0.0)
    scale = math.sqrt(first * (count - first) * second * (count - second))
    correlation = covariance / scale if scale else 0.0

    def root(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * correlation * a * b + b * b, 0.0))

    difference = p1 - p2
    return Interval(
        difference - root(p1 - low1, high2 - p2), difference + root(high1 - p1, p2 - low2)
    )


def mean_interval(
    values: Sequence[float] | npt.NDArray[np.floating], confidence: float = 0.95
) -> Estimate:
    """Mean over seeds with Student's t interval.

    One value tells nothing about the spread between seeds: its interval is unbounded.

    Args:
        values: One number per seed; for a comparison, the differences seed by seed.
        confidence: In (0, 1).

    Raises:
        InputError: No values.

    >>> mean_interval([1.0, 2.0, 3.0]).mean
    2.0
    """
    _check_confidence(confidence)
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not len(numbers):
        raise InputError(f"values: expected at least one number, found shape {numbers.shape}.")
    mean = float(numbers.mean())
    if len(numbers) == 1:
        return Estimate(mean, -math.inf, math.inf, math.nan, 1)
    from scipy.special import stdtrit

    deviation = float(numbers.std(ddof=1))
    half = (
        float(stdtrit(len(numbers) - 1, (1 + confidence) / 2)) * deviation / math.sqrt(len(numbers))
    )
    return Estimate(mean, mean - half, mean + half, deviation, len(numbers))


def verdict(low: float, high: float) -> Verdict:
    """What the interval of a difference says about the claim that the difference is positive.

    >>> verdict(0.01, 0.05), verdict(-0.05, -0.01), verdict(-0.01, 0.05), verdict(math.nan, 0.05)
    ('holds', 'does not hold', 'within noise', 'not measured')
    """
    if math.isnan(low) or math.isnan(high):
        return "not measured"
    if low > 0:
        return "holds"
    return "does not hold" if high < 0 else "within noise"


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise InputError(f"confidence: expected a number in (0, 1), found {confidence}.")
