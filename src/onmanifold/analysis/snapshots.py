"""Robust overfitting: how far accuracy falls from the best snapshot of a training to the last."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from onmanifold.evaluation.statistics import PairedComparison, compare_paired
from onmanifold.foundation.errors import InputError


class Overfitting(NamedTuple):
    """How far accuracy falls from the best snapshot to the last.

    Attributes:
        best: Position of the snapshot that is best on all samples; of equals the later.
        drop: Accuracy of the best snapshot, chosen on other samples, minus that of the last, sample by sample.
    """

    best: int
    drop: PairedComparison


def robust_overfitting(correct: NDArray[np.bool_], confidence: float = 0.95) -> Overfitting:
    """The fall of accuracy from the best snapshot to the last, without the luck of the choice.

    The best of several snapshots on some samples is better there than anywhere else: its lead over the last one
    is above zero even where all are equally good. So each half of the samples (even and odd positions) is judged
    on the snapshot that is best on the other half.

    Args:
        correct: (E, N) bool: whether each snapshot is right on each sample, in the order of training.
        confidence: Of the interval.

    Raises:
        InputError: Fewer than two samples, no snapshot, or another shape or dtype.
    """
    if correct.ndim != 2 or correct.dtype != bool or not len(correct) or correct.shape[1] < 2:
        raise InputError(
            "correct: expected bool (E, N) with at least one snapshot and two samples, found "
            f"{correct.dtype} {correct.shape}."
        )
    even = np.arange(correct.shape[1]) % 2 == 0
    chosen = np.where(even, correct[_best(correct[:, ~even])], correct[_best(correct[:, even])])
    return Overfitting(_best(correct), compare_paired(chosen, correct[-1], confidence))


def _best(correct: NDArray[np.bool_]) -> int:
    counts = correct.sum(axis=1)
    return int(np.flatnonzero(counts == counts.max())[-1])
