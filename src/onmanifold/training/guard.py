"""What a training borrows from its surroundings and gives back: Ctrl-C, generators, dtype, CPU threads."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# Forward passes of a batch below this many floating-point operations: a second thread gains a third where
# nothing else runs, and costs a multiple where anything does.
_SMALL_PASS = 200_000_000


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


def suitable_threads(
    classifier: nn.Module, image_shape: tuple[int, int, int], batch: int
) -> int | None:
    """1 for a model so small that handing work to other threads does not pay, else None: as it is."""
    if torch.get_num_threads() == 1:
        return None
    parameter = next(classifier.parameters())
    image = torch.zeros(1, *image_shape, dtype=parameter.dtype, device=parameter.device)
    flags = [(part, part.training) for part in classifier.modules()]
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            classifier.eval()(image)
    finally:
        for part, flag in flags:
            part.training = flag
    return 1 if batch * counter.get_total_flops() < _SMALL_PASS else None


@contextmanager
def own_threads(count: int | None) -> Iterator[None]:
    """Run on ``count`` CPU threads; None: as it is."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
