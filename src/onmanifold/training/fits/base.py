"""How a manifold is learned: who its players are, and the losses they take in turn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from onmanifold.data.dataset import Dataset
from onmanifold.foundation.registry import FITS, Component
from onmanifold.manifolds.base import Manifold
from onmanifold.training.task import Turn as Turn


@dataclass
class FitStep:
    """One step of fitting, as a `Fit` sees it.

    Global random numbers (``torch.randn`` on the images' device) are seeded for the step: fits may use them.

    Attributes:
        manifold: In train mode.
        players: All networks that move, by name, in train mode.
        images: (B, C, H, W) in [0, 1].
        labels: (B,) int64.
        indices: (B,) int64, stable over epochs.
        epoch: From 0.
        number: Of the step, from 0, over all epochs.
        total: Number of steps in all.
        seed: Of all that is random in this step.
        metrics: What is logged, by name: detached means () over the batch. A fit fills it.
    """

    manifold: Manifold
    players: Mapping[str, nn.Module]
    images: Tensor
    labels: Tensor
    indices: Tensor
    epoch: int
    number: int
    total: int
    seed: int
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Fit(Component, ABC):
    """How a manifold is learned. It holds no state; the loop knows none by name.

    Attributes:
        defaults: Fields of `TrainingConfig` that differ from its own defaults.
        score: The entry of what `validate` gives of which the best epoch has the least; None: the last epoch is
            the result, as for adversarial generators.
    """

    registry = FITS
    defaults: ClassVar[Mapping[str, Any]] = {}
    score: ClassVar[str | None] = None

    def players(self, manifold: Manifold) -> dict[str, nn.Module]:
        """The networks that move, by name: parts of the manifold, and others such as a discriminator.

        Each has an optimizer of its own. Others are made here, their initial weights from the global generator,
        which is seeded. No parameter belongs to two players.
        """
        return {"manifold": manifold}

    def rates(self) -> Mapping[str, float]:
        """Factors on the learning rate, for players whose factor is not 1."""
        return {}

    def start(self, manifold: Manifold, images: Tensor, labels: Tensor) -> None:
        """What depends on data before the first step, given its first images: such as actnorm's scales."""

    @abstractmethod
    def turns(self, step: FitStep) -> Iterator[Turn]:
        """Yield the losses of each turn of a step.

        The loop takes the gradient of each loss to its player's parameters alone, then lets the players of the
        turn move, then goes on with this generator: so a later turn sees the moved players. Losses of one turn
        may share a graph.
        """

    def validate(
        self, manifold: Manifold, images: Tensor, labels: Tensor, indices: Tensor, seed: int
    ) -> dict[str, Tensor]:
        """Figures (B,) of held-out images, on the manifold in eval mode, without gradient.

        By default the reconstruction error, the mean over pixels of the absolute and of the squared difference.
        """
        return reconstruction_errors(manifold, images, labels)


class ClosedForm(Fit):
    """A manifold that is solved for and not trained."""

    @abstractmethod
    def solve(self, manifold: Manifold, dataset: Dataset) -> None:
        """Give the manifold its weights."""

    def turns(self, step: FitStep) -> Iterator[Turn]:
        raise NotImplementedError(f"{type(self).__name__} takes no steps.")


@torch.no_grad()
def reconstruction_errors(manifold: Manifold, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Of each image (B,): mean absolute ("l1") and mean squared ("l2") difference from its reconstruction."""
    difference = (manifold.decode(manifold.encode(images, labels)) - images).flatten(1)
    return {
        "reconstruction_l1": difference.abs().mean(1),
        "reconstruction_l2": difference.square().mean(1),
    }
