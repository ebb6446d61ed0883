"""Both at once: the joint space threat model (IJSAT eq. 8)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onmanifold.foundation.registry import THREATS
from onmanifold.threats.base import Ball, Region, Threat, Variables
from onmanifold.threats.image import ImageBall
from onmanifold.threats.latent import LatentBall


class _ClippedSum(torch.autograd.Function):
    """clip(image + δ, 0, 1), whose gradient to δ is that of an ascent that may come back from outside.

    A clipped pixel has no gradient, so that a δ which starts outside, as half of those of black and white
    pixels do, would stay there for good. Here δ still sees a gradient that leads it inwards, as it would
    from the bound of an image ball. The gradient to the image is the usual one.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, change: Tensor) -> Tensor:
        total = images + change
        ctx.save_for_backward(total)
        return total.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor]:
        (total,), (gradient,) = ctx.saved_tensors, gradients
        inside = (total >= 0) & (total <= 1)
        inwards = torch.where(total < 0, gradient > 0, gradient < 0)
        return gradient * inside, gradient * (inside | inwards)


class JointRegion(Region):
    """An on-manifold region and an image perturbation added to what it renders, clipped to [0, 1]."""

    def __init__(self, latent: Region, image: Ball) -> None:
        self.latent = latent
        self.balls = {"image": image, **latent.balls}

    def render(self, variables: Variables) -> Tensor:
        """decode(code + λ) + δ, clipped to [0, 1]; see `_ClippedSum` for the gradient to a clipped δ."""
        decoded = self.latent.render(variables)
        clipped: Tensor = _ClippedSum.apply(decoded, variables["image"])  # type: ignore[no-untyped-call]
        return clipped

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
