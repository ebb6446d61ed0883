"""Interleaved timing: candidates take turns, so that a machine whose speed drifts treats all alike."""

from __future__ import annotations

import functools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from typing import Any

import torch

Maker = Callable[..., Callable[[], object]]
"""Makes a candidate from its name and a task; a function of a module, so that another process can find it."""


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


def interleave_apart(
    make: Maker, names: Sequence[str], task: Any, rounds: int = 5, warmup: int = 1
) -> dict[str, list[float]]:
    """As `interleave`, each candidate in a process of its own, as its users run it.

    Args:
        make: Makes a candidate from its name and the task.
        names: Of the candidates.
        task: Hashable; handed to ``make``.
        rounds: How often each is timed.
        warmup: Rounds before that.
    """
    context = multiprocessing.get_context("spawn")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        pools = {name: stack.enter_context(ProcessPoolExecutor(1, context)) for name in names}
        for turn in range(warmup + rounds):
            for name, pool in pools.items():
                elapsed = pool.submit(_timed, make, name, task).result()
                if turn >= warmup:
                    seconds[name].append(elapsed)
    return seconds


@functools.cache
def _made(make: Maker, name: str, task: Any) -> Callable[[], object]:
    return make(name, task)


def _timed(make: Maker, name: str, task: Any) -> float:
    call = _made(make, name, task)
    begin = _now()
    call()
    return _now() - begin
