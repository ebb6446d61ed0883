"""How many CPU threads a model is worth: handing small work around costs more than it saves."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# Forward passes of a batch below this many floating-point operations: a second thread gains a third where
# nothing else runs, and costs a multiple where anything does.
_SMALL_PASS = 200_000_000
# Operations of one image's forward pass up to which threads work better side by side than together.
_SMALL_MODEL = 50_000_000
_SMALLEST_PART = 32
# Where they cannot be counted: as for a large model.
_UNKNOWN = 2**62

_operations: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


def suitable_threads(model: nn.Module, images: Tensor) -> int | None:
    """1 where a forward pass of ``images`` (B, C, H, W) is so small that threads do not pay, else None.

    The first call for a model runs it on one image, in the mode it is in.
    """
    if images.is_cuda or torch.get_num_threads() == 1:
        return None
    return 1 if len(images) * _operations_of(model, images) < _SMALL_PASS else None


def suitable_workers(model: nn.Module, images: Tensor, threads: int) -> int:
    """How many threads may each search a part of the batch on its own; 1: the batch is searched as one.

    For a small model this is faster than letting all threads share each operation, since they need not wait
    for each other several times in each millisecond.

    Args:
        model: Small where a forward pass of one image takes few operations.
        images: (B, C, H, W).
        threads: How many there are.
    """
    parts = min(threads, len(images) // _SMALLEST_PART)
    if images.is_cuda or parts < 2 or _operations_of(model, images) > _SMALL_MODEL:
        return 1
    return parts


def _operations_of(model: nn.Module, images: Tensor) -> int:
    if model not in _operations:
        try:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                model(images[:1])
            _operations[model] = int(counter.get_total_flops())
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            # Such as that of a model that takes gradients in its forward pass, which the counter does not bear.
            _operations[model] = _UNKNOWN
    return _operations[model]


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
