"""Fog: a plasma fractal whose random terms the adversary chooses (Kang et al. 2019, arXiv:1908.08016)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from onmanifold.foundation.errors import InputError
from onmanifold.foundation.registry import THREATS
from onmanifold.threats.base import Ball, Region, Threat, Variables, check_radius
from onmanifold.threats.effects import EffectRegion, column

# Below this difference between its extremes a plasma counts as flat and is not stretched any more, which
# gives the centre of the variables, where all is flat, a value and a gradient.
_FLAT = 0.1


def plasma(terms: Tensor, size: int, decay: float) -> Tensor:
    """Diamond-square fractals on a torus, all squares of a level at once.

    Each level doubles the grid: a new point is the mean of its four neighbours plus ``decay ** -level`` times
    its own term.

    Args:
        terms: (B, size² − 1) from coarse to fine; a level of n² points has 3 n²: centres of squares, then
            middles of horizontal and of vertical edges.
        size: Height and width, a power of 2.
        decay: By how much each finer level is weaker.

    Returns:
        (B, size, size).
    """
    grid = terms.new_zeros(len(terms), 1, 1)
    first, amplitude, count = 0, 1.0, 1
    while count < size:
        own = terms[:, first : first + 3 * count**2].view(-1, 3, count, count) * amplitude
        right, below = grid.roll(-1, 2), grid.roll(-1, 1)
        centre = (grid + right + below + below.roll(-1, 2)) / 4 + own[:, 0]
        across = (grid + right + centre + centre.roll(1, 1)) / 4 + own[:, 1]
        down = (grid + below + centre + centre.roll(1, 2)) / 4 + own[:, 2]
        pairs = torch.stack([torch.stack([grid, across], 3), torch.stack([down, centre], 3)], 2)
        first, amplitude, count = first + 3 * count**2, amplitude / decay, 2 * count
        grid = pairs.view(-1, count, count)
    return grid


def _stretched(values: Tensor) -> Tensor:
    """Each sample's values brought to [0, 1] by its own extremes; flat ones to 1/2."""
    low, high = values.amin((1, 2), keepdim=True), values.amax((1, 2), keepdim=True)
    stretched: Tensor = (values - (low + high) / 2) / (high - low).clamp(min=_FLAT) + 0.5
    return stretched


class FogRegion(EffectRegion):
    """Fog around a batch; the variable "fog" (B, size² − 1) holds the random terms of the plasma."""

    variable: ClassVar[str] = "fog"

    def __init__(self, images: Tensor, strength: Tensor, ball: Ball, decay: float) -> None:
        super().__init__(images, strength, ball)
        self.decay = decay

    def render(self, variables: Variables) -> Tensor:
        """The images behind the fog."""
        height, width = self.images.shape[-2:]
        clouds = plasma(variables["fog"], _map_size(height, width), self.decay)
        fog = _stretched(clouds[:, :height, :width]).unsqueeze(1)
        # A mean of image and fog, weights 1 and strength: inside [0, 1] without being clipped.
        return (self.images + self.strength * fog) / (1 + self.strength)

    def keep(self, mask: Tensor) -> FogRegion:
        """The region of the selected samples."""
        return FogRegion(*self.kept(mask), self.decay)


def _map_size(height: int, width: int) -> int:
    return 1 << max(1, (max(height, width) - 1).bit_length())


@THREATS.register("fog")
@dataclass(frozen=True)
class Fog(Threat):
    """White fog of uneven density: ``(image + radius · fog) / (1 + radius)``.

    The fog is a diamond-square plasma, stretched to [0, 1] image by image. Its random terms are the variables,
    in a fixed linf ball of radius 1 around flat fog of density 1/2; so zero variables are not the image
    itself, unless the radius is 0. The original stretches over the whole batch, which would couple samples,
    and brightens images whose maximum is below 1.

    Attributes:
        radius: Strength: weight of the fog, the image's being 1. A number, or (B,) one per sample. The
            original's unit is 1/255 of it: its 128 is 128/255.
        decay: By how much each finer level of the plasma is weaker, at least 1.

    >>> Fog(radius=128 / 255).decay
    2.0
    """

    radius: float | Tensor = 128 / 255
    decay: float = 2.0

    def __post_init__(self) -> None:
        check_radius(self.radius)
        if not 1 <= self.decay < float("inf"):
            raise InputError(f"decay: expected a number >= 1, found {self.decay}.")

    def around(self, images: Tensor, labels: Tensor, codes: Tensor | None = None) -> Region:
        """Fog in front of each image."""
        size = _map_size(*images.shape[-2:])
        terms = images.new_zeros(len(images), size**2 - 1)
        return FogRegion(
            images, column(self.radius, images), Ball.of("linf", 1.0, terms), self.decay
        )
