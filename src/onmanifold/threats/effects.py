"""What the drawn threat models (fog, snow, Gabor noise) share: keys from the image itself, strength, filters."""

from __future__ import annotations

import functools
from abc import ABC
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from onmanifold.foundation import randomness
from onmanifold.foundation.errors import InputError
from onmanifold.threats.base import Ball, Region


@functools.lru_cache(maxsize=8)
def _multipliers(count: int) -> Tensor:
    """Fixed odd 60-bit multipliers, (count,) int64."""
    low, middle, high = randomness.integers(
        0, torch.arange(count), 2**20, (3,), stream="content"
    ).unbind(1)
    return (high << 41) | (middle << 21) | (low << 1) | 1


def content_keys(images: Tensor) -> Tensor:
    """A 64-bit hash of each image, rounded to 8 bits, (B,) int64.

    It stands in for a sample index where there is none: the same image has the same key in any batch, on any
    device, and in float32 and float64.

    Args:
        images: (B, C, H, W) in [0, 1].

    >>> key = content_keys(torch.full((1, 1, 2, 2), 0.5))
    >>> bool(key == content_keys(torch.full((3, 1, 2, 2), 0.5, dtype=torch.float64))[2])
    True
    """
    # Through float32 in any case: rounded from float64 a value near a half could fall on the other side.
    levels = (images.detach().float() * 255).round().to(torch.int64).flatten(1)
    # Integer sums wrap around and do not depend on their order.
    return ((levels + 1) * _multipliers(levels.shape[1]).to(levels.device)).sum(1)


def column(radius: float | Tensor, images: Tensor) -> Tensor:
    """The radius of each sample as (B, 1, 1, 1), to multiply images with.

    Raises:
        InputError: A radius per sample whose number is not that of the samples.
    """
    radii = torch.as_tensor(radius, dtype=images.dtype, device=images.device)
    if radii.ndim == 1 and len(radii) != len(images):
        raise InputError(f"radius: found {len(radii)} values for {len(images)} samples.")
    return radii.expand(len(images)).view(-1, 1, 1, 1)


class EffectRegion(Region, ABC):
    """Images under an effect that one variable shapes, and whose strength is the threat's radius.

    Args:
        images: (B, C, H, W), as `render` needs them.
        strength: (B, 1, 1, 1).
        ball: Where the variable may be.
    """

    variable: ClassVar[str]

    def __init__(self, images: Tensor, strength: Tensor, ball: Ball) -> None:
        self.images = images
        self.strength = strength
        self.balls = {self.variable: ball}

    def kept(self, mask: Tensor) -> tuple[Tensor, Tensor, Ball]:
        """Images, strength and ball of the selected samples."""
        return self.images[mask], self.strength[mask], self.balls[self.variable].keep(mask)


def centred_grid(size: int, images: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (size, 1) and columns (1, size) of a square kernel, in pixels from its centre, float64."""
    place = torch.arange(size, dtype=torch.float64, device=images.device) - (size - 1) / 2
    return place.unsqueeze(1), place.unsqueeze(0)


@dataclass(frozen=True)
class Filters:
    """A kernel for each sample, ready to be applied again and again; zeros lie outside the image.

    By Fourier transform: a kernel per sample is slow as a convolution with as many groups, and on GPUs its
    float32 would be rounded to TF32.

    Attributes:
        spectra: Transforms of the kernels, (B, ...) complex.
        size: Height and width of the kernels, odd.
    """

    spectra: Tensor
    size: int

    @staticmethod
    def of(kernels: Tensor, height: int, width: int) -> Filters:
        """From kernels (B, size, size), for images of that height and width."""
        size = kernels.shape[-1]
        full = (height + size - 1, width + size - 1)
        return Filters(torch.fft.rfft2(kernels, s=full), size)

    def __call__(self, values: Tensor) -> Tensor:
        """Each sample's values (B, H, W) convolved with its kernel, (B, H, W)."""
        height, width = values.shape[-2:]
        full = (height + self.size - 1, width + self.size - 1)
        spread: Tensor = torch.fft.irfft2(torch.fft.rfft2(values, s=full) * self.spectra, s=full)
        first = self.size // 2
        return spread[:, first : first + height, first : first + width]

    def __getitem__(self, mask: Tensor) -> Filters:
        return Filters(self.spectra[mask], self.size)
