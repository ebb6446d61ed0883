"""Interleaved timing: candidates take turns, so that a machine whose speed drifts treats all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleave(
    candidates: Mapping[str, Callable[[], object]], rounds: int = 5, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, after ``warmup`` rounds that are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + rounds):
        for name, call in candidates.items():
            begin = _now()
            call()
            elapsed = _now() - begin
            if turn >= warmup:
                seconds[name].append(elapsed)
    return seconds


def _now() -> float:
    """The clock, once a GPU has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def ratio(seconds: Mapping[str, list[float]], name: str, over: str) -> float:
    """Median over the rounds of ``name``'s time divided by that of ``over`` in the same round."""
    pairs = zip(seconds[name], seconds[over], strict=True)
    return statistics.median(mine / theirs for mine, theirs in pairs)
