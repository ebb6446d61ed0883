"""What a training borrows from its surroundings and gives back: Ctrl-C, random generators, dtype."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Interruption:
    """Ctrl-C as a flag: the loop ends after the step under way, saved. A second Ctrl-C ends it at once.

    Attributes:
        wanted: Whether Ctrl-C was pressed.
    """

    def __init__(self) -> None:
        self.wanted = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turn Ctrl-C into the flag inside the block; in threads other than the main one nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def interrupt(number: int, frame: object) -> None:
            if self.wanted:
                raise KeyboardInterrupt
            self.wanted = True

        before = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


@contextmanager
def own_generators(device: torch.device) -> Iterator[None]:
    """The global random generators may be seeded inside the block; outside they are as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def seed_generators(device: torch.device, seed: int) -> None:
    """Seed the CPU's generator and the device's own; torch.manual_seed, which seeds all, is slow."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """The default dtype inside the block; Fabric rounds a model's output to it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
