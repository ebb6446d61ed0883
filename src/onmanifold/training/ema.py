"""Exponential moving average of weights and batch-norm statistics."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class MovingAverage:
    """A copy of a model whose weights follow the model's slowly; it, not the model, is what is kept.

    At update n the decay is ``min(decay, (1 + n) / (10 + n))``, so that the initial weights are soon
    forgotten. Buffers are averaged too, since batch-norm statistics belong to the weights.

    Args:
        model: The model in training.
        decay: Share of the average that is kept at each step, in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._floating: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._other: list[tuple[Tensor, Tensor]] = []
        followers = self.model.state_dict(keep_vars=True)
        seen: set[int] = set()
        for name, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) in seen:
                continue  # a tied weight, which must follow once
            seen.add(id(tensor))
            if tensor.is_floating_point():
                self._floating[0].append(followers[name])
                self._floating[1].append(tensor)
            else:
                self._other.append((followers[name], tensor))

    @torch.no_grad()
    def update(self, number: int) -> None:
        """Follow the model by one step, the ``number``-th from 1."""
        decay = min(self.decay, (1 + number) / (10 + number))
        torch._foreach_lerp_(*self._floating, 1 - decay)
        for follower, tensor in self._other:
            follower.copy_(tensor)
