"""What the corruptions are made of: filters, zooms, shuffles and warps of whole batches.

Each sample of a batch is treated by itself, in the same order of operations, so that its result does not depend
on its batch.
"""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from scipy import ndimage, sparse, special
from torch.nn import functional

Array = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

# Weights of red, green and blue in the brightness of a pixel (ITU-R BT.601).
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def grey(images: Array) -> Array:
    """(B, 1, H, W) brightness of (B, C, H, W) images."""
    if images.shape[1] == 1:
        return images
    weighted: Array = (images * _LUMA[:, None, None]).sum(axis=1, keepdims=True)
    return weighted


def pillow(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    """(C, H, W) pixels as a Pillow image, grey or RGB."""
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def pixels_of(image: Image.Image) -> npt.NDArray[np.uint8]:
    """A Pillow image as (C, H, W) pixels."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    """An image as it comes back from a JPEG file."""
    file = BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def poisson(rates: Integers, scale: float, chances: npt.NDArray[np.float64]) -> Integers:
    """Poisson counts of the rates ``rates / 255 * scale``, by inversion.

    Args:
        rates: 0 to 255, of any shape.
        scale: Expected count at 255.
        chances: Uniform in [0, 1), of the shape of ``rates``.
    """
    table = _poisson_table(scale)
    places = np.searchsorted(table.ravel(), rates + chances, side="right")
    counts: Integers = places - rates * table.shape[1]
    return counts


@lru_cache(maxsize=8)
def _poisson_table(scale: float) -> npt.NDArray[np.float64]:
    """(256, K): the level plus the distribution function of its rate, so that one sorted list holds all levels."""
    counts = np.arange(int(scale + 8 * np.sqrt(scale) + 12))
    levels = np.arange(256.0)[:, None]
    table: npt.NDArray[np.float64] = special.pdtr(counts, levels / 255 * scale)
    table[:, -1] = 1
    return table + levels


@lru_cache(maxsize=16)
def disk(radius: float, deviation: float) -> Array:
    """(K, K) weights of a disk of that radius in pixels, its edge smoothed by a Gaussian of that deviation."""
    reach = 8 if radius <= 8 else int(radius)
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    inside = (rows**2 + columns**2 <= radius**2).astype(np.float64)
    steps = np.arange(-1, 2) if radius <= 8 else np.arange(-2, 3)
    taps = np.exp(-(steps**2) / (2 * deviation**2))
    taps /= taps.sum()
    for axis in (0, 1):
        inside = ndimage.correlate1d(inside, taps, axis, mode="mirror")
    weights: Array = (inside / inside.sum()).astype(np.float32)
    return weights


def correlate(images: Array, weights: Array) -> Array:
    """Images filtered by (K, K) weights, K odd; the border is mirrored about the outermost pixels."""
    reach = len(weights) // 2
    height, width = images.shape[2:]
    used = np.argwhere(weights > 1e-7)
    # No wider a border than the weights need: many of the disk's are zero.
    margin = int(np.abs(used - reach).max())
    padded = np.pad(images, ((0, 0), (0, 0), (margin, margin), (margin, margin)), mode="reflect")
    result = np.zeros_like(images)
    for row, column in used:
        top, left = row - reach + margin, column - reach + margin
        result += weights[row, column] * padded[:, :, top : top + height, left : left + width]
    return result


def smooth(images: Array, deviation: float) -> Array:
    """Gaussian blur of (B, C, H, W) images, cut at four deviations; the border pixels go on outside."""
    blurred: Array = ndimage.gaussian_filter(
        images, deviation, mode="nearest", truncate=4.0, axes=(2, 3)
    )
    return blurred


def smooth_field(fields: Array, deviation: float) -> npt.NDArray[np.float64]:
    """Gaussian blur of (B, H, W) fields, cut at three deviations; the border is mirrored about the edge."""
    # As matrices, one product per sample: the deviation may be as wide as the field, and a filter then slow.
    height, width = (_smoothing(side, deviation) for side in fields.shape[1:])
    return height @ fields.astype(np.float64) @ width.T


@lru_cache(maxsize=8)
def _smoothing(side: int, deviation: float) -> npt.NDArray[np.float64]:
    matrix: npt.NDArray[np.float64] = ndimage.gaussian_filter1d(
        np.eye(side), deviation, axis=0, mode="reflect", truncate=3.0
    )
    return matrix


def motion_blur(images: Array, angles: Array, radius: int, deviation: float) -> Array:
    """Blur along a half line from each pixel, with the weights of half a Gaussian, as ImageMagick defines it.

    Args:
        images: (B, C, H, W).
        angles: (B,) in degrees, clockwise from the right.
        radius: The line has ``2 * radius + 1`` pixels.
        deviation: Of the Gaussian, in pixels.
    """
    count, _, height, width = images.shape
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * deviation**2))
    weights = (weights / weights.sum()).astype(np.float32)
    turns = np.deg2rad(angles.astype(np.float64))[:, None]
    right = np.ceil(steps * np.cos(turns) - 0.5).astype(np.int64)
    down = np.ceil(steps * np.sin(turns) - 0.5).astype(np.int64)
    margin = 2 * radius + 1
    result = np.zeros_like(images)
    for sample in range(count):
        padded = np.pad(images[sample], ((0, 0), (margin, margin), (margin, margin)), mode="edge")
        for weight, x, y in zip(
            weights, margin + right[sample], margin + down[sample], strict=True
        ):
            if weight > 1e-6:
                result[sample] += weight * padded[:, y : y + height, x : x + width]
    return result


def zoomed(images: Array, factors: tuple[float, ...]) -> Array:
    """The sum of the images zoomed in about their middle by each of the factors (at least 1), bilinearly."""
    count, channels, height, width = images.shape
    columns = np.ascontiguousarray(images.reshape(count * channels, height * width).T)
    result: Array = _zoom_operator(height, width, factors) @ columns
    return np.ascontiguousarray(result.T).reshape(images.shape)


# One is enough: settings are run one after the other, and those of large images take much memory.
@lru_cache(maxsize=1)
def _zoom_operator(height: int, width: int, factors: tuple[float, ...]) -> Any:
    """Sparse (HW, HW) matrix of `zoomed`."""
    parts = (sparse.kron(_zoom(height, z), _zoom(width, z), format="csr") for z in factors)
    return sum(parts, sparse.csr_array((height * width, height * width))).astype(np.float32)


def _zoom(side: int, factor: float) -> Any:
    """Sparse (side, side) matrix that stretches the middle of a line over the whole of it."""
    kept = int(np.ceil(side / factor))
    first = (side - kept) // 2
    stretched = round(kept * factor)
    cut = (stretched - side) // 2
    places = (np.arange(side) + cut) * (kept - 1) / max(stretched - 1, 1)
    low = np.minimum(places.astype(np.int64), max(kept - 2, 0))
    share = places - low
    rows = np.concatenate([np.arange(side)] * 2)
    columns = first + np.concatenate([low, np.minimum(low + 1, kept - 1)])
    return sparse.csr_array((np.concatenate([1 - share, share]), (rows, columns)), (side, side))


def local_shuffle(images: Array, offsets: Integers) -> Array:
    """Each pixel replaced by one near it, from the last pixel to the first, again and again.

    Pixels are overwritten one after the other, so that one may receive what its neighbour has just received.
    The official files were made so: what was meant as a swap of two pixels copies one over the other.

    Args:
        images: (B, C, H, W).
        offsets: (B, 2, T, H, W) rows and columns from -D to D - 1, for each of T passes. The outermost D pixels
            (one more at the top and the left) stay.
    """
    count, channels, height, width = images.shape
    order = np.broadcast_to(np.arange(height * width), (count, height * width))
    for number in range(offsets.shape[2]):
        source = _sources(offsets[:, :, number])
        order = np.take_along_axis(order, source, axis=1)
    flat = images.reshape(count, channels, -1)
    return np.take_along_axis(flat, order[:, None], axis=2).reshape(images.shape)


def _sources(offsets: Integers) -> Integers:
    """(B, HW): from which place of the image before a pass each pixel of the image after it comes."""
    count, _, height, width = offsets.shape
    reach = max(-int(offsets.min()), 1)
    places = np.arange(height * width).reshape(height, width)
    moving = np.zeros((height, width), dtype=bool)
    moving[reach + 1 : height - reach + 1, reach + 1 : width - reach + 1] = True
    shift = offsets[:, 0] * width + offsets[:, 1]
    source = np.where(moving, places + shift, places).reshape(count, -1)
    # A source behind the pixel has been overwritten already, with what its own source had: such a chain of
    # pixels is followed to its end in steps of double length.
    behind = (source > places.ravel()) & moving.ravel()[source]
    end = np.where(behind, source, places.ravel())
    while True:
        further = np.take_along_axis(end, end, axis=1)
        if np.array_equal(further, end):
            return np.take_along_axis(source, end, axis=1)
        end = further


def warped(images: Array, rows: Array, columns: Array, *, about_pixels: bool) -> Array:
    """Images sampled bilinearly at places given in pixels.

    Args:
        images: (B, C, H, W).
        rows: (B, H, W) where to look, downwards from the first pixel.
        columns: (B, H, W), to the right.
        about_pixels: Whether the outside mirrors the inside about the outermost pixels, or about their edges.
    """
    height, width = images.shape[2:]
    if about_pixels:
        columns, rows = 2 * columns / (width - 1) - 1, 2 * rows / (height - 1) - 1
    else:
        columns, rows = (2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1
    grid = torch.from_numpy(np.stack([columns, rows], axis=3).astype(np.float32))
    sampled = functional.grid_sample(
        torch.from_numpy(np.ascontiguousarray(images)),
        grid,
        padding_mode="reflection",
        align_corners=about_pixels,
    )
    result: Array = sampled.numpy()
    return result
