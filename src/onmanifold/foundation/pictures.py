"""A plain grid of images as PNG, for a quick look."""

from __future__ import annotations

import io

import torch
from torch import Tensor

from onmanifold.foundation.checks import check_images
from onmanifold.foundation.errors import InputError

# Told apart from black and from white images.
_GROUND = 144


def image_grid(images: Tensor, columns: int, scale: int = 2, gap: int = 2) -> bytes:
    """A grid of images as a PNG file, row by row; the last row may have empty places.

    Args:
        images: (N, C, H, W) in [0, 1], grey (C = 1) or colour (C = 3), at least one.
        columns: Images in a row.
        scale: Side in the picture of one pixel, which stays a sharp square.
        gap: Pixels of the picture between the images and around them.

    Raises:
        InputError: No images, values outside [0, 1], another number of channels, or a number out of its range.

    >>> image_grid(torch.zeros(3, 1, 4, 4), columns=2)[1:4]
    b'PNG'
    """
    from PIL import Image

    for name, value, least in (("columns", columns, 1), ("scale", scale, 1), ("gap", gap, 0)):
        if value < least:
            raise InputError(f"{name}: expected at least {least}, found {value}.")
    pixels = _as_bytes(check_images(images)).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    count, height, width, channels = pixels.shape
    down, across = height + gap, width + gap
    rows, columns = -(-count // columns), min(columns, count)
    shape = (gap + rows * down, gap + columns * across, channels)
    canvas = torch.full(shape, _GROUND, dtype=torch.uint8)
    for number, picture in enumerate(pixels):
        top, left = gap + number // columns * down, gap + number % columns * across
        canvas[top : top + height, left : left + width] = picture
    buffer = io.BytesIO()
    Image.fromarray(canvas.numpy().squeeze(-1) if channels == 1 else canvas.numpy()).save(
        buffer, format="PNG"
    )
    return buffer.getvalue()


def _as_bytes(images: Tensor) -> Tensor:
    """Images as uint8 (N, H, W, C) on the CPU, rounded to the nearest."""
    if len(images) == 0 or images.shape[1] not in (1, 3):
        raise InputError(
            f"images: expected at least one of 1 or 3 channels, found {tuple(images.shape)}."
        )
    return images.detach().mul(255).round().byte().permute(0, 2, 3, 1).cpu()
