"""JPEG: perturbed coefficients of the JPEG transform (Shin and Song 2017; Kang et al. 2019)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from onmanifold.foundation.errors import InputError
from onmanifold.foundation.registry import THREATS
from onmanifold.threats.base import Ball, Region, Threat, Variables, check_radius
from onmanifold.threats.geometry import Norm

_BLOCK = 8
# Quantisation tables of ITU-T T.81, annex K, at factor 1 (quality 50), row by row of vertical frequency.
LUMA_TABLE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMA_TABLE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
# How red, green and blue follow from luma and the two chroma differences (JFIF).
_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))


def waves(table: tuple[tuple[int, ...], ...]) -> Tensor:
    """What a quantisation step of each coefficient adds to a block, (64 coefficients, 64 pixels of [0, 1])."""
    frequency = torch.arange(_BLOCK, dtype=torch.float64)
    transform = torch.cos((2 * frequency + 1) * frequency.unsqueeze(1) * math.pi / (2 * _BLOCK))
    transform = transform * math.sqrt(2 / _BLOCK)
    transform[0] /= math.sqrt(2)
    steps = torch.tensor(table, dtype=torch.float64).flatten().unsqueeze(1)
    return torch.kron(transform, transform) * steps / 255


class Plane(NamedTuple):
    """One of the planes that an image is coded in.

    Attributes:
        rows: Number of blocks from top to bottom.
        columns: Number of blocks from left to right.
        waves: Of its quantisation table.
    """

    rows: int
    columns: int
    waves: Tensor

    @property
    def coefficients(self) -> int:
        """Number of coefficients."""
        return self.rows * self.columns * _BLOCK**2

    def pixels(self, values: Tensor) -> Tensor:
        """Coefficients (B, coefficients) in quantisation steps to pixels (B, 8 rows, 8 columns)."""
        blocks = values.reshape(-1, _BLOCK**2) @ self.waves
        blocks = blocks.view(-1, self.rows, self.columns, _BLOCK, _BLOCK).transpose(2, 3)
        return blocks.reshape(-1, self.rows * _BLOCK, self.columns * _BLOCK)


def planes(images: Tensor) -> tuple[Plane, ...]:
    """The planes of images: luma, and for colour two of chroma at half its resolution (4:2:0)."""
    height, width = images.shape[-2:]
    luma, chroma = (waves(table).to(images) for table in (LUMA_TABLE, CHROMA_TABLE))
    if images.shape[1] == 1:
        return (Plane(math.ceil(height / _BLOCK), math.ceil(width / _BLOCK), luma),)
    rows, columns = (math.ceil(side / (2 * _BLOCK)) for side in (height, width))
    difference = Plane(rows, columns, chroma)
    return (Plane(2 * rows, 2 * columns, luma), difference, difference)


class JPEGRegion(Region):
    """Changed coefficients of a batch; the variable "coefficients" is (B, those of all planes)."""

    def __init__(self, images: Tensor, ball: Ball, coded: tuple[Plane, ...]) -> None:
        self.images = images
        self.balls = {"coefficients": ball}
        self.planes = coded

    def render(self, variables: Variables) -> Tensor:
        """The images whose coefficients have changed, clipped to [0, 1]."""
        counts = [plane.coefficients for plane in self.planes]
        parts = torch.split(variables["coefficients"], counts, dim=1)
        luma, *chroma = (plane.pixels(part) for plane, part in zip(self.planes, parts, strict=True))
        change = luma.unsqueeze(1)
        if chroma:
            fine = functional.interpolate(torch.stack(chroma, 1), scale_factor=2, mode="nearest")
            blue, red = fine.unbind(1)
            change = torch.stack([y * luma + b * blue + r * red for y, b, r in _TO_RGB], 1)
        height, width = self.images.shape[-2:]
        return (self.images + change[:, :, :height, :width]).clamp(0, 1)

    def keep(self, mask: Tensor) -> JPEGRegion:
        """The region of the selected samples."""
        ball = self.balls["coefficients"].keep(mask)
        return JPEGRegion(self.images[mask], ball, self.planes)


@THREATS.register("jpeg")
@dataclass(frozen=True)
class JPEG(Threat):
    """Images whose JPEG coefficients lie in a norm ball around those of the image.

    The transform is that of JPEG: YCbCr with chroma at half the resolution (4:2:0), cosine transform of 8×8
    blocks, division by the standard quantisation tables at factor 1; grey images have luma alone. Nothing is
    rounded. Coding is then linear, so that the image with changed coefficients is the image plus the decoded
    change: what the coarse chroma could not hold of an image stays, and zero change is the image itself. For
    the same reason it does not matter what sides that are no multiples of 16 are padded with.

    Attributes:
        norm: "linf", "l2" or "l1" over all coefficients of an image.
        radius: In quantisation steps: a number, or (B,) one per sample.
        limit: Largest change of one coefficient, in quantisation steps; None: 2 for l1, else none.

    >>> JPEG(norm="l1", radius=64.0).limit is None
    True
    """

    norm: Norm = "linf"
    radius: float | Tensor = 0.5
    limit: float | None = None

    def __post_init__(self) -> None:
        check_radius(self.radius)
        if self.limit is not None and not self.limit >= 0:
            raise InputError(f"limit: expected a number >= 0, found {self.limit}.")

    def around(self, images: Tensor, labels: Tensor, codes: Tensor | None = None) -> Region:
        """Changed coefficients of each image.

        Raises:
            InputError: Images of neither 1 nor 3 channels.
        """
        if images.shape[1] not in (1, 3):
            raise InputError(f"images: expected 1 or 3 channels, found {images.shape[1]}.")
        coded = planes(images)
        still = images.new_zeros(len(images), sum(plane.coefficients for plane in coded))
        limit = 2.0 if self.limit is None and self.norm == "l1" else self.limit
        edge = None if limit is None else torch.full_like(still, limit)
        ball = Ball.of(self.norm, self.radius, still, None if edge is None else -edge, edge)
        return JPEGRegion(images, ball, coded)
