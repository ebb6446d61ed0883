"""What may be asked of, and borrowed from, any module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


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
    # What stands in a parameter's place (see `with_tensors`) may be computed, and then it cannot be frozen.
    moving = [part for part in module.parameters() if part.requires_grad and part.is_leaf]
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


@contextmanager
def full_float32() -> Iterator[None]:
    """Float32 as written: no autocast, and no TF32, to which GPUs round in convolutions by default."""
    convolution, product = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    try:
        with ExitStack() as stack:
            for device in devices:
                stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolution
        torch.backends.cuda.matmul.allow_tf32 = product


@contextmanager
def with_tensors(module: nn.Module, tensors: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Other tensors in the place of some parameters and buffers; then each as it was, also when interrupted.

    What is computed inside the block is differentiable with respect to the tensors put in.

    Args:
        module: Whose parameters and buffers they are, wherever in it and however often they occur.
        tensors: What stands in for each.
    """
    places: list[tuple[dict[str, Any], str, Tensor]] = [
        (held, name, own)
        for part in module.modules()
        for held in (part._parameters, part._buffers)
        for name, own in held.items()
        if own is not None and own in tensors
    ]
    try:
        for held, name, own in places:
            held[name] = tensors[own]
        yield
    finally:
        for held, name, own in places:
            held[name] = own


@contextmanager
def with_parts(module: nn.Module, parts: Mapping[nn.Module, nn.Module]) -> Iterator[None]:
    """Other modules in the place of some submodules; then each as it was, also when interrupted.

    Args:
        module: Whose submodules they are, wherever in it and however often they occur.
        parts: What stands in for each.
    """
    places = [
        (owner, name, own)
        for owner in module.modules()
        for name, own in owner._modules.items()
        if own is not None and own in parts
    ]
    try:
        for owner, name, own in places:
            owner._modules[name] = parts[own]
        yield
    finally:
        for owner, name, own in places:
            owner._modules[name] = own
