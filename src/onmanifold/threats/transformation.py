"""Six degrees of freedom: translation, shear, scale and rotation (Disentangling eq. 5 and 6)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from onmanifold.foundation.errors import InputError
from onmanifold.foundation.registry import THREATS
from onmanifold.manifolds.affine import affine_matrix, warp
from onmanifold.threats.base import Ball, Region, Threat, Variables, check_radius
from onmanifold.threats.geometry import Norm


class TransformationRegion(Region):
    """Transformations of a batch; the variable "transformation" (B, 6) is in units of the half-ranges."""

    def __init__(self, images: Tensor, ball: Ball, half_ranges: Tensor) -> None:
        self.images = images
        self.balls = {"transformation": ball}
        self.half_ranges = half_ranges
        self.identity = half_ranges.new_tensor([0.0, 0.0, 0.0, 0.0, 1.0, 0.0])

    def render(self, variables: Variables) -> Tensor:
        """The transformed images; zero variables give the images themselves."""
        parameters = self.identity + variables["transformation"] * self.half_ranges
        return warp(self.images, affine_matrix(parameters))

    def keep(self, mask: Tensor) -> Region:
        """The region of the selected samples."""
        ball = self.balls["transformation"].keep(mask)
        return TransformationRegion(self.images[mask], ball, self.half_ranges)


@THREATS.register("transformation_ball")
@dataclass(frozen=True)
class TransformationBall(Threat):
    """All images reached by a translation, shear, scaling and rotation, the identity at the centre.

    The six variables are measured in units of the half-ranges below, and never exceed them. The defaults are
    the ranges for EMNIST and Fashion-MNIST of the authors' code.

    Attributes:
        radius: Share of the half-ranges that may be used: a number, or (B,) one per sample; 1 is all.
        norm: "linf", "l2" or "l1" over the six variables.
        translation: Half-range in units of half the image's width.
        shear: Half-range of both shears.
        scale: Half-range of the scale around 1.
        rotation: Half-range in radians.
    """

    radius: float | Tensor = 1.0
    norm: Norm = "linf"
    translation: float = 0.15
    shear: float = 0.2
    scale: float = 0.15
    rotation: float = math.pi / 10

    def __post_init__(self) -> None:
        check_radius(self.radius)
        for name in ("translation", "shear", "scale", "rotation"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(
                    f"{name}: expected a half-range >= 0, found {getattr(self, name)}."
                )
        if self.scale >= 1:
            raise InputError(f"scale: expected a half-range below 1, found {self.scale}.")

    def around(self, images: Tensor, labels: Tensor, codes: Tensor | None = None) -> Region:
        """Transformations of each image."""
        half_ranges = images.new_tensor(
            [self.translation, self.translation, self.shear, self.shear, self.scale, self.rotation]
        )
        centre = torch.zeros(len(images), 6, dtype=images.dtype, device=images.device)
        edge = torch.ones_like(centre)
        return TransformationRegion(
            images, Ball.of(self.norm, self.radius, centre, -edge, edge), half_ranges
        )
