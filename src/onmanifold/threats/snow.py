"""Snow: motion-blurred flakes whose brightness the adversary chooses (Kang et al. 2019, arXiv:1908.08016)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from onmanifold.foundation import randomness
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.registry import THREATS
from onmanifold.threats.base import Ball, Region, Threat, Variables, check_radius
from onmanifold.threats.effects import EffectRegion, Filters, centred_grid, column, content_keys

_CELL = 4  # pixels; each layer has one flake per cell
_LAYERS = 7
_BUDGET = 0.2  # largest mean intensity of a block
_BLOCK = 2  # cells
_POWER = 4  # of the intensity, which leaves few bright flakes among many faint ones
_ACROSS = 0.6  # standard deviation of a flake across its path, in pixels
_LUMA = (0.299, 0.587, 0.114)


def intensities(flakes: Tensor) -> Tensor:
    """Intensities of flakes (B, 7, h, w) in [-1, 1]: exponential, no block's mean above the budget.

    Variables uniform in [-1, 1] give intensities exp(−u / budget), u uniform in [0, 1], whose mean is the
    budget. Where the mean over the layers and a block of cells is larger, the block is dimmed to it.
    """
    bright = torch.exp((flakes - 1) / (2 * _BUDGET))
    mean = functional.avg_pool2d(
        bright.mean(1, keepdim=True), _BLOCK, ceil_mode=True, count_include_pad=False
    )
    dimmed = (_BUDGET / mean).clamp(max=1)
    height, width = bright.shape[-2:]
    spread = dimmed.repeat_interleave(_BLOCK, 2).repeat_interleave(_BLOCK, 3)
    return bright * spread[:, :, :height, :width]


def _streaks(keys: Tensor, seed: int, size: int, images: Tensor) -> Tensor:
    """How a flake is blurred in each image, (B, size, size): 1 at its centre, along a direction of its own."""
    share = randomness.uniform(seed, keys, (1, 1), stream="snow/wind", dtype=torch.float64)
    # Snow falls: within 45 degrees of straight down.
    angle = (share - 0.5) * (math.pi / 2)
    rows, columns = centred_grid(size, images)
    along = rows * angle.cos() + columns * angle.sin()
    across = columns * angle.cos() - rows * angle.sin()
    exponent = (along / (size / 4)).square() + (across / _ACROSS).square()
    return torch.exp(-exponent / 2).to(images.dtype)


def _slots(keys: Tensor, seed: int) -> Tensor:
    """Which layer has its flake at each of the 16 places of a cell, (B, 16); 7: none."""
    draw = randomness.uniform(seed, keys, (_CELL**2,), stream="snow/places")
    return draw.argsort(dim=1, stable=True).clamp(max=_LAYERS)


def _whitened(images: Tensor, strength: Tensor) -> Tensor:
    """Images paled as by a snowy sky, fully from strength 1 on."""
    weights = images.new_tensor(_LUMA if images.shape[1] == 3 else [1 / images.shape[1]])
    grey = (images * weights.view(1, -1, 1, 1)).sum(1, keepdim=True)
    if images.shape[1] == 1:
        grey = images
    paled = torch.maximum(images, 1.5 * grey + 0.5)
    return (images + 0.25 * strength.clamp(max=1) * (paled - images)).clamp(0, 1)


class SnowRegion(EffectRegion):
    """Snow in front of a batch; the variable "flakes" (B, 7, h, w) decides how bright each flake is."""

    variable: ClassVar[str] = "flakes"

    def __init__(
        self, images: Tensor, strength: Tensor, ball: Ball, slots: Tensor, streaks: Filters
    ) -> None:
        super().__init__(images, strength, ball)
        self.slots = slots
        self.streaks = streaks

    def render(self, variables: Variables) -> Tensor:
        """The whitened images behind the flakes."""
        flakes = intensities(variables["flakes"]) ** _POWER
        layers = torch.cat([flakes, torch.zeros_like(flakes[:, :1])], 1)
        slots = self.slots.view(-1, _CELL**2, 1, 1).expand(-1, -1, *flakes.shape[-2:])
        dots = functional.pixel_shuffle(layers.gather(1, slots), _CELL)
        # Rounding of the transform may leave a clear sky at -1e-8.
        snow = self.streaks(dots.squeeze(1)).clamp(min=0)
        height, width = self.images.shape[-2:]
        # Flakes cover what is behind them: the sum of flakes and image while faint, never above 1.
        cover = -torch.expm1(-self.strength * snow[:, :height, :width].unsqueeze(1))
        return self.images + (1 - self.images) * cover

    def keep(self, mask: Tensor) -> SnowRegion:
        """The region of the selected samples."""
        return SnowRegion(*self.kept(mask), self.slots[mask], self.streaks[mask])


@THREATS.register("snow")
@dataclass(frozen=True)
class Snow(Threat):
    """Falling snow: flakes of chosen brightness on a lattice, blurred along one direction per image.

    There are seven layers with one flake per 4×4 pixels each; where in a cell a layer has its flakes, and the
    direction in which they fall, follow from the image's content and ``seed``. The variables, one per flake,
    are in a fixed linf ball of radius 1: −1 is no flake, 1 the brightest; a flake adds radius · intensity⁴ at
    its centre, and the mean intensity of each block of 8×8 pixels is at most 0.2. The image is also whitened
    by min(1, radius) · 0.25 towards max(x, 1.5 · grey + 0.5). Zero variables are very faint snow, not the
    image itself, unless the radius is 0.

    Attributes:
        radius: Strength: brightness of one full flake on black, in units of the [0, 1] image, where it is
            small; a number, or (B,) one per sample.
        blur: Odd length of a flake's path in pixels; None: 13 on images of 224 pixels, in proportion on
            others, at least 5.
        seed: Of the layout and the direction.

    >>> Snow(radius=0.5).blur is None
    True
    """

    radius: float | Tensor = 0.5
    blur: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_radius(self.radius)
        if self.blur is not None and (self.blur < 1 or self.blur % 2 == 0):
            raise InputError(f"blur: expected an odd number of pixels, found {self.blur}.")

    def around(self, images: Tensor, labels: Tensor, codes: Tensor | None = None) -> Region:
        """Snow in front of each image."""
        height, width = (math.ceil(side / _CELL) for side in images.shape[-2:])
        keys = content_keys(images)
        streaks = _streaks(keys, self.seed, self._length(images), images)
        strength = column(self.radius, images)
        flakes = images.new_zeros(len(images), _LAYERS, height, width)
        return SnowRegion(
            _whitened(images, strength),
            strength,
            Ball.of("linf", 1.0, flakes),
            _slots(keys, self.seed),
            Filters.of(streaks, _CELL * height, _CELL * width),
        )

    def _length(self, images: Tensor) -> int:
        if self.blur is not None:
            return self.blur
        length = 13 * math.sqrt(images.shape[-2] * images.shape[-1]) / 224
        return max(5, 2 * round((length - 1) / 2) + 1)
