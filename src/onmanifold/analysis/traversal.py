"""Along latent directions through the codes of images: what changes in the images, and how much of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from onmanifold.attacks.engine import full_float32, untouched
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.modules import device_of, dtype_of
from onmanifold.manifolds.base import Manifold

# How far to either side of a code its own rate of change is measured, in units of latents.
_STEP = 0.01


class Traversal(NamedTuple):
    """Images along lines in the latent space; D directions through the codes of B images, S steps each.

    Attributes:
        offsets: (D, B, S) signed distances from the code along each direction, rising, in units of the latents.
        images: (D, B, S, C, H, W) in [0, 1].
        change: (D, B) mean Euclidean change of the image, over all pixels, per unit of latent: the length of the
            way through the images, step by step, over that through the latents; NaN where a line has no length.
        rate: (D, B) the same at the code itself: the length of the image's derivative along the direction, by
            differences over ±0.01, as far as the box allows.
    """

    offsets: Tensor
    images: Tensor
    change: Tensor
    rate: Tensor


@torch.no_grad()
def traverse(
    manifold: Manifold,
    codes: Tensor,
    directions: Tensor,
    steps: int = 9,
    span: float | None = None,
    batch_size: int = 256,
) -> Traversal:
    """Images on the lines through codes along given directions.

    A line is as long as the manifold's box allows, and where there is no box, 2 to either side, which is two
    standard deviations of the codes of most manifolds. Its ends are exactly ``decode`` of the codes there, and the
    other steps divide the way evenly. The manifold is left as it was found.

    Args:
        manifold: Any; codes may hold fixed columns, which stay.
        codes: (B, code_size); with a box, their latents are cut to it.
        directions: (D, latent_size), not 0; they are brought to length 1.
        steps: S, at least 2.
        span: Largest distance to either side; None: no limit but the above.
        batch_size: Images at once.

    Raises:
        InputError: Shapes that do not fit, a direction of length 0, fewer than 2 steps, or a span not above 0.
    """
    codes = manifold.check_codes(codes, len(codes)).to(device_of(manifold), dtype_of(manifold))
    directions = _directions(manifold, directions).to(codes)
    if steps < 2:
        raise InputError(f"steps: expected at least 2, found {steps}.")
    if span is not None and span <= 0:
        raise InputError(f"span: expected a number > 0, found {span}.")
    latents = codes[:, : manifold.latent_size]
    if manifold.box is not None:
        latents = latents.clamp(-manifold.box, manifold.box)
        codes = torch.cat([latents, codes[:, manifold.latent_size :]], dim=1)
    low, high = _reach(latents, directions, manifold.box, span)
    shares = torch.linspace(0, 1, steps, dtype=low.dtype, device=low.device)
    offsets = low.unsqueeze(2) + shares * (high - low).unsqueeze(2)
    with untouched(manifold, seed=0), full_float32():
        images = _decoded(manifold, codes, directions, offsets, batch_size)
        near = torch.stack([low.clamp(min=-_STEP), high.clamp(max=_STEP)], dim=2)
        ends = _decoded(manifold, codes, directions, near, batch_size)
    return Traversal(offsets, images, _lengths(images, offsets), _lengths(ends, near))


def _directions(manifold: Manifold, directions: Tensor) -> Tensor:
    size = manifold.latent_size
    if directions.ndim != 2 or directions.shape[1] != size or not len(directions):
        raise InputError(
            f"directions: expected (D, {size}) for {manifold.name}, found {tuple(directions.shape)}."
        )
    lengths = directions.norm(dim=1, keepdim=True)
    if not bool((lengths > 0).all()):
        raise InputError("directions: expected lengths > 0, found 0 or NaN.")
    units: Tensor = directions / lengths
    return units


def _reach(
    latents: Tensor, directions: Tensor, box: float | None, span: float | None
) -> tuple[Tensor, Tensor]:
    """How far each line (D, B) goes backwards (at most 0) and forwards (at least 0)."""
    limit = torch.full_like(directions[:, :1] @ latents[:, :1].T, torch.inf)
    if span is not None or box is None:
        limit = torch.full_like(limit, 2.0 if span is None else span)
    if box is None:
        return -limit, limit
    slopes, starts = directions.unsqueeze(1), latents.unsqueeze(0)
    # Where each coordinate meets the lower and the upper side of the box; one that stays meets none.
    sides = torch.stack([(-box - starts) / slopes, (box - starts) / slopes])
    moving = (slopes != 0).expand(sides.shape[1:])
    forwards = sides.amax(0).masked_fill(~moving, torch.inf).amin(2)
    backwards = sides.amin(0).masked_fill(~moving, -torch.inf).amax(2)
    return backwards.clamp(max=0).maximum(-limit), forwards.clamp(min=0).minimum(limit)


def _decoded(
    manifold: Manifold, codes: Tensor, directions: Tensor, offsets: Tensor, batch_size: int
) -> Tensor:
    """Images (D, B, S, C, H, W) float32 on the CPU."""
    moved = offsets.unsqueeze(3) * directions[:, None, None]
    points = (
        codes.expand(*offsets.shape[:1], *codes.shape)
        .unsqueeze(2)
        .repeat(1, 1, offsets.shape[2], 1)
    )
    points[..., : manifold.latent_size] += moved
    if manifold.box is not None:
        # At the ends of a line rounding may lead out of it.
        points[..., : manifold.latent_size].clamp_(-manifold.box, manifold.box)
    parts = torch.split(points.flatten(0, 2), batch_size)
    images = torch.cat([manifold.decode(part).float().cpu() for part in parts])
    return images.view(*offsets.shape, *images.shape[1:])


def _lengths(images: Tensor, offsets: Tensor) -> Tensor:
    """Length of the way through images (D, B, S, C, H, W) per unit of latent, (D, B) float64 on the CPU."""
    steps = (images[:, :, 1:] - images[:, :, :-1]).flatten(3).double().norm(dim=3).sum(2)
    way = (offsets[..., -1] - offsets[..., 0]).double().cpu()
    mean: Tensor = steps / torch.where(way > 0, way, torch.nan)
    return mean


def principal_directions(codes: Tensor, count: int) -> Tensor:
    """The directions (count, latent_size) in which latents (B, latent_size) vary most, of length 1, orthogonal.

    Of the two signs of each the one with the larger coordinate positive.

    Raises:
        InputError: More directions than the latents span.
    """
    most = min(len(codes) - 1, codes.shape[1])
    if not 1 <= count <= most:
        raise InputError(
            f"count: expected 1 to {most} for codes {tuple(codes.shape)}, found {count}."
        )
    centred = codes.double() - codes.double().mean(0)
    found = torch.linalg.svd(centred, full_matrices=False).Vh[:count]
    largest = found.gather(1, found.abs().argmax(1, keepdim=True))
    directions: Tensor = found * largest.sign()
    return directions.to(codes)
