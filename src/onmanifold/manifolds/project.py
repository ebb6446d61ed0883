"""Projection onto a manifold: the code whose image is nearest (Disentangling eq. 10, DMAT eq. 7, IJSAT eq. 12)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from onmanifold.foundation.checks import check_images, check_labels
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.modules import frozen
from onmanifold.manifolds.base import Manifold
from onmanifold.manifolds.descent import Goal, ProjectionConfig, into_box, lengths, search
from onmanifold.manifolds.learned import LearnedManifold
from onmanifold.manifolds.perceptual import PerceptualDistance

__all__ = ["PROJECTIONS", "Encoder", "Projection", "ProjectionConfig", "project"]

Encoder = Callable[[Tensor, Tensor], Tensor]
"""Codes (B, code_size) of images (B, C, H, W) and labels (B,)."""


class Projection(NamedTuple):
    """The nearest points found.

    Attributes:
        codes: (B, code_size).
        images: (B, C, H, W), ``decode(codes)``.
        distance: (B,) L2 distance between these images and the given ones.
        loss: (B,) what was minimised: the same without a measure, else the measure plus weighted L1.
        measure: Fingerprint of the measure, such as "features-…"; "l2" without one.
    """

    codes: Tensor
    images: Tensor
    distance: Tensor
    loss: Tensor
    measure: str


PROJECTIONS: dict[str, ProjectionConfig] = {
    "fonts": ProjectionConfig(),
    "w_plus": ProjectionConfig(
        steps=1000,
        learning_rate=0.1,
        schedule="cosine",
        l1_weight=100.0,
        noise=0.05,
        restarts=0,
        tolerance=0.0,
    ),
    "quick": ProjectionConfig(
        steps=200, learning_rate=0.2, schedule="cosine", l1_weight=10.0, restarts=0, tolerance=0.0
    ),
}
"""Searches by name: "fonts" (Disentangling, appendix C), "w_plus" (DMAT's, into StyleGAN's W+) and "quick", for
learned manifolds of 28 to 32 pixels on a CPU."""


def project(
    manifold: Manifold,
    images: Tensor,
    codes: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    config: ProjectionConfig = PROJECTIONS["fonts"],
    measure: PerceptualDistance | None = None,
    encoder: Encoder | None = None,
    seed: int = 0,
    indices: Tensor | None = None,
) -> Projection:
    """Project images onto a manifold: the latents whose image is nearest.

    Without a measure the L2 distance is minimised, along the gradient of half its square (Disentangling eq. 10);
    with one ``measure + l1_weight · mean |decode(z) − image|`` (DMAT eq. 7). The fixed part of the codes (the font
    and class of FONTS) stays as it starts, the latents stay in the manifold's box. The first descent starts at
    the best of the starts there are: the given codes, or else the manifold's mean code, and what the encoder
    gives. Each restart starts at the best of some random latents, for those images that are still further away
    than the tolerance. The best point met is kept for every image, so that more restarts never give a larger loss.

    Args:
        manifold: The generator; it is run in eval mode, and left as it is.
        images: (B, C, H, W) in [0, 1].
        codes: (B, code_size) where to start, and the part that is fixed.
        labels: (B,) int64 for the mean code of a conditional manifold, and for the encoder.
        config: How to search; see `PROJECTIONS`.
        measure: A perceptual distance; see `perceptual_distance`.
        encoder: Gives another start, such as ``manifold.encode`` where that is cheap, or `train_encoder`'s.
        seed: Of restarts and noise.
        indices: (B,) int64 sample indices on which restarts and noise depend; None: 0 to B - 1.

    Raises:
        InputError: Images, codes or labels of the wrong shape or range, no start, or an L1 weight without a
            measure.
    """
    images = check_images(images)
    if tuple(images.shape[1:]) != tuple(manifold.image_shape):
        raise InputError(
            f"images: expected (B, {manifold.image_shape}), found {tuple(images.shape)}."
        )
    if config.l1_weight and measure is None:
        raise InputError(
            f"l1_weight: found {config.l1_weight}, which needs a measure such as perceptual_distance()."
        )
    indices = torch.arange(len(images), device=images.device) if indices is None else indices
    with torch.no_grad(), frozen(manifold.to(images.device)):
        starts = _starts(manifold, images, codes, labels, encoder)
        goal = Goal(images, measure, config.l1_weight)
        codes = _best_start(manifold, goal, starts)
        latents = search(manifold, goal, codes, config, seed, indices)
        codes = torch.cat([latents, codes[:, manifold.latent_size :]], dim=1)
        nearest = manifold.decode(codes)
        distance = lengths(nearest - images)
        loss = distance if measure is None else goal.loss(nearest)
    return Projection(codes, nearest, distance, loss, getattr(measure, "fingerprint", "l2"))


def _starts(
    manifold: Manifold,
    images: Tensor,
    codes: Tensor | None,
    labels: Tensor | None,
    encoder: Encoder | None,
) -> list[Tensor]:
    """Codes (B, code_size) where a descent may start, their latents in the box."""
    count = len(images)
    if labels is not None:
        labels = check_labels(labels, count, getattr(manifold, "num_classes", None))
    starts = [_mean_codes(manifold, images, labels) if codes is None else codes]
    if encoder is not None:
        unknown = torch.zeros(count, dtype=torch.int64, device=images.device)
        with torch.enable_grad():  # an encoder may be a search
            starts.append(encoder(images, unknown if labels is None else labels))
    known = [start.detach() for start in starts if start is not None]
    if not known:
        raise InputError(
            f"codes: {manifold.name} has {manifold.code_size - manifold.latent_size} columns that cannot be "
            "searched; expected codes, an encoder, or, where the column is the class, labels."
        )
    return [
        _codes_in_box(manifold, manifold.check_codes(start, count).to(images)) for start in known
    ]


def _mean_codes(manifold: Manifold, images: Tensor, labels: Tensor | None) -> Tensor | None:
    """The manifold's mean codes, or zero latents where it knows none; None: their fixed part is unknown."""
    has_fixed = manifold.code_size > manifold.latent_size
    if has_fixed and labels is None:
        return None
    if labels is None:
        labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    mean_code = getattr(manifold, "mean_code", None)
    if mean_code is not None:
        mean: Tensor = mean_code(labels)
        return mean
    latents = images.new_zeros(len(images), manifold.latent_size)
    if isinstance(manifold, LearnedManifold):
        return manifold.codes_of(latents, labels)
    return None if has_fixed else latents


def _best_start(manifold: Manifold, goal: Goal, starts: list[Tensor]) -> Tensor:
    """The start (B, code_size) of least loss, for each image."""
    if len(starts) == 1:
        return starts[0]
    losses = torch.stack([goal.loss(manifold.decode(start)) for start in starts])
    chosen = losses.argmin(0)
    return torch.stack(starts)[chosen, torch.arange(len(chosen), device=chosen.device)]


def _codes_in_box(manifold: Manifold, codes: Tensor) -> Tensor:
    size = manifold.latent_size
    return torch.cat([into_box(codes[:, :size], manifold.box), codes[:, size:]], dim=1)
