"""Cutout as a method of its own, so that it can stand beside others in one experiment."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from onmanifold.data.augment import Augmentation
from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.registry import METHODS
from onmanifold.training.methods.base import Method, Step


@METHODS.register("cutout")
@dataclass(frozen=True)
class Cutout(Method):
    """Cross-entropy of images with a square set to zero (DeVries and Taylor 2017), as in IJSAT's table 2.

    To combine it with another method, set ``augmentation: {cutout: 16}`` of the training, which holds for all
    methods of an experiment. Flips and crops of the training come first.

    Attributes:
        side: Of the square, in pixels, around a random pixel and cut at the border: 16 in the paper for CIFAR-10.
    """

    side: int = 16

    def __post_init__(self) -> None:
        if self.side < 1:
            raise ConfigError(f"side: expected at least 1, found {self.side}.")

    def loss(self, step: Step) -> Tensor:
        # The step's seed is another in each epoch.
        images = Augmentation(cutout=self.side)(step.images, step.indices, step.seed)
        return step.cross_entropy(images)
