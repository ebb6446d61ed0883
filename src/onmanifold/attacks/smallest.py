"""What searches for the nearest misclassified point have in common: the smallest perturbation of each sample."""

from __future__ import annotations

import torch
from torch import Tensor

from onmanifold.attacks.base import Found
from onmanifold.threats.base import Region, Variables


class Smallest:
    """The smallest perturbation of each sample so far that does what is wanted, and the passes spent on it.

    Attributes:
        variables: (B, ...) each, zero where none was found.
        size: (B,) of them, infinite where none was found.
        radius: (B,) the largest size that is a success: that of the region's first variable.
        forwards: (B,) int32.
        backwards: (B,) int32.
    """

    def __init__(self, region: Region, early_stop: bool) -> None:
        self.variables = region.zero()
        self.radius = next(iter(region.balls.values())).radius
        self.size = torch.full_like(self.radius, torch.inf)
        self.forwards = torch.zeros_like(self.radius, dtype=torch.int32)
        self.backwards = torch.zeros_like(self.forwards)
        self._enough = self.radius if early_stop else torch.zeros_like(self.radius)

    @property
    def under_way(self) -> Tensor:
        """(B,) bool: which samples are still searched; those misclassified as they are never are."""
        return self.size > self._enough

    def offer(self, rows: Tensor, points: Variables, size: Tensor, fooled: Tensor) -> None:
        """Keep the points that fool and are smaller than those before.

        Args:
            rows: (b,) int64 positions of the samples in the batch.
            points: (b, ...) each.
            size: (b,).
            fooled: (b,) bool.
        """
        smaller = fooled & (size < self.size[rows])
        if not bool(smaller.any()):
            return
        chosen = rows[smaller]
        self.size[chosen] = size[smaller]
        for name, point in points.items():
            self.variables[name][chosen] = point[smaller]

    def found(self, variables: Variables) -> Found:
        """What the search hands back: variables within the threat model, and minus the sizes as objective."""
        return Found(variables, -self.size, self.forwards, self.backwards)
