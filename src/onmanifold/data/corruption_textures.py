"""Fog and frost, made and not photographed."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from scipy import ndimage

from onmanifold.foundation import randomness

Array = npt.NDArray[np.float32]

_SHEET, _PATCH = 1024, 128
# The photographs of the official files are shrunk to a fifth for 32 pixels; here, to a quarter.
_SHRINK = 4
_FERNS = 130
# Blue-white, as ice is.
_ICE = np.array([0.86, 0.94, 1.0], dtype=np.float32)


def plasma_side(height: int, width: int) -> int:
    """Side of the plasma field that covers an image: the next power of two."""
    side = 1
    while side < max(height, width):
        side *= 2
    return side


def plasma(chances: Array, decay: float) -> npt.NDArray[np.float64]:
    """Plasma fractals by the diamond-square algorithm (Fournier, Fussell and Carpenter 1982), on a torus.

    Args:
        chances: (B, S, S) uniform in [0, 1), S a power of two; one number for each place.
        decay: By how much the disturbance shrinks each time that the step is halved; large: smooth.

    Returns:
        (B, S, S) in [0, 1]; each field reaches both ends.
    """
    noise = 2 * chances.astype(np.float64) - 1
    fields = np.zeros_like(noise)
    step, scale = fields.shape[1], 1.0
    while step >= 2:
        half = step // 2
        corners = fields[:, ::step, ::step]
        squares = corners + np.roll(corners, -1, 1)
        squares = squares + np.roll(squares, -1, 2)
        middle = (slice(None), slice(half, None, step), slice(half, None, step))
        fields[middle] = squares / 4 + scale * noise[middle]
        # The places between two corners: the mean of those two and of the two middles beside them.
        beside = (
            ((slice(None), slice(0, None, step), slice(half, None, step)), 1, 2),
            ((slice(None), slice(half, None, step), slice(0, None, step)), 2, 1),
        )
        for place, across, along in beside:
            near = corners + np.roll(corners, -1, along)
            near = near + fields[middle] + np.roll(fields[middle], 1, across)
            fields[place] = near / 4 + scale * noise[place]
        # The disturbance's scale enters squared in the official files.
        step, scale = half, scale / decay**2
    fields -= fields.min(axis=(1, 2), keepdims=True)
    fields /= fields.max(axis=(1, 2), keepdims=True)
    return fields


@lru_cache(maxsize=2)
def frost_sheet(shrunk: bool) -> Array:
    """A frozen window pane, (3, S, S) in [0, 1], from which frost is cut: feathers of ice over an uneven film.

    It is drawn, from fixed random numbers; nothing is photographed.

    Args:
        shrunk: For small images: the same pane from further away.
    """
    if shrunk:
        sheet = frost_sheet(False)
        side = _SHEET // _SHRINK
        parts: Array = sheet.reshape(3, side, _SHRINK, side, _SHRINK).mean(axis=(2, 4))
        return parts
    chances = randomness.uniform(0, torch.arange(1), (_SHEET, _SHEET), stream="frost/film").numpy()
    film = plasma(chances, 1.35)[0]
    # Without its slow changes, so that every cut has thick and thin ice.
    film -= ndimage.uniform_filter(film, _PATCH, mode="wrap")
    film = np.clip(film / (3.5 * film.std()) + 0.5, 0, 1)
    ice = ndimage.gaussian_filter(_feathers().astype(np.float64), 1.0)
    brightness = 0.6 * film + ice * (0.35 + 0.65 * film)
    pane: Array = np.clip(brightness * _ICE[:, None, None], 0, 1).astype(np.float32)
    return pane


def _feathers() -> Array:
    """(S, S) brightness of the drawn crystals, in [0, 1]."""
    image = Image.new("L", (_SHEET, _SHEET))
    pen = ImageDraw.Draw(image)
    numbers = randomness.uniform(0, torch.arange(_FERNS), (6,), stream="frost/ferns").tolist()
    # The bright ones last, on top.
    for x, y, turn, length, bend, light in sorted(numbers, key=lambda fern: fern[5]):
        _feather(
            pen,
            (x * _SHEET, y * _SHEET),
            2 * math.pi * turn,
            150 + 250 * length,
            0.006 * (bend - 0.5),
            int(110 + 145 * light),
        )
    return np.asarray(image, dtype=np.float32) / np.float32(255)


def _feather(
    pen: ImageDraw.ImageDraw,
    start: tuple[float, float],
    angle: float,
    length: float,
    bend: float,
    light: int,
) -> None:
    """A bent stem with branches at sixty degrees on both sides, shorter towards the tip."""
    x, y = start
    spacing = 11.0
    for number in range(int(length / spacing)):
        end = (x + spacing * math.cos(angle), y + spacing * math.sin(angle))
        pen.line([(x, y), end], fill=light, width=9)
        reach = 0.3 * (length - number * spacing) * (0.7 + 0.3 * math.sin(2.4 * number))
        for side in (-math.pi / 3, math.pi / 3):
            tip = (
                end[0] + reach * math.cos(angle + side),
                end[1] + reach * math.sin(angle + side),
            )
            pen.line([end, tip], fill=int(0.8 * light), width=5)
        (x, y), angle = end, angle + bend * spacing
