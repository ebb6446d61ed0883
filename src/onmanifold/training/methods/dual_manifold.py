"""Dual manifold adversarial training (DMAT)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from onmanifold.attacks import Attack
from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.registry import METHODS
from onmanifold.training.methods.base import Method, Step, persistent


@METHODS.register("dual_manifold")
@dataclass(frozen=True)
class DMAT(Method):
    """Cross-entropy on image-space and on on-manifold adversarial examples, weighted (DMAT eq. 10).

    The paper prints the plain sum of the two losses, weights 1 and 1; the released code takes 0.5 and 0.5,
    which keeps the loss, and with it the right learning rate, at the size of the other methods; that is the
    default. Each kind of examples goes through the model in a forward pass of its own.

    Attributes:
        image_attack: Makes the examples off the manifold, usually PGD on an image ball.
        latent_attack: Makes those on the manifold, usually PGD on a latent ball.
        image_weight: Of the image-space loss.
        latent_weight: Of the on-manifold loss.
    """

    image_attack: Attack
    latent_attack: Attack
    image_weight: float = 0.5
    latent_weight: float = 0.5

    def __post_init__(self) -> None:
        weights = (self.image_weight, self.latent_weight)
        if min(weights) < 0 or not 0 < sum(weights) < float("inf"):
            raise ConfigError(
                f"image_weight and latent_weight: expected numbers >= 0, found {weights}."
            )

    @property
    def attacks(self) -> Sequence[Attack]:
        """Both attacks."""
        return (self.image_attack, self.latent_attack)

    def loss(self, step: Step) -> Tensor:
        # Both are made before the first forward pass, which changes the batch-norm statistics.
        image = step.examples(persistent(self.image_attack))
        latent = step.examples(persistent(self.latent_attack))
        off_manifold, on_manifold = step.cross_entropy(image), step.cross_entropy(latent)
        return self.image_weight * off_manifold + self.latent_weight * on_manifold
