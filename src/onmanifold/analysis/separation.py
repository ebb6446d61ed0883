"""How well a number tells two groups apart: the area under the curve, with an interval that knows of pairs."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from onmanifold.foundation.errors import InputError

Numbers = npt.NDArray[np.float64]


class Separation(NamedTuple):
    """How well a number tells cases from controls.

    Attributes:
        area: Share of pairs of a case and a control in which the case has the larger number, ties by half; the
            area under the receiver operating characteristic curve. 0.5: not at all.
        low: Lower end of its confidence interval.
        high: Upper end.
        cases: Their number.
        controls: Their number.
    """

    area: float
    low: float
    high: float
    cases: int
    controls: int


def separation(
    cases: npt.ArrayLike,
    controls: npt.ArrayLike,
    case_samples: npt.ArrayLike | None = None,
    control_samples: npt.ArrayLike | None = None,
    confidence: float = 0.95,
) -> Separation:
    """The area under the curve of cases against controls.

    The variance is DeLong's (1988), in the form of Obuchowski (1997, Biometrics 53:567) for numbers that come in
    clusters: here a clean image and what an attack made of it. The interval is taken on the scale of the logit, so
    that it stays in [0, 1]. Where the groups are wholly apart the variance is 0 and says nothing; then of as many
    separate pairs as there are all are in order, and their share has Wilson's interval, which is what is given.

    Args:
        cases: (M,) numbers, expected to be the larger ones.
        controls: (N,) numbers.
        case_samples: (M,) which image each comes from; None: all are independent.
        control_samples: (N,) likewise.
        confidence: In (0, 1).

    Returns:
        NaN and [0, 1] where a group is empty.

    Raises:
        InputError: NaN, other lengths, or a confidence outside (0, 1).

    >>> separation([3.0, 4.0, 2.0], [1.0, 2.0]).area
    0.9166666666666666
    """
    first, second = (np.asarray(values, dtype=np.float64) for values in (cases, controls))
    if first.ndim != 1 or second.ndim != 1 or np.isnan(first).any() or np.isnan(second).any():
        raise InputError("cases, controls: expected numbers (M,) and (N,) without NaN.")
    if not 0 < confidence < 1:
        raise InputError(f"confidence: expected a number in (0, 1), found {confidence}.")
    count, others = len(first), len(second)
    if not count or not others:
        return Separation(math.nan, 0.0, 1.0, count, others)
    samples = _samples(case_samples, control_samples, count, others)
    above = (first[:, None] > second) + 0.5 * (first[:, None] == second)
    area = float(above.mean())
    variance = _variance(above, area, *samples)
    from scipy.special import expit, logit, ndtri

    score = float(ndtri((1 + confidence) / 2))
    if area in (0.0, 1.0) or variance <= 0:
        low, high = _wilson(area, min(count, others), score)
    else:
        half = score * math.sqrt(variance) / (area * (1 - area))
        low, high = (float(expit(logit(area) + sign * half)) for sign in (-1, 1))
    return Separation(area, low, high, count, others)


def _samples(
    first: npt.ArrayLike | None, second: npt.ArrayLike | None, count: int, others: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int]:
    """The cluster of each case and each control, and their number."""
    if (first is None) != (second is None):
        raise InputError("case_samples, control_samples: expected both, or neither.")
    if first is None or second is None:
        return np.arange(count), np.arange(others) + count, count + others
    named = np.concatenate([np.asarray(first), np.asarray(second)])
    if named.shape != (count + others,):
        raise InputError("case_samples, control_samples: expected one for each number.")
    found, numbers = np.unique(named, return_inverse=True)
    return numbers[:count], numbers[count:], len(found)


def _variance(
    above: Numbers,
    area: float,
    case_clusters: npt.NDArray[np.int64],
    control_clusters: npt.NDArray[np.int64],
    clusters: int,
) -> float:
    """Obuchowski's: the components of DeLong's, summed over each cluster."""
    count, others = above.shape
    by_case = np.bincount(case_clusters, above.mean(1) - area, clusters)
    by_control = np.bincount(control_clusters, above.mean(0) - area, clusters)
    with_cases = len(np.unique(case_clusters))
    with_controls = len(np.unique(control_clusters))
    if min(with_cases, with_controls) < 2:
        return 0.0
    total = (by_case @ by_case) * with_cases / (with_cases - 1) / count**2
    total += (by_control @ by_control) * with_controls / (with_controls - 1) / others**2
    total += 2 * (by_case @ by_control) * clusters / (clusters - 1) / (count * others)
    return float(total)


def _wilson(share: float, count: int, score: float) -> tuple[float, float]:
    spread = score**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = score * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)
