"""What may be asked of, and borrowed from, any module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's parameters and buffers; the CPU where there are none."""
    return [*module.parameters(), *module.buffers(), torch.empty(0, device="cpu")][0].device


def dtype_of(module: nn.Module) -> torch.dtype:
    """The precision of a module's parameters; of one without, the default."""
    found = [part.dtype for part in module.parameters() if part.is_floating_point()]
    return found[0] if found else torch.get_default_dtype()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Every submodule in eval mode, no gradients to parameters; then each as it was, also when interrupted."""
    training = [part for part in module.modules() if part.training]
    moving = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for part in training:
            part.training = False
        for parameter in moving:
            parameter.requires_grad_(False)
        yield
    finally:
        for part in training:
            part.training = True
        for parameter in moving:
            parameter.requires_grad_(True)
