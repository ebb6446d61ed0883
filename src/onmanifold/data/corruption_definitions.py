"""What each of the fifteen corruptions does (Hendrycks and Dietterich, ICLR 2019), and the official parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from onmanifold.data import corruption_kernels as kernels
from onmanifold.data.corruption_kernels import Array
from onmanifold.data.corruption_textures import frost_sheet, plasma, plasma_side
from onmanifold.foundation import randomness

SMALL = 64
"""Longest side in pixels up to which the parameters of CIFAR-10-C hold; above it, those of ImageNet-C."""


@dataclass(frozen=True)
class Draw:
    """Random numbers of some samples for one corruption."""

    seed: int
    indices: Tensor
    stream: str

    def uniform(self, purpose: str, *shape: int) -> Array:
        stream = f"{self.stream}/{purpose}"
        chances: Array = randomness.uniform(self.seed, self.indices, shape, stream=stream).numpy()
        return chances

    def normal(self, purpose: str, *shape: int) -> Array:
        stream = f"{self.stream}/{purpose}"
        numbers: Array = randomness.normal(self.seed, self.indices, shape, stream=stream).numpy()
        return numbers


Corrupt = Callable[[Array, Any, Draw], Any]
"""Images (B, C, H, W) in [0, 1] of 8 bits, parameters and random numbers to images of any range."""


def _gaussian_noise(images: Array, deviation: float, draw: Draw) -> Any:
    return images + deviation * draw.normal("noise", *images.shape[1:])


def _shot_noise(images: Array, photons: float, draw: Draw) -> Any:
    levels = np.rint(255 * images).astype(np.int64)
    chances = draw.uniform("photons", *images.shape[1:]).astype(np.float64)
    return kernels.poisson(levels, photons, chances) / photons


def _impulse_noise(images: Array, share: float, draw: Draw) -> Any:
    chances = draw.uniform("impulses", *images.shape[1:])
    return np.where(chances < share, np.where(chances < share / 2, 0.0, 1.0), images)


def _defocus_blur(images: Array, disk: tuple[float, float], draw: Draw) -> Any:
    return kernels.correlate(images, kernels.disk(*disk))


def _glass_blur(images: Array, glass: tuple[float, int, int], draw: Draw) -> Any:
    deviation, reach, passes = glass
    blurred = np.floor(255 * kernels.smooth(images, deviation) + 1e-3) / np.float32(255)
    chances = draw.uniform("offsets", 2, passes, *images.shape[2:])
    offsets = (chances * (2 * reach)).astype(np.int64) - reach
    return kernels.smooth(kernels.local_shuffle(blurred, offsets), deviation)


def _motion_blur(images: Array, line: tuple[int, float], draw: Draw) -> Any:
    return kernels.motion_blur(images, 90 * draw.uniform("angle") - 45, *line)


def _zoom_blur(images: Array, zoom: tuple[float, float], draw: Draw) -> Any:
    factors = tuple(np.arange(1, *zoom).tolist())
    return (images + kernels.zoomed(images, factors)) / (len(factors) + 1)


def _snow(images: Array, weather: tuple[float, ...], draw: Draw) -> Any:
    mean, deviation, zoom, threshold, radius, length, kept = weather
    flakes = mean + deviation * draw.normal("flakes", 1, *images.shape[2:])
    flakes = kernels.zoomed(flakes, (zoom,))
    flakes = np.floor(255 * np.clip(np.where(flakes < threshold, 0, flakes), 0, 1)) / 255
    falling = 90 * draw.uniform("angle") - 135
    flakes = kernels.motion_blur(flakes.astype(np.float32), falling, int(radius), length)
    whitened = np.maximum(images, 1.5 * kernels.grey(images) + 0.5)
    return kept * images + (1 - kept) * whitened + flakes + flakes[:, :, ::-1, ::-1]


def _frost(images: Array, mixture: tuple[float, float], draw: Draw) -> Any:
    count, channels, height, width = images.shape
    sheet = frost_sheet(max(height, width) <= SMALL)
    chances = draw.uniform("place", 4)
    panes = np.empty((count, 3, height, width), dtype=np.float32)
    for pane, (top, left, upright, sideways) in zip(panes, chances, strict=True):
        rows = int(top * max(sheet.shape[1] - height, 1)) + np.arange(height)
        columns = int(left * max(sheet.shape[2] - width, 1)) + np.arange(width)
        rows, columns = rows[:: 1 if upright < 0.5 else -1], columns[:: 1 if sideways < 0.5 else -1]
        # An image larger than the pane gets it several times.
        cut = sheet.take(rows, axis=1, mode="wrap").take(columns, axis=2, mode="wrap")
        pane[:] = cut
    return mixture[0] * images + mixture[1] * (kernels.grey(panes) if channels == 1 else panes)


def _fog(images: Array, weather: tuple[float, float], draw: Draw) -> Any:
    density, decay = weather
    height, width = images.shape[2:]
    side = plasma_side(height, width)
    fields = plasma(draw.uniform("plasma", side, side), decay)[:, None, :height, :width]
    brightest = images.max(axis=(1, 2, 3), keepdims=True).astype(np.float64)
    return (images + density * fields) * brightest / (brightest + density)


def _brightness(images: Array, shift: float, draw: Draw) -> Any:
    # Hue and saturation stay where all channels are scaled alike; black has neither and becomes grey.
    value = images.max(axis=1, keepdims=True)
    brighter = np.minimum(value + np.float32(shift), 1)
    return np.where(value > 0, images * (brighter / np.maximum(value, 1e-6)), brighter)


def _contrast(images: Array, factor: float, draw: Draw) -> Any:
    means = images.mean(axis=(2, 3), keepdims=True, dtype=np.float64)
    return (images - means) * factor + means


def _elastic_transform(images: Array, shares: tuple[float, float, float], draw: Draw) -> Any:
    height, width = images.shape[2:]
    size, deviation, corner = (share * min(height, width) for share in shares)
    down, right = np.mgrid[:height, :width].astype(np.float64)
    rows, columns = _moved_triangle(
        height, width, corner * (2 * draw.uniform("triangle", 3, 2) - 1)
    )
    images = kernels.warped(images, rows, columns, about_pixels=True)
    if size == 0:
        return images
    fields = 2 * draw.uniform("displacement", 2, height, width) - 1
    right_shift, down_shift = (
        size * kernels.smooth_field(fields[:, axis], deviation) for axis in (0, 1)
    )
    return kernels.warped(images, down + down_shift, right + right_shift, about_pixels=False)


def _moved_triangle(height: int, width: int, moves: Array) -> tuple[Any, Any]:
    """Rows and columns (B, H, W) to look at under the affine map that moves a triangle by ``moves`` (B, 3, 2)."""
    reach = min(height, width) // 3
    middle = np.array([width // 2, height // 2])
    triangle = middle + reach * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = triangle + moves.astype(np.float64)
    backwards = np.linalg.solve(
        np.concatenate([moved, np.ones_like(moved[:, :, :1])], axis=2),
        np.broadcast_to(triangle.astype(np.float64), moved.shape),
    )
    down, right = np.mgrid[:height, :width]
    # Written out, since a matrix product may round otherwise in another batch.
    columns, rows = (
        backwards[:, 0, axis, None, None] * right
        + backwards[:, 1, axis, None, None] * down
        + backwards[:, 2, axis, None, None]
        for axis in (0, 1)
    )
    return rows, columns


def _pixelate(images: Array, share: float, draw: Draw) -> Any:
    height, width = images.shape[2:]
    box = Image.Resampling.BOX
    coarse = (int(width * share), int(height * share))
    return _by_pillow(images, lambda image: image.resize(coarse, box).resize((width, height), box))


def _jpeg_compression(images: Array, quality: int, draw: Draw) -> Any:
    return _by_pillow(images, lambda image: kernels.as_jpeg(image, quality))


def _by_pillow(images: Array, change: Callable[[Image.Image], Image.Image]) -> Array:
    levels = np.rint(255 * images).astype(np.uint8)
    changed = [kernels.pixels_of(change(kernels.pillow(pixels))) for pixels in levels]
    return np.stack(changed).astype(np.float32) / np.float32(255)


# Sizes of the elastic transform are shares of the shorter side; those of ImageNet-C were given for 244 in place
# of 224 pixels.
_WIDER = 244 / 224

DEFINITIONS: dict[str, tuple[Corrupt, tuple[Any, ...], tuple[Any, ...]]] = {
    "gaussian_noise": (
        _gaussian_noise,  # deviation
        (0.04, 0.06, 0.08, 0.09, 0.10),
        (0.08, 0.12, 0.18, 0.26, 0.38),
    ),
    "shot_noise": (
        _shot_noise,  # photons in a white pixel
        (500, 250, 100, 75, 50),
        (60, 25, 12, 5, 3),
    ),
    "impulse_noise": (
        _impulse_noise,  # share of black or white values
        (0.01, 0.02, 0.03, 0.05, 0.07),
        (0.03, 0.06, 0.09, 0.17, 0.27),
    ),
    "defocus_blur": (
        _defocus_blur,  # radius of the disk, deviation of its edge
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    "glass_blur": (
        _glass_blur,  # deviation of the blur, reach of the shuffle, its passes
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    "motion_blur": (
        _motion_blur,  # radius of the line, deviation along it
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    ),
    "zoom_blur": (
        _zoom_blur,  # end of the zoom factors from 1 on, step between them
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    ),
    "snow": (
        _snow,  # mean, deviation, zoom and threshold of the flakes; their blur; share of the image's colours kept
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "frost": (
        _frost,  # share of the image, share of the ice
        ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    ),
    "fog": (
        _fog,  # density, smoothness
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    "brightness": (
        _brightness,  # added to the value of HSV
        (0.05, 0.1, 0.15, 0.2, 0.3),
        (0.1, 0.2, 0.3, 0.4, 0.5),
    ),
    "contrast": (
        _contrast,  # share of the contrast kept
        (0.75, 0.5, 0.4, 0.3, 0.15),
        (0.4, 0.3, 0.2, 0.1, 0.05),
    ),
    "elastic_transform": (
        _elastic_transform,  # size and smoothness of the displacement, movement of the triangle's corners
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        tuple(
            tuple(_WIDER * share for share in shares)
            for shares in (
                (2, 0.7, 0.1),
                (2, 0.08, 0.2),
                (0.05, 0.01, 0.02),
                (0.07, 0.01, 0.02),
                (0.12, 0.01, 0.02),
            )
        ),
    ),
    "pixelate": (
        _pixelate,  # share of the resolution kept
        (0.95, 0.9, 0.85, 0.75, 0.65),
        (0.6, 0.5, 0.4, 0.3, 0.25),
    ),
    "jpeg_compression": (
        _jpeg_compression,  # quality
        (80, 65, 58, 50, 40),
        (25, 18, 15, 10, 7),
    ),
}
"""Of each corruption what it does, its parameters at severities 1 to 5 in CIFAR-10-C, and those in ImageNet-C."""
