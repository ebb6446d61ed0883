"""Optimizers as a configuration says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

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
