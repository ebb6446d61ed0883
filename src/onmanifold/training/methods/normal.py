"""Normal training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from onmanifold.foundation.registry import METHODS
from onmanifold.training.methods.base import Method, Step


@METHODS.register("normal")
@dataclass(frozen=True)
class Normal(Method):
    """Cross-entropy on the training images as they are."""

    def loss(self, step: Step) -> Tensor:
        return step.cross_entropy(step.images)
