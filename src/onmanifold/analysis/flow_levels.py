"""One level of a flow attacked, the others as they are (IJSAT, appendix D, equation 14 and figure 8)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from onmanifold.attacks import PGD
from onmanifold.foundation.checks import check_images
from onmanifold.foundation.errors import InputError
from onmanifold.manifolds.base import Manifold
from onmanifold.threats.latent import LatentBall


class LevelAttack(NamedTuple):
    """What an attack on some levels found, a row per sample.

    Attributes:
        levels: The levels that could move; None: all.
        radius: Of the ball around the latents, l∞.
        images: (B, C, H, W) in [0, 1].
        success: (B,) bool, whether the classifier is wrong on them.
        linf: (B,) largest change of a pixel.
        l2: (B,) Euclidean length of the change over all pixels.
        frequency: (B,) mean spatial frequency of the change, see `mean_frequency`.
    """

    levels: tuple[int, ...] | None
    radius: float
    images: Tensor
    success: Tensor
    linf: Tensor
    l2: Tensor
    frequency: Tensor


def attack_levels(
    model: nn.Module,
    manifold: Manifold,
    images: Tensor,
    labels: Tensor,
    radii: Sequence[float] = (0.02, 0.04, 0.1),
    *,
    levels: Sequence[tuple[int, ...] | None] | None = None,
    steps: int = 20,
    batch_size: int = 64,
    seed: int = 0,
    indices: Tensor | None = None,
) -> Iterator[LevelAttack]:
    """Attack each level by itself, and all at once, at several radii: PGD in an l∞ ball around the latents.

    The attack does all its steps, so that changes are compared at the full radius; of several points at which the
    classifier is wrong the one with the largest cross-entropy is kept.

    Args:
        model: Images to logits (B, K).
        manifold: One with several levels, such as Glow; latents in the units of its prior.
        images: (B, C, H, W) in [0, 1].
        labels: (B,) int64.
        radii: Of the ball.
        levels: Sets of levels, None standing for all of them; None: each by itself, then all.
        steps: Of the attack.
        batch_size: Images at once.
        seed: Of the random starts.
        indices: (B,) int64 sample indices, on which the starts depend; None: 0 to B − 1.

    Yields:
        For each set of levels and each radius, in this order, what was found.

    Raises:
        InputError: An unknown level, no radius, or images that do not fit.
    """
    images = check_images(images)
    if not radii or not len(images):
        raise InputError("radii, images: expected at least one of each.")
    if levels is None:
        levels = [*((level,) for level in manifold.levels), None]
    indices = torch.arange(len(images), device=images.device) if indices is None else indices
    parts = torch.split(torch.arange(len(images), device=images.device), batch_size)
    for chosen in levels:
        for radius in radii:
            attack = PGD(
                LatentBall(manifold, radius=radius, levels=chosen), steps=steps, early_stop=False
            )
            found = [
                attack(model, images[part], labels[part], seed=seed, indices=indices[part])
                for part in parts
            ]
            moved = torch.cat([result.images for result in found])
            change = (moved - images).flatten(1)
            yield LevelAttack(
                chosen,
                radius,
                moved,
                torch.cat([result.success for result in found]),
                change.abs().amax(1),
                change.norm(dim=1),
                mean_frequency(moved - images),
            )


def mean_frequency(changes: Tensor) -> Tensor:
    """The mean spatial frequency (B,) of changes (B, C, H, W), weighted by power, in cycles per pixel.

    A change that is the same everywhere has 0, one whose pixels are independent about 0.38, a chessboard 0.71; NaN
    where nothing changes. The power is that of the two-dimensional Fourier transform of each channel, the
    frequency the length of the wave vector.
    """
    height, width = changes.shape[2:]
    wide = changes.double()
    power = torch.fft.fft2(wide).abs().square().sum(1)
    rows = torch.fft.fftfreq(height, dtype=torch.float64, device=changes.device).unsqueeze(1)
    columns = torch.fft.fftfreq(width, dtype=torch.float64, device=changes.device)
    frequencies = (rows.square() + columns.square()).sqrt()
    mean: Tensor = (power * frequencies).sum((1, 2)) / power.sum((1, 2))
    return mean
