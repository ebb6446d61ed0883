"""Both at once: the joint space threat model (IJSAT eq. 8)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from onmanifold.foundation.registry import THREATS
from onmanifold.threats.base import Ball, Region, Threat, Variables
from onmanifold.threats.image import ImageBall
from onmanifold.threats.latent import LatentBall


class JointRegion(Region):
    """An on-manifold region and an image perturbation added to what it renders, clipped to [0, 1]."""

    def __init__(self, latent: Region, image: Ball) -> None:
        self.latent = latent
        self.balls = {"image": image, **latent.balls}

    def render(self, variables: Variables) -> Tensor:
        """decode(code + λ) + δ, clipped to [0, 1]."""
        return (self.latent.render(variables) + variables["image"]).clamp(0, 1)

    def keep(self, mask: Tensor) -> Region:
        """The region of the selected samples."""
        return JointRegion(self.latent.keep(mask), self.balls["image"].keep(mask))


@THREATS.register("joint_ball")
@dataclass(frozen=True)
class JointBall(Threat):
    """A latent ball and an image ball at once: ``clip(decode(code + λ) + δ)``, each in its own ball.

    Attributes:
        image: The image ball; its δ is added to the decoded image, so its box is that of the render.
        latent: The latent ball.
    """

    image: ImageBall
    latent: LatentBall

    def around(self, images: Tensor, labels: Tensor, codes: Tensor | None = None) -> Region:
        """Both balls around each image and its code."""
        latent = self.latent.around(images, labels, codes)
        return JointRegion(latent, Ball.of(self.image.norm, self.image.radius, images))
