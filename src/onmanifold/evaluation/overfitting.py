"""Robust overfitting: how far accuracy falls from the best snapshot of a training to the last."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from onmanifold.evaluation.statistics import PairedComparison, compare_paired
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.randomness import permutation

_PARTS = 10


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
    is above zero even where all are equally good. So the samples are dealt out at random to ten parts, the same in
    each call, and each part is judged on the snapshot that is best on the nine others.

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
    # At random: the order of a data set may tell of its classes.
    part = permutation(0, correct.shape[1], stream="snapshots").numpy() % _PARTS
    chosen = np.empty_like(correct[0])
    for number in np.unique(part):
        mine = part == number
        chosen[mine] = correct[_best(correct[:, ~mine]), mine]
    return Overfitting(_best(correct), compare_paired(chosen, correct[-1], confidence))


def _best(correct: NDArray[np.bool_]) -> int:
    counts = correct.sum(axis=1)
    return int(np.flatnonzero(counts == counts.max())[-1])
