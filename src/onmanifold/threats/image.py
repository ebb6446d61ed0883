"""Image space: a norm ball around the image, cut by [0, 1]."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from onmanifold.foundation.registry import THREATS
from onmanifold.threats.base import Ball, Region, Threat, Variables, check_radius
from onmanifold.threats.geometry import Norm


class ImageRegion(Region):
    """An image ball around a batch; the variable "image" is added to the images."""

    def __init__(self, images: Tensor, ball: Ball) -> None:
        self.images = images
        self.balls = {"image": ball}

    def render(self, variables: Variables) -> Tensor:
        """Images plus perturbation; inside [0, 1] because the projection respects the box."""
        return self.images + variables["image"]

    def keep(self, mask: Tensor) -> Region:
        """The region of the selected samples."""
        return ImageRegion(self.images[mask], self.balls["image"].keep(mask))


@THREATS.register("image_ball")
@dataclass(frozen=True)
class ImageBall(Threat):
    """All images within a radius of the image in a norm, pixels in [0, 1].

    Attributes:
        norm: "linf", "l2" or "l1".
        radius: In pixel units of [0, 1] images; a number, or (B,) one per sample.

    >>> ImageBall(norm="linf", radius=8 / 255).norm
    'linf'
    """

    norm: Norm = "linf"
    radius: float | Tensor = 8 / 255

    def __post_init__(self) -> None:
        check_radius(self.radius)

    def around(self, images: Tensor, labels: Tensor, codes: Tensor | None = None) -> Region:
        """The ball around each image."""
        return ImageRegion(images, Ball.of(self.norm, self.radius, images, -images, 1 - images))
