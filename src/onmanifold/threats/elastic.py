"""Elastic: every pixel may move a little, its neighbours with it (Xiao et al. 2018; Kang et al. 2019)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from onmanifold.foundation.errors import InputError
from onmanifold.foundation.registry import THREATS
from onmanifold.threats.base import Ball, Region, Threat, Variables, check_radius

_REACH = 4  # of the smoothing, in standard deviations


def smoothing(size: int, deviation: float, like: Tensor) -> Tensor:
    """The matrix (size, size) that smooths a row by a Gaussian cut off at 4 deviations, mirrored at the ends."""
    reach = min(math.ceil(_REACH * deviation), size - 1)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    weights = torch.exp(-(offsets / max(deviation, 1e-12)).square() / 2)
    weights = weights / weights.sum()
    places = torch.arange(size).unsqueeze(1) + offsets.long()
    places = places.abs()
    places = torch.where(places >= size, 2 * (size - 1) - places, places)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    return matrix.scatter_add(1, places, weights.expand(size, -1)).to(like)


def displaced(images: Tensor, flow: Tensor) -> Tensor:
    """Images (B, C, H, W) read at each pixel's own place plus its flow, bilinearly.

    As `grid_sample` with corners aligned and border padding, but exact where the flow is zero, and
    differentiable in the flow alone.

    Args:
        images: (B, C, H, W), contiguous.
        flow: (B, 2, H, W), pixels downwards and to the right.
    """
    channels, height, width = images.shape[1:]
    whole = flow.detach().floor()
    down, right = (flow - whole).unsqueeze(2).unbind(1)
    steps = whole.long()
    rows = torch.arange(height, device=flow.device).unsqueeze(1) + steps[:, 0]
    columns = torch.arange(width, device=flow.device) + steps[:, 1]
    pixels = images.flatten(2)

    def at(row: Tensor, place: Tensor) -> Tensor:
        index = row.clamp(0, height - 1) * width + place.clamp(0, width - 1)
        return pixels.gather(2, index.flatten(1).unsqueeze(1).expand(-1, channels, -1)).view_as(
            images
        )

    first, second = at(rows, columns), at(rows + 1, columns)
    upper = first + right * (at(rows, columns + 1) - first)
    lower = second + right * (at(rows + 1, columns + 1) - second)
    return upper + down * (lower - upper)


class ElasticRegion(Region):
    """Displacements of a batch; the variable "flow" (B, 2, H, W) is smoothed and then followed."""

    def __init__(self, images: Tensor, ball: Ball, vertical: Tensor, horizontal: Tensor) -> None:
        self.images = images
        self.balls = {"flow": ball}
        self.vertical = vertical
        self.horizontal = horizontal

    def render(self, variables: Variables) -> Tensor:
        """The displaced images."""
        flow = self.vertical @ variables["flow"] @ self.horizontal.T
        return displaced(self.images, flow)

    def keep(self, mask: Tensor) -> ElasticRegion:
        """The region of the selected samples."""
        ball = self.balls["flow"].keep(mask)
        return ElasticRegion(self.images[mask], ball, self.vertical, self.horizontal)


@THREATS.register("elastic")
@dataclass(frozen=True)
class Elastic(Threat):
    """Local displacements: each pixel is read from a place nearby, along a smoothed flow.

    Zero flow is the image itself, exactly. Outside the image its border goes on.

    Attributes:
        radius: Largest displacement along each axis, in pixels: a number, or (B,) one per sample.
        deviation: Of the Gaussian that smooths the flow, in pixels; None: 3 on images of 224 pixels, in
            proportion on others.

    >>> Elastic(radius=0.5).deviation is None
    True
    """

    radius: float | Tensor = 0.5
    deviation: float | None = None

    def __post_init__(self) -> None:
        check_radius(self.radius)
        if self.deviation is not None and not 0 <= self.deviation < math.inf:
            raise InputError(f"deviation: expected a number >= 0, found {self.deviation}.")

    def around(self, images: Tensor, labels: Tensor, codes: Tensor | None = None) -> Region:
        """Displacements of each image."""
        height, width = images.shape[-2:]
        deviation = self.deviation
        if deviation is None:
            deviation = 3 * math.sqrt(height * width) / 224
        flow = images.new_zeros(len(images), 2, height, width)
        return ElasticRegion(
            images.contiguous(),
            Ball.of("linf", self.radius, flow),
            smoothing(height, deviation, images),
            smoothing(width, deviation, images),
        )
