"""Projection onto a manifold: the code whose image is nearest (Disentangling eq. 10)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from onmanifold.foundation.checks import check_images
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.randomness import normal, uniform
from onmanifold.manifolds.base import Chart, Manifold

_BETAS = (0.9, 0.999)


class Projection(NamedTuple):
    """The nearest points found.

    Attributes:
        codes: (B, code_size).
        images: (B, C, H, W), ``decode(codes)``.
        distance: (B,) L2 distance between these images and the given ones.
    """

    codes: Tensor
    images: Tensor
    distance: Tensor


def project(
    manifold: Manifold,
    images: Tensor,
    codes: Tensor,
    *,
    steps: int = 100,
    learning_rate: float = 0.09,
    decay: float = 0.95,
    decay_every: int = 10,
    restarts: int = 4,
    candidates: int = 128,
    tolerance: float = 0.1,
    seed: int = 0,
    indices: Tensor | None = None,
) -> Projection:
    """Project images onto a manifold: ``argmin_z ||decode(z) - image||_2`` over the latents.

    The fixed part of the codes (the font and class of FONTS) stays as given, the latents stay in the
    manifold's box. The first descent starts at the given latents, as in the paper; each restart at the best
    of some random ones, for those images that are still further away than ``tolerance``. The best point met
    is kept for every image, so that more steps or restarts never give a larger distance.

    Args:
        manifold: The generator.
        images: (B, C, H, W) in [0, 1].
        codes: (B, code_size) where to start, and the part that is fixed.
        steps: Of Adam.
        learning_rate: Of Adam, in latent units.
        decay: Factor on the learning rate every ``decay_every`` steps.
        decay_every: See ``decay``.
        restarts: Additional descents.
        candidates: Random latents among which a restart chooses; uniform in the box, or standard normal
            where there is none.
        tolerance: L2 distance that is near enough.
        seed: Of the restarts.
        indices: (B,) int64 sample indices on which the restarts depend; None: 0 to B - 1.

    Raises:
        InputError: Images or codes of the wrong shape or range, or a negative count.
    """
    images = check_images(images)
    codes = manifold.check_codes(codes, len(images)).detach().to(images)
    if tuple(images.shape[1:]) != tuple(manifold.image_shape):
        raise InputError(
            f"images: expected (B, {manifold.image_shape}), found {tuple(images.shape)}."
        )
    if steps < 0 or restarts < 0 or candidates < 1 or decay_every < 1:
        raise InputError("project: expected steps, restarts >= 0 and candidates, decay_every >= 1.")
    indices = torch.arange(len(images), device=images.device) if indices is None else indices
    chart = manifold.chart(codes)
    latents = _into_box(chart.latents, manifold.box).clone()
    with torch.no_grad():
        distance = _distances(chart.decode(latents), images)
    for attempt in range(restarts + 1):
        far = (distance > tolerance).nonzero().squeeze(1)
        if not len(far):
            break
        around, target, start = chart.keep(far), images[far], latents[far]
        if attempt:
            stream = f"project/{attempt}"
            start = _best_candidate(around, target, candidates, seed, indices[far], stream)
        found, reached = _descend(around, target, start, steps, learning_rate, decay, decay_every)
        better = reached < distance[far]
        latents[far[better]], distance[far[better]] = found[better], reached[better]
    codes = torch.cat([latents, codes[:, manifold.latent_size :]], dim=1)
    with torch.no_grad():
        nearest = manifold.decode(codes)
    return Projection(codes, nearest, _distances(nearest, images))


def _descend(
    chart: Chart,
    images: Tensor,
    latents: Tensor,
    steps: int,
    learning_rate: float,
    decay: float,
    decay_every: int,
) -> tuple[Tensor, Tensor]:
    """Adam on the squared distance: the best latents met, and their distances."""
    first, second = torch.zeros_like(latents), torch.zeros_like(latents)
    best = latents
    shortest = torch.full_like(latents[:, 0], torch.inf)
    for step in range(steps + 1):
        latents = latents.detach().requires_grad_()
        with torch.enable_grad():
            residual = chart.decode(latents) - images
        # Half the squared distance has the residual as its gradient, which saves forming the loss.
        (gradient,) = torch.autograd.grad(residual, latents, residual.detach())
        distance = torch.linalg.vector_norm(residual.detach().flatten(1), dim=1)
        latents = latents.detach()
        closer = distance < shortest
        shortest = torch.where(closer, distance, shortest)
        best = torch.where(closer.unsqueeze(1), latents, best)
        first = torch.lerp(gradient, first, _BETAS[0])
        second = torch.lerp(gradient * gradient, second, _BETAS[1])
        mean = first / (1 - _BETAS[0] ** (step + 1))
        spread = (second / (1 - _BETAS[1] ** (step + 1))).sqrt() + 1e-8
        rate = learning_rate * decay ** (step // decay_every)
        latents = _into_box(latents - rate * mean / spread, chart.manifold.box)
    return best, shortest


@torch.no_grad()
def _best_candidate(
    chart: Chart, images: Tensor, candidates: int, seed: int, indices: Tensor, stream: str
) -> Tensor:
    """The nearest of a number of random latents, for each image."""
    box = chart.manifold.box
    shape = (candidates, chart.manifold.latent_size)
    if box is None:
        draws = normal(seed, indices, shape, stream=stream, dtype=images.dtype)
    else:
        draws = (2 * uniform(seed, indices, shape, stream=stream, dtype=images.dtype) - 1) * box
    best = draws[:, 0]
    shortest = torch.full_like(best[:, 0], torch.inf)
    for latents in draws.unbind(1):
        distance = _distances(chart.decode(latents), images)
        closer = distance < shortest
        shortest = torch.where(closer, distance, shortest)
        best = torch.where(closer.unsqueeze(1), latents, best)
    return best


def _distances(first: Tensor, second: Tensor) -> Tensor:
    distances: Tensor = torch.linalg.vector_norm((first - second).flatten(1), dim=1)
    return distances


def _into_box(latents: Tensor, box: float | None) -> Tensor:
    return latents if box is None else latents.clamp(-box, box)
