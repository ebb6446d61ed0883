"""Optimizers as a configuration says, and gradients that several processes share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from onmanifold.training.config import TrainingConfig


def make_optimizer(
    parameters: Sequence[nn.Parameter], config: TrainingConfig
) -> torch.optim.Optimizer:
    """The optimizer of a player's parameters."""
    # The fused form goes through memory once, on CPUs too.
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters) or None
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "adam":
        return torch.optim.Adam(
            parameters, lr=rate, betas=config.betas, weight_decay=decay, fused=fused
        )
    if config.optimizer == "adamax":
        return torch.optim.Adamax(parameters, lr=rate, betas=config.betas, weight_decay=decay)
    return torch.optim.SGD(
        parameters,
        lr=rate,
        momentum=config.momentum,
        weight_decay=decay,
        nesterov=config.nesterov,
        fused=fused,
    )


@torch.no_grad()
def average_gradients(
    parameters: Sequence[nn.Parameter], total: Callable[[Tensor], Tensor]
) -> None:
    """Replace gradients by their sums over the processes; a parameter that none has used keeps none.

    Args:
        parameters: The same ones, in the same order, in every process.
        total: Sums a tensor over the processes.
    """
    used = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
    flat = torch.cat(
        [
            (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).flatten()
            for parameter in parameters
        ]
    )
    summed = total(torch.cat([flat, used.to(flat)]))
    anywhere = summed[len(flat) :].tolist()
    parts = torch.split(summed[: len(flat)], [parameter.numel() for parameter in parameters])
    for parameter, part, users in zip(parameters, parts, anywhere, strict=True):
        if users:
            parameter.grad = torch.empty_like(parameter).copy_(part.view(parameter.shape))
