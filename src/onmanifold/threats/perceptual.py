"""Perceptual space: all images that look alike to a network (Laidlaw et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from onmanifold.classifiers import load_classifier
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.modules import full_float32
from onmanifold.foundation.registry import THREATS
from onmanifold.manifolds.perceptual import FeatureDistance, PerceptualDistance
from onmanifold.threats import geometry
from onmanifold.threats.base import Ball, Region, Threat, Variables, check_radius
from onmanifold.threats.geometry import Start

# l2 length, in pixel units, of the differences by which the speed of the distance is measured (the paper's h).
_DIFFERENCE = 0.1
# So that no step is endless where the distance does not feel a direction.
_SLOWEST = 1e-4
_HALVINGS = 10
# A projected point is inside by this share of the radius: rounding differs from batch to batch.
_INSIDE = 1e-4
# How far beyond its distance a random point is sought before it is drawn back.
_BEYOND = 2.0


@dataclass(frozen=True, kw_only=True)
class LikenessBall(Ball):
    """Where the change of an image may be: within a perceptual distance, ``radius``, and the box.

    Attributes:
        images: (B, C, H, W) that are changed.
        distance: What is measured.
        described: (B, D) what it compares of the images.
    """

    images: Tensor
    distance: PerceptualDistance
    described: Tensor

    @staticmethod
    def around(
        images: Tensor, radius: float | Tensor, distance: PerceptualDistance
    ) -> LikenessBall:
        """The ball around images (B, C, H, W).

        Raises:
            InputError: A radius per sample whose number is not that of the samples.
        """
        # Its directions are those of l2 in pixel space.
        box = Ball.of("l2", radius, images, -images, 1 - images)
        with torch.no_grad(), full_float32():
            described = distance.describe(images)
        return LikenessBall(**vars(box), images=images, distance=distance, described=described)

    def keep(self, mask: Tensor) -> LikenessBall:
        """The ball of the selected samples."""
        kept = super().keep(mask)
        assert isinstance(kept, LikenessBall)
        return replace(kept, images=self.images[mask], described=self.described[mask])

    def measured(self, points: Tensor) -> Tensor:
        """Distance (B,) of the changed images from the images; differentiable."""
        return self.distance.compare(self.described, self.distance.describe(self.images + points))

    def size(self, points: Tensor) -> Tensor:
        """Distance (B,) of the changed images from the images, in full precision."""
        with torch.no_grad(), full_float32():
            return self.measured(points)

    def boxed(self, points: Tensor) -> Tensor:
        """The changes (B, C, H, W), so that the images stay in [0, 1]."""
        assert self.low is not None
        assert self.high is not None
        return geometry.clip(points.flatten(1), self.low, self.high).view_as(points)

    def project(self, points: Tensor) -> Tensor:
        """In the box, and where that is too far, drawn towards the image until it is near enough."""
        return self._drawn_in(self.boxed(points), self.radius)

    def _drawn_in(self, points: Tensor, limit: Tensor) -> Tensor:
        """Each point (B, C, H, W) that is beyond its limit (B,), on its way to the image: bisected."""
        # Written so that what is no number is outside.
        outside = ~(self.size(points) <= limit)
        if not bool(outside.any()):
            return points
        rows = outside.nonzero().squeeze(1)
        few, far, bound = self.keep(rows), points[rows], (1 - _INSIDE) * limit[rows]
        low, high = torch.zeros_like(bound), torch.ones_like(bound)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            inside = few.size(_scaled(far, middle)) <= bound
            low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
        # A change that the distance does not feel is one all the same.
        low = torch.where(bound > 0, low, 0.0)
        return points.index_copy(0, rows, _scaled(far, low))

    def ascend(self, points: Tensor, gradients: Tensor, step_size: float | Tensor) -> Tensor:
        """A step along the gradient, by the step size in units of the distance; not yet projected.

        The distance is that between both ends of the step, to first order.
        """
        directions = geometry.unit(gradients)
        speed = self.speed(points, directions)
        length = torch.as_tensor(step_size, dtype=speed.dtype, device=speed.device) / speed
        return points + _scaled(directions, length)

    def speed(self, points: Tensor, directions: Tensor) -> Tensor:
        """By how much the distance grows along unit directions (B, C, H, W), per unit of l2 length, (B,)."""
        with torch.no_grad(), full_float32():
            here = self.distance.describe(self.images + points)
            there = self.distance.describe(self.images + points + _DIFFERENCE * directions)
            return self.distance.compare(here, there) / _DIFFERENCE + _SLOWEST

    def random(self, start: Start, seed: int, indices: Tensor, stream: str) -> Tensor:
        """Random directions in pixel space, at random distances; "nearby": Gaussian pixels."""
        unit, count = torch.ones_like(self.radius), self.images[0].numel()
        points = geometry.random_points(count, "l2", unit, start, seed, indices, stream)
        points = points.view(self.images.shape)
        if start in ("zero", "nearby"):
            return self.project(points)
        limit = geometry.size(points, "l2") * self.radius
        directions = geometry.unit(points)
        length = _BEYOND * limit / self.speed(self.zero(), directions)
        return self._drawn_in(self.boxed(_scaled(directions, length)), limit)


class PerceptualRegion(Region):
    """A perceptual ball around a batch; the variable "image" is added to the images."""

    def __init__(self, ball: LikenessBall) -> None:
        self.ball = ball
        self.balls = {"image": ball}

    def render(self, variables: Variables) -> Tensor:
        """Images plus perturbation; inside [0, 1] because the projection respects the box."""
        return self.ball.images + variables["image"]

    def keep(self, mask: Tensor) -> Region:
        """The region of the selected samples."""
        return PerceptualRegion(self.ball.keep(mask))


@THREATS.register("perceptual_ball")
@dataclass(frozen=True)
class PerceptualBall(Threat):
    """All images within a perceptual distance of the image, pixels in [0, 1] (Laidlaw et al. 2021, eq. 1).

    Attacks move in pixel space, along the gradient, in steps whose size is a perceptual distance. The projection
    clips to [0, 1] and draws a point towards the image, by bisection: what it finds is inside, on the segment to
    the image, but not the nearest point of the ball, which is not convex. Passes of the network that measures the
    distance are not counted. FAB, Square and RayS, which go by norms of the variables, do not search here.

    Attributes:
        distance: A `PerceptualDistance`, such as a `FeatureDistance` of some classifier (the paper's distance);
            or the file of a classifier, whose features are compared; or "self": the features of the model that
            is attacked, whatever that is. Then the threat model is another one for each model, and results
            cannot be compared between models.
        radius: In units of the distance; a number, or (B,) one per sample. The paper's is 0.5.
    """

    by_norm: ClassVar[bool] = False

    distance: PerceptualDistance | str | Path = "self"
    radius: float | Tensor = 0.5

    def __post_init__(self) -> None:
        check_radius(self.radius)
        if isinstance(self.distance, str | Path) and self.distance != "self":
            loaded = FeatureDistance(load_classifier(self.distance))
            object.__setattr__(self, "distance", loaded)

    def facing(self, model: nn.Module, images: Tensor) -> Threat:
        """The ball in the model's own features, where the distance is "self"."""
        if self.distance != "self":
            return self
        channels, height, width = images.shape[1:]
        return replace(self, distance=FeatureDistance(model, (channels, height, width)))

    def around(self, images: Tensor, labels: Tensor, codes: Tensor | None = None) -> Region:
        """The ball around each image.

        Raises:
            InputError: The distance is "self", and no attack has said whose.
        """
        if isinstance(self.distance, str | Path):
            raise InputError(
                "distance: 'self' is the attacked model's, which only an attack knows; expected a "
                "PerceptualDistance, or `threat.facing(model, images)`."
            )
        return PerceptualRegion(LikenessBall.around(images, self.radius, self.distance))


def _scaled(points: Tensor, factors: Tensor) -> Tensor:
    """Points (B, C, H, W) times one factor each, (B,)."""
    return points * factors.view(-1, 1, 1, 1)
