"""Interleaved timing: candidates take turns, so that a machine whose speed drifts treats all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def interleave(
    candidates: Mapping[str, Callable[[], object]], rounds: int = 5, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, after ``warmup`` rounds that are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + rounds):
        for name, call in candidates.items():
            begin = time.perf_counter()
            call()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, over: str) -> float:
    """Median over the rounds of ``name``'s time divided by that of ``over`` in the same round."""
    pairs = zip(seconds[name], seconds[over], strict=True)
    return statistics.median(mine / theirs for mine, theirs in pairs)
