"""Gabor noise: a sparse map convolved with a Gabor kernel per image (Kang et al. 2019; Co et al. 2019)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from onmanifold.foundation import randomness
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.registry import THREATS
from onmanifold.threats.base import Ball, Region, Threat, Variables, check_radius
from onmanifold.threats.effects import EffectRegion, Filters, centred_grid, column, content_keys

_SIZE = 23  # pixels
_COPIES = 10
# Noise fainter than this is not brought to unit variance, so that no noise is no noise; and the gradient
# there is finite. That of random variables is about 0.15.
_FAINT = 0.01


def gabor_kernels(
    deviation: Tensor, frequency: Tensor, angle: Tensor, copies: Tensor, size: int = _SIZE
) -> Tensor:
    """Sums of rotated Gabor kernels, each sum of Euclidean norm 1.

    A kernel is exp(−(x² + y²) / (2 deviation²)) · cos(2π frequency · (x cos a + y sin a)) on the square
    [−1/2, 1/2]²; its copies have the angles a = angle + π k / copies, k = 0 to copies − 1.

    Args:
        deviation: (B,) of the envelope, in widths of the kernel.
        frequency: (B,) periods per width.
        angle: (B,) radians.
        copies: (B,) int64, 1 to 10.
        size: Height and width in pixels, odd.

    Returns:
        (B, size, size), float64.
    """
    rows, columns = (place / (size - 1) for place in centred_grid(size, angle))
    number = torch.arange(_COPIES, dtype=torch.float64, device=angle.device)
    turns = angle.unsqueeze(1) + math.pi * number / copies.unsqueeze(1)
    turns = turns.double().view(-1, _COPIES, 1, 1)
    waves = torch.cos(
        2 * math.pi * frequency.view(-1, 1, 1, 1) * (columns * turns.cos() + rows * turns.sin())
    )
    wanted = (number < copies.unsqueeze(1)).view(-1, _COPIES, 1, 1)
    distance = (rows.square() + columns.square()) / deviation.view(-1, 1, 1).square()
    kernels = torch.exp(-distance / 2) * torch.where(wanted, waves, 0.0).sum(1)
    return kernels / kernels.square().sum((1, 2), keepdim=True).sqrt()


class GaborRegion(EffectRegion):
    """Gabor noise on a batch; the variable "gabor" (B, H, W) is the map that the kernels are convolved with."""

    variable: ClassVar[str] = "gabor"

    def __init__(self, images: Tensor, strength: Tensor, ball: Ball, kernels: Filters) -> None:
        super().__init__(images, strength, ball)
        self.kernels = kernels

    def render(self, variables: Variables) -> Tensor:
        """The images with the noise added, clipped to [0, 1]."""
        waves = self.kernels(variables["gabor"])
        deviation = (waves.square().mean((1, 2), keepdim=True) + _FAINT**2).sqrt()
        noise = torch.tanh(waves / deviation).unsqueeze(1)
        return (self.images + self.strength * noise).clamp(0, 1)

    def keep(self, mask: Tensor) -> GaborRegion:
        """The region of the selected samples."""
        return GaborRegion(*self.kept(mask), self.kernels[mask])


@THREATS.register("gabor")
@dataclass(frozen=True)
class Gabor(Threat):
    """Gabor noise added to all channels: ``clip(image + radius · noise)``, noise in (−1, 1).

    The noise is a sparse map convolved with a kernel, brought to unit variance image by image and then
    through tanh. The map's values, where it may differ from zero, are the variables, in [−1, 1]; these
    places (one in fourteen) and the kernel follow from the image's content and ``seed``: one to ten rotated
    copies of a wave of 3 to 5.75 periods on 23 pixels under a Gaussian of deviation 0.1 to 0.4 of that width.
    Since the variance is normalised, ``radius`` alone is the strength; zero variables are the image itself.
    The original's noise is in [0, 1] and brightens the image; here it is centred, and no pixel moves by more
    than the radius.

    Attributes:
        radius: Largest change of a pixel, in units of the [0, 1] image: a number, or (B,) one per sample. The
            original's unit is 1/255 of it.
        density: Share of the map that may differ from zero, in (0, 1].
        seed: Of kernels and places.

    >>> Gabor(radius=12.5 / 255).seed
    0
    """

    radius: float | Tensor = 12.5 / 255
    density: float = 1 / 14
    seed: int = 0

    def __post_init__(self) -> None:
        check_radius(self.radius)
        if not 0 < self.density <= 1:
            raise InputError(f"density: expected a number in (0, 1], found {self.density}.")

    def around(self, images: Tensor, labels: Tensor, codes: Tensor | None = None) -> Region:
        """Noise on each image."""
        height, width = images.shape[-2:]
        keys = content_keys(images)
        places = randomness.uniform(self.seed, keys, (height, width), stream="gabor/places")
        mask = (places < self.density).to(images.dtype)
        filters = Filters.of(self._kernels(keys).to(images.dtype), height, width)
        return GaborRegion(
            images, column(self.radius, images), Ball.of("linf", 1.0, mask, -mask, mask), filters
        )

    def _kernels(self, keys: Tensor) -> Tensor:
        draw = randomness.uniform(
            self.seed, keys, (4,), stream="gabor/kernel", dtype=torch.float64
        ).T.contiguous()
        copies = 1 + (_COPIES * draw[3]).long()
        return gabor_kernels(0.1 + 0.3 * draw[0], 3 + 2.75 * draw[1], math.pi * draw[2], copies)
