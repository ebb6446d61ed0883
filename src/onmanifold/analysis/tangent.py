"""The parts of a perturbation along a manifold and across it (Disentangling, section 3.2 and appendix C.1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from onmanifold.analysis.least_squares import Solution, least_squares
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.modules import frozen
from onmanifold.manifolds.base import Chart, Manifold

# Latents up to which the tangent vectors are written down: so many decodings, and a decomposition.
_WRITTEN_DOWN = 256
# Numbers of tangent vectors that are held at once.
_NUMBERS = 2**24


class TangentParts(NamedTuple):
    """Vectors at points of a manifold, split into their parts along it and across it.

    Attributes:
        share: (B,) the squared length of the tangent part over that of the vector, in [0, 1]; NaN for zero.
        angle: (B,) in radians, in [0, pi / 2], between the vector and the tangent space; NaN for zero.
        tangent: (B, C, H, W) the orthogonal projections onto the tangent spaces.
        normal: (B, C, H, W) the vectors less these.
        rank: (B,) int64 dimension of the tangent space; -1 where it was not determined.
        residual: (B,) how far the search for the tangent part was from its end: the cosine between what is left
            of the vector and the direction in which it would be reduced (Paige and Saunders 1982); 0 where
            nothing was searched.
        iterations: (B,) int64 of the search; 0 where nothing was searched.
    """

    share: Tensor
    angle: Tensor
    tangent: Tensor
    normal: Tensor
    rank: Tensor
    residual: Tensor
    iterations: Tensor


def tangent_parts(
    manifold: Manifold,
    codes: Tensor,
    vectors: Tensor,
    *,
    levels: Sequence[int] | None = None,
    written_down: bool | None = None,
    iterations: int = 100,
    tolerance: float = 1e-4,
    batch_size: int = 64,
) -> TangentParts:
    """Split vectors in image space by the tangent spaces of a manifold at codes.

    The tangent space at a code is the range of the decoder's Jacobian J there: all directions in which the image
    moves when the latents do. Of a few latents the tangent vectors are written down, by one Jacobian-vector
    product each, and an orthonormal basis comes from their singular value decomposition; vectors of linearly
    dependent latents count once. Of many, such as a flow's, the least squares problem ``min |J v - d|`` is solved
    by LSQR from Jacobian-vector products alone, and no matrix is ever held. A search that is cut short by
    ``iterations`` gives the part in a smaller space: its share is too small, never too large; ``residual`` says
    so.

    An exact manifold with at least as many latents as pixels, such as a flow, has all directions as tangents: with
    all levels its shares are 1, and nothing is computed.

    Args:
        manifold: The generator; run in eval mode, and left as it is.
        codes: (B, code_size) where the tangent spaces are; what is fixed of them does not move.
        vectors: (B, C, H, W) perturbations or gradients, of any length.
        levels: Names of the levels whose latents may move, as for `LatentBall`; None: all.
        written_down: Whether tangent vectors are written down; None: where at most 256 latents move.
        iterations: Limit of the search.
        tolerance: Residual at which a search ends.
        batch_size: Samples at once, at most.

    Returns:
        The parts, in the vectors' dtype, in which derivatives are taken too; what is written down is decomposed
        in float64.

    Raises:
        InputError: Codes or vectors of the wrong shape, unknown levels, or a limit below 1.
    """
    _check(manifold, codes, vectors, iterations, batch_size)
    columns = _columns(manifold, levels).to(vectors.device)
    pixels = math.prod(manifold.image_shape)
    if manifold.exact and len(columns) == manifold.latent_size >= pixels:
        return _everything(vectors)
    few = len(columns) <= _WRITTEN_DOWN if written_down is None else written_down
    count = min(batch_size, max(1, _NUMBERS // (pixels * (len(columns) if few else 1))))
    parts = []
    with torch.no_grad(), frozen(manifold.to(vectors.device)):
        for rows in torch.split(torch.arange(len(vectors), device=vectors.device), count):
            chart = manifold.chart(codes[rows].to(vectors))
            if few:
                parts.append(_by_basis(_basis(chart, columns, vectors.dtype), vectors[rows]))
            else:
                parts.append(_by_search(chart, columns, vectors[rows], iterations, tolerance))
    if not parts:
        return _everything(vectors)
    return TangentParts(*(torch.cat(found) for found in zip(*parts, strict=True)))


def tangent_share(
    manifold: Manifold,
    codes: Tensor,
    vectors: Tensor,
    *,
    levels: Sequence[int] | None = None,
    written_down: bool | None = None,
    iterations: int = 100,
    tolerance: float = 1e-4,
    batch_size: int = 64,
) -> Tensor:
    """How much of vectors lies along a manifold: ``|P d|^2 / |d|^2``, (B,) in [0, 1], of vectors d.

    P projects orthogonally onto the tangent space at the code. A random direction has rank / pixels on average.
    Arguments and errors are those of `tangent_parts`, which gives the parts themselves too.
    """
    return tangent_parts(
        manifold,
        codes,
        vectors,
        levels=levels,
        written_down=written_down,
        iterations=iterations,
        tolerance=tolerance,
        batch_size=batch_size,
    ).share


def _check(
    manifold: Manifold, codes: Tensor, vectors: Tensor, iterations: int, batch_size: int
) -> None:
    shape = tuple(manifold.image_shape)
    if vectors.ndim != 4 or tuple(vectors.shape[1:]) != shape or not vectors.is_floating_point():
        raise InputError(
            f"vectors: expected floats (B, {', '.join(map(str, shape))}) for {manifold.name}, "
            f"found {vectors.dtype} {tuple(vectors.shape)}."
        )
    manifold.check_codes(codes, len(vectors))
    for name, value in (("iterations", iterations), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name}: expected at least 1, found {value}.")


def _columns(manifold: Manifold, levels: Sequence[int] | None) -> Tensor:
    """The latents that may move, in order."""
    positions = torch.arange(manifold.latent_size)
    if levels is None:
        return positions
    unknown = set(levels) - set(manifold.levels)
    if unknown or not levels:
        raise InputError(f"levels: found {list(levels)}, expected some of {list(manifold.levels)}.")
    return torch.cat([positions[manifold.levels[level]] for level in sorted(set(levels))])


def _basis(chart: Chart, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """An orthonormal basis (B, pixels, directions) in float64; directions beyond the rank are zero."""
    tangents = []
    for column in columns:
        direction = torch.zeros_like(chart.latents)
        direction[:, column] = 1
        tangents.append(chart.push(chart.latents, direction).flatten(1).double())
    matrix = torch.stack(tangents, dim=2)
    # Of a triangle, a decomposition takes a tenth of the time.
    outer, triangle = torch.linalg.qr(matrix)
    inner, sizes, _ = torch.linalg.svd(triangle, full_matrices=False)
    basis = outer @ inner
    # What is no longer than the rounding of the longest tangent is no direction.
    least = torch.finfo(dtype).eps * max(matrix.shape[1:])
    kept: Tensor = basis * (sizes > least * sizes[:, :1]).unsqueeze(1)
    return kept


def _by_basis(basis: Tensor, vectors: Tensor) -> TangentParts:
    wide = vectors.flatten(1).double()
    tangent = (basis @ (basis.mT @ wide.unsqueeze(2))).squeeze(2)
    rank = basis.square().sum((1, 2)).round().long()
    nothing = torch.zeros_like(rank)
    return _parts(vectors, tangent, rank, nothing.to(vectors), nothing)


def _by_search(
    chart: Chart, columns: Tensor, vectors: Tensor, iterations: int, tolerance: float
) -> TangentParts:
    push, pull = _products(chart, columns, vectors)
    found: Solution = least_squares(push, pull, vectors.flatten(1), iterations, tolerance)
    tangent, wide = push(found.solution).double(), vectors.flatten(1).double()
    # It is a tangent whatever the search's errors; of its right length its share is never too large.
    length = (tangent * wide).sum(1, keepdim=True) / tangent.square().sum(1, keepdim=True)
    tangent = torch.where(length.isfinite(), length * tangent, 0)
    rank = torch.full_like(found.iterations, -1)
    return _parts(vectors, tangent, rank, found.residual, found.iterations)


def _products(
    chart: Chart, columns: Tensor, vectors: Tensor
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """J and its transpose, as functions of moves (B, columns) and of images (B, pixels).

    All calls of the second share one decoding.
    """
    with torch.enable_grad():
        leaf = chart.latents.detach().clone().requires_grad_()
        images = chart.decode(leaf)

    def push(moves: Tensor) -> Tensor:
        directions = torch.zeros_like(chart.latents).index_copy(1, columns, moves)
        return chart.push(chart.latents, directions).flatten(1)

    def pull(moves: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(images, leaf, moves.view_as(vectors), retain_graph=True)
        return found[:, columns]

    return push, pull


def _parts(
    vectors: Tensor, tangent: Tensor, rank: Tensor, residual: Tensor, iterations: Tensor
) -> TangentParts:
    """From tangent parts (B, pixels) in float64; both lengths are those of what is returned."""
    normal = vectors.flatten(1).double() - tangent
    along, across = tangent.norm(dim=1), normal.norm(dim=1)
    squares = along.square() + across.square()
    share = torch.where(squares > 0, along.square() / squares, torch.nan)
    angle = torch.where(squares > 0, torch.atan2(across, along), torch.nan)
    return TangentParts(
        share.to(vectors),
        angle.to(vectors),
        tangent.view_as(vectors).to(vectors),
        normal.view_as(vectors).to(vectors),
        rank,
        residual.to(vectors),
        iterations,
    )


def _everything(vectors: Tensor) -> TangentParts:
    """All directions are tangents."""
    rank = torch.full((len(vectors),), math.prod(vectors.shape[1:]), device=vectors.device)
    nothing = torch.zeros_like(rank)
    return _parts(vectors, vectors.flatten(1).double(), rank, nothing.to(vectors), nothing)
