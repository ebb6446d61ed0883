"""FONTS: letters of many fonts under affine transformations, a manifold that is known exactly.

Disentangling sections 3.1 and B.1: the letters "A" to "J" are rendered once per font; a spatial transformer
with six parameters turns such a prototype into an image.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from onmanifold.data.dataset import Dataset
from onmanifold.data.fonts import LETTERS, load_fonts
from onmanifold.foundation.errors import DataError, InputError
from onmanifold.foundation.randomness import integers, permutation, uniform
from onmanifold.foundation.registry import DATASETS, MANIFOLDS
from onmanifold.manifolds.affine import affine_matrix, push_warp, warp
from onmanifold.manifolds.base import Chart, Manifold
from onmanifold.manifolds.identify import identify

Variant = Literal["hard", "moderate", "easy"]

PARAMETERS = ("t_x", "t_y", "shear_x", "shear_y", "scale", "rotation")


def _ranges(
    translation: float, shear: float, scale: tuple[float, float], rotation: float
) -> tuple[tuple[float, float], ...]:
    moved, sheared, turned = (-translation, translation), (-shear, shear), (-rotation, rotation)
    return (moved, moved, sheared, sheared, scale, turned)


RANGES: dict[Variant, tuple[tuple[float, float], ...]] = {
    "hard": _ranges(0.2, 0.5, (0.75, 1.15), math.pi / 2),
    "moderate": _ranges(0.2, 0.4, (0.85, 1.15), math.pi / 3),
    "easy": _ranges(0.1, 0.2, (0.9, 1.1), math.pi / 6),
}
"""Lowest and highest value of each parameter; "hard" is the paper's FONTS, the others are the authors' code's."""


class FontsChart(Chart):
    """The transformations of given letters; the prototypes are gathered once."""

    manifold: FontsManifold

    def __init__(
        self, manifold: FontsManifold, latents: Tensor, fixed: Tensor, letters: Tensor
    ) -> None:
        self.manifold = manifold
        self.latents = latents
        self.fixed = fixed
        self.letters = letters

    def decode(self, latents: Tensor) -> Tensor:
        matrix = affine_matrix(self.manifold.parameters_of(latents))
        images = warp(self.letters.to(latents.dtype), matrix)
        # Bilinear values of [0, 1] pixels leave [0, 1] by rounding alone. That is cut off in place and
        # outside autograd: its true gradient is the identity, and it costs half of a step otherwise.
        images.detach().clamp_(0, 1)
        return images

    def push(self, latents: Tensor, directions: Tensor) -> Tensor:
        def matrix(moving: Tensor) -> Tensor:
            return affine_matrix(self.manifold.parameters_of(moving))

        pushed = torch.func.jvp(matrix, (latents,), (directions,))
        letters = self.letters.to(latents.dtype)
        return push_warp(letters, pushed[0].detach(), pushed[1].detach())

    def keep(self, mask: Tensor) -> Chart:
        return FontsChart(self.manifold, self.latents[mask], self.fixed[mask], self.letters[mask])


class FontsManifold(Manifold):
    """The differentiable decoder of FONTS (Disentangling eq. 6).

    A code is (t_x, t_y, shear_x, shear_y, scale, rotation; font; class): six latents in [-1, 1], each the
    position of its parameter in its range, then the numbers of font and class.

    Args:
        prototypes: (F, K, H, W) uint8, the letters.
        ranges: Lowest and highest value of each of the six parameters.
        font_names: F names.
    """

    name = "fonts"
    exact = True
    code_size = 8
    latent_size = 6
    box = 1.0
    prototypes: Tensor
    centres: Tensor
    half_ranges: Tensor

    def __init__(
        self,
        prototypes: Tensor,
        ranges: tuple[tuple[float, float], ...] = RANGES["hard"],
        font_names: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        if prototypes.dtype != torch.uint8 or prototypes.ndim != 4 or not len(prototypes):
            raise InputError(
                "prototypes: expected uint8 (F, K, H, W) with at least one font, "
                f"found {prototypes.dtype} {tuple(prototypes.shape)}."
            )
        bounds = torch.tensor(ranges, dtype=torch.float64)
        if tuple(bounds.shape) != (6, 2) or not bool((bounds[:, 0] < bounds[:, 1]).all()):
            raise InputError(f"ranges: expected six pairs (lowest, highest), found {ranges}.")
        if font_names and len(font_names) != len(prototypes):
            raise InputError(f"font_names: found {len(font_names)} for {len(prototypes)} fonts.")
        self.font_names = tuple(font_names) or tuple(map(str, range(len(prototypes))))
        self.ranges = tuple((float(low), float(high)) for low, high in ranges)
        self.image_shape = (1, *prototypes.shape[2:])
        self.register_buffer("prototypes", prototypes)
        self.register_buffer("centres", bounds.mean(dim=1))
        self.register_buffer("half_ranges", (bounds[:, 1] - bounds[:, 0]) / 2)
        self.spec = {
            "type": "letters",
            "shape": list(prototypes.shape),
            "ranges": [list(pair) for pair in self.ranges],
            "font_names": list(self.font_names),
        }

    @property
    def fingerprint(self) -> str:
        digest = hashlib.blake2b(repr(self.ranges).encode(), digest_size=12)
        digest.update(self.prototypes.numpy(force=True).tobytes())
        return f"fonts-{digest.hexdigest()}"

    @property
    def num_fonts(self) -> int:
        """F."""
        return len(self.prototypes)

    @property
    def num_classes(self) -> int:
        """K."""
        return self.prototypes.shape[1]

    def parameters_of(self, latents: Tensor) -> Tensor:
        """The six parameters of eq. 6 at latents (B, 6), in their own units."""
        return self.centres.to(latents.dtype) + latents * self.half_ranges.to(latents.dtype)

    def decode(self, codes: Tensor) -> Tensor:
        chart = self.chart(codes)
        return chart.decode(chart.latents)

    def chart(self, codes: Tensor) -> FontsChart:
        self.check_codes(codes, len(codes))
        self.to(codes.device)
        fixed = codes[:, self.latent_size :].detach()
        numbers = fixed.long()
        limits = numbers.new_tensor([self.num_fonts, self.num_classes])
        if not bool(((numbers >= 0) & (numbers < limits) & (numbers == fixed)).all()):
            raise InputError(
                "codes: expected a font number below "
                f"{self.num_fonts} and a class below {self.num_classes} in the last two columns."
            )
        letters = self.prototypes[numbers[:, 0], numbers[:, 1]].unsqueeze(1).to(codes.dtype) / 255
        return FontsChart(self, codes[:, : self.latent_size], fixed, letters)

    def encode(self, images: Tensor, labels: Tensor) -> Tensor:
        """Codes of images of which neither font nor transformation is known, by search.

        Datasets of FONTS carry their codes; this is for images from elsewhere. It takes some tenths of a
        second for each, and finds a near image but not always the very font.
        """
        return identify(self, self.num_fonts, self.num_classes, images, labels)

    def sample_codes(self, labels: Tensor, seed: int = 0, indices: Tensor | None = None) -> Tensor:
        """Codes of random fonts and transformations, of the classes ``labels`` (B,); see `Manifold`."""
        indices = torch.arange(len(labels), device=labels.device) if indices is None else indices
        latents = 2 * uniform(seed, indices, (self.latent_size,), stream="codes") - 1
        font = integers(seed, indices, self.num_fonts, stream="codes/font")
        return torch.cat([latents, font.unsqueeze(1), labels.unsqueeze(1)], dim=1)


@MANIFOLDS.register("letters")
def letters_manifold(
    shape: tuple[int, int, int, int],
    ranges: tuple[tuple[float, float], ...] = RANGES["hard"],
    font_names: tuple[str, ...] = (),
) -> FontsManifold:
    """Empty letters, whose prototypes come from a file: what a saved FONTS manifold is rebuilt from."""
    return FontsManifold(torch.zeros(shape, dtype=torch.uint8), ranges, font_names)


@MANIFOLDS.register("fonts")
def fonts_manifold(folder: str | Path | None = None, variant: Variant = "hard") -> FontsManifold:
    """The manifold of the FONTS dataset with the same options.

    Args:
        folder: Of .ttf and .otf files; None: ``$ONMANIFOLD_DATA/fonts`` if it exists, else the fonts inside
            matplotlib.
        variant: How far letters are transformed: "hard", "moderate" or "easy"; see `RANGES`.

    Raises:
        DataError: The folder does not exist, or has no usable font.
    """
    if variant not in RANGES:
        raise InputError(f"variant: expected one of {', '.join(RANGES)}, found {variant!r}.")
    fonts = load_fonts(folder)
    prototypes = torch.from_numpy(np.array(fonts.prototypes))
    return FontsManifold(prototypes, RANGES[variant], fonts.names)


TEST_SHARE = 0.2
"""Share of the fonts that only the test set has, with ``distinct_fonts``."""

_SIZES = {"train": 20_000, "test": 2_000}
# Raise when the same options come to draw other images.
_DRAWING = 1


@DATASETS.register("fonts")
def load_fonts_dataset(
    split: Literal["train", "test"],
    size: int | None = None,
    seed: int = 0,
    distinct_fonts: bool = False,
    folder: str | Path | None = None,
    variant: Variant = "hard",
) -> Dataset:
    """Images drawn from FONTS with their codes: letters in turns, fonts and transformations at random.

    Sample i depends on (seed, split, i) alone, so that a larger set begins with the smaller one. The images
    are exactly ``fonts_manifold(folder, variant).decode(codes)``.

    Args:
        split: "train" or "test". They share no (font, class, transformation), whatever the seeds.
        size: Number of images; None: 20,000 or 2,000.
        seed: Which sample of the manifold.
        distinct_fonts: Whether the two splits share no font either; a fifth of the fonts, chosen by ``seed``,
            is for testing.
        folder: As for `fonts_manifold`.
        variant: As for `fonts_manifold`.

    Raises:
        DataError: The folder does not exist, or has no usable font (two with ``distinct_fonts``).
        InputError: A size below 1, or an unknown split or variant.
    """
    if split not in _SIZES:
        raise InputError(f"split: expected 'train' or 'test', found {split!r}.")
    size = _SIZES[split] if size is None else size
    if size < 1:
        raise InputError(f"size: expected at least 1, found {size}.")
    manifold = fonts_manifold(folder, variant)
    fonts = torch.arange(manifold.num_fonts)
    if distinct_fonts:
        fonts = _fonts_of(split, manifold.num_fonts, seed)
    codes = _draw_codes(split, size, seed, fonts, manifold.num_classes)
    images = torch.empty(size, *manifold.image_shape)
    with torch.no_grad():
        for start in range(0, size, 4096):
            images[start : start + 4096] = manifold.decode(codes[start : start + 4096])
    facts = (_DRAWING, manifold.fingerprint, split, size, seed, distinct_fonts)
    return Dataset(
        name="fonts",
        images=images,
        labels=codes[:, -1].long(),
        classes=tuple(LETTERS),
        fingerprint=f"fonts-{hashlib.blake2b(repr(facts).encode(), digest_size=12).hexdigest()}",
        codes=codes,
    )


def _fonts_of(split: str, count: int, seed: int) -> Tensor:
    """The numbers of the fonts that a split has to itself."""
    if count < 2:
        raise DataError(f"distinct_fonts needs at least 2 usable fonts, found {count}.")
    order = permutation(seed, count, stream="fonts/distinct")
    tested = max(1, round(TEST_SHARE * count))
    return order[:tested] if split == "test" else order[tested:]


def _draw_codes(split: str, size: int, seed: int, fonts: Tensor, classes: int) -> Tensor:
    """Codes (size, 8), float32."""
    indices = torch.arange(size)
    stream = f"fonts/{split}"
    shares = uniform(
        seed, indices, (FontsManifold.latent_size,), stream=stream, dtype=torch.float64
    )
    # Numbers are multiples of 2**-24. The splits have the even and the odd ones for the first parameter, so
    # that no transformation is in both.
    steps = (shares[:, 0] * 2.0**24).long()
    shares[:, 0] = (steps - steps % 2 + (split == "test")) * 2.0**-24
    font = fonts[integers(seed, indices, len(fonts), stream=f"{stream}/font")]
    columns = [2 * shares - 1, font.unsqueeze(1), (indices % classes).unsqueeze(1)]
    return torch.cat([column.float() for column in columns], dim=1)
