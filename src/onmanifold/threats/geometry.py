"""Norm balls cut by a box: exact projection, steepest ascent, size and random points, per sample.

Pure functions on tensors of shape (B, D), a row per sample. Boxes contain the origin: ``low <= 0 <= high``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from onmanifold.foundation import randomness

Norm = Literal["linf", "l2", "l1"]
Start = Literal["zero", "uniform", "distance", "surface", "nearby"]

# The standard deviation of the start "nearby": that of TRADES and MART, in their code.
_NEARBY = 0.001

# Share of the coordinates among which an l1 step is spread (Tramèr and Boneh 2019, arXiv:1904.13000).
_L1_SHARE = 0.01


def size(points: Tensor, norm: Norm) -> Tensor:
    """Norm of each row, (B,)."""
    flat = points.flatten(1)
    if norm == "l2":
        length: Tensor = torch.linalg.vector_norm(flat, dim=1)
        return length
    # Written out: on a CPU the library's other norms take many times as long.
    return flat.abs().amax(1) if norm == "linf" else flat.abs().sum(1)


def clip(points: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Each value between its own bounds; on a CPU `torch.clamp` takes ten times as long with tensors."""
    return torch.maximum(points, low).minimum(high)


def project(
    points: Tensor, norm: Norm, radius: Tensor, low: Tensor | None, high: Tensor | None
) -> Tensor:
    """The nearest point (Euclidean) of ball ∩ box for each row; exact for each norm.

    Args:
        points: (B, D).
        norm: "linf", "l2" or "l1".
        radius: (B,), at least 0.
        low: (B, D) or None for no box; at most 0.
        high: (B, D) or None; at least 0.

    Returns:
        (B, D).
    """
    if norm == "linf":
        limit = radius.unsqueeze(1)
        points = clip(points, -limit, limit)
        return points if low is None or high is None else clip(points, low, high)
    boxed = points if low is None or high is None else clip(points, low, high)
    outside = size(boxed, norm) > radius
    if not bool(outside.any()):
        return boxed
    rows = outside.nonzero().squeeze(1)
    far, limit = points[rows], radius[rows]
    room = None
    if low is not None and high is not None:
        # How far each coordinate may go on its own side of the origin.
        side = far.sign()
        room = torch.maximum(side * high[rows], side * low[rows])
    shrink = _shrink_l2 if norm == "l2" else _shrink_l1
    return boxed.index_copy(0, rows, shrink(far, limit, room))


def _shrink_l2(points: Tensor, radius: Tensor, room: Tensor | None) -> Tensor:
    """Rows outside ball ∩ box: clip(s·v) with the s in (0, 1) at which the norm is the radius.

    Where the set of coordinates at their bound is known, s has a closed form. Beginning with none, each step takes
    those to their bound that the last s leads beyond it; s only grows, and is exact once no more follow.
    """
    limit = radius.square().unsqueeze(1)
    squares = points.square()
    scale = (limit / squares.sum(1, keepdim=True)).sqrt()
    if room is None:
        return points * scale
    magnitude, bounds = points.abs(), room.square()
    count = torch.full_like(radius, -1)
    while True:
        free = (room - magnitude * scale).sign().clamp(min=0)
        used, rest = (bounds * (1 - free)).sum(1, True), (squares * free).sum(1, True)
        larger = ((limit - used).clamp(min=0) / rest).sqrt()
        scale = torch.where(rest > 0, larger.maximum(scale), scale)
        before, count = count, free.sum(1)
        if torch.equal(before, count):
            break
    return torch.copysign(torch.minimum(magnitude * scale, room), points)


def _shrink_l1(points: Tensor, radius: Tensor, room: Tensor | None) -> Tensor:
    """Rows outside ball ∩ box: sign(v)·clip(|v| − t, 0, room) with the t at which the norm is the radius.

    The norm falls piecewise linearly in t, with corners at |v| and |v| − room; their order finds the piece.
    """
    magnitude, limit = points.abs().double(), radius.double().unsqueeze(1)
    if room is None:
        bound = torch.full_like(magnitude, torch.inf)
        corners, slopes = magnitude, torch.ones_like(magnitude)
    else:
        bound = room.double()
        corners = torch.cat([magnitude, magnitude - bound], dim=1)
        slopes = torch.cat([torch.ones_like(magnitude), -torch.ones_like(magnitude)], dim=1)
    corners, order = corners.sort(dim=1, descending=True)
    slopes = slopes.gather(1, order).cumsum(1)
    rises = slopes[:, :-1] * (corners[:, :-1] - corners[:, 1:])
    heights = torch.cat([torch.zeros_like(limit), rises.cumsum(1)], dim=1)
    # The last corner whose height is still below the radius begins the piece that holds the solution.
    piece = (heights < limit).sum(1, keepdim=True).clamp(min=1) - 1
    slope = slopes.gather(1, piece).clamp(min=1)
    threshold = corners.gather(1, piece) - (limit - heights.gather(1, piece)) / slope
    shrunk = torch.minimum((magnitude - threshold).clamp(min=0), bound)
    return torch.copysign(shrunk.to(points.dtype), points)


def ascend(
    points: Tensor,
    gradients: Tensor,
    norm: Norm,
    step_size: float | Tensor,
    low: Tensor | None,
    high: Tensor | None,
) -> Tensor:
    """A step of steepest ascent in the given norm, not yet projected.

    linf: the sign of the gradient; l2: the gradient over its norm; l1: the coordinates of largest gradient,
    each moved by at most its room in the box and at most 1/k of the step, k = 1 % of the coordinates, until
    the step is used up. A row without gradient stays where it is.

    Args:
        points: (B, ...), any shape per sample for linf and l2.
        gradients: The same shape.
        norm: The norm in which the step is measured.
        step_size: Number, or (B,) one per sample.
        low: (B, D) or None.
        high: (B, D) or None.
    """
    if norm == "linf":
        if isinstance(step_size, float):
            return torch.add(points, gradients.sign(), alpha=step_size)
        return points + _column(step_size, points) * gradients.sign()
    if norm == "l2":
        return points + _column(step_size, points) * unit(gradients)
    flat, slope = points.flatten(1), gradients.flatten(1)
    step = (
        torch.as_tensor(step_size, dtype=flat.dtype, device=flat.device)
        .expand(len(flat))
        .unsqueeze(1)
    )
    cap = (step / max(1, round(_L1_SHARE * flat.shape[1]))).expand_as(flat)
    if low is not None and high is not None:
        cap = torch.minimum(cap, torch.where(slope > 0, high - flat, flat - low).clamp(min=0))
    cap = torch.where(slope == 0, 0.0, cap)
    order = slope.abs().argsort(dim=1, descending=True)
    cap = cap.gather(1, order)
    used = cap.cumsum(1) - cap
    moves = torch.minimum(cap, (step - used).clamp(min=0))
    moved = flat + torch.zeros_like(flat).scatter(1, order, moves) * slope.sign()
    return moved.view_as(points)


def unit(gradients: Tensor) -> Tensor:
    """Each sample's gradient at Euclidean length 1; zero stays zero. Safe where squares would underflow."""
    flat = gradients.flatten(1)
    largest = flat.abs().amax(1)
    scaled = flat / torch.where(largest > 0, largest, 1.0).unsqueeze(1)
    length = torch.linalg.vector_norm(scaled, dim=1)
    return (scaled / torch.where(length > 0, length, 1.0).unsqueeze(1)).view_as(gradients)


def random_points(
    count: int, norm: Norm, radius: Tensor, start: Start, seed: int, indices: Tensor, stream: str
) -> Tensor:
    """A random point of each sample's ball, (B, count).

    Args:
        count: D, the number of coordinates.
        norm: The ball's norm.
        radius: (B,).
        start: "uniform": uniform in the ball's volume; "distance": distance uniform in [0, radius] and
            direction that of a Gaussian (Disentangling eq. 19); "zero": the centre; "surface": as APGD
            starts, at the largest distance (for l1 a Gaussian point, to be projected on the ball);
            "nearby": 0.001 times a Gaussian point, as TRADES and MART start, to be projected on the ball.
        seed: With ``indices`` (B,) and ``stream`` determines the point, for any batch and device.
        indices: (B,) int64.
        stream: Names the variable and the restart.
    """
    dtype = radius.dtype
    limit = radius.unsqueeze(1)
    if start == "zero":
        return torch.zeros(len(indices), count, dtype=dtype, device=indices.device)
    if start == "uniform" and norm == "linf":
        draw = randomness.uniform(seed, indices, (count,), stream=stream, dtype=dtype)
        return (2.0 * draw - 1.0) * limit
    if start == "surface" and norm == "linf":
        draw = 2.0 * randomness.uniform(seed, indices, (count,), stream=stream, dtype=dtype) - 1.0
        return draw / size(draw, norm).unsqueeze(1) * limit
    if start == "nearby":
        point = randomness.normal(seed, indices, (count,), stream=stream, dtype=dtype)
        return torch.where(limit > 0, _NEARBY * point, 0.0)
    share = randomness.uniform(seed, indices, (1,), stream=stream + "/distance", dtype=dtype)
    if start == "uniform" and norm == "l1":
        # Uniform in the l1 ball: signed exponentials over their sum and one more exponential.
        draw = randomness.uniform(
            seed, indices, (2 * count + 1,), stream=stream, dtype=torch.float64
        )
        lengths = -torch.log1p(-draw[:, : count + 1])
        signs = (draw[:, count + 1 :] < 0.5).double() * 2.0 - 1.0
        points = signs * lengths[:, :count] / lengths.sum(1, keepdim=True)
        return points.to(dtype) * limit
    direction = randomness.normal(seed, indices, (count,), stream=stream, dtype=dtype)
    if start == "surface" and norm == "l1":
        return torch.where(limit > 0, direction, 0.0)
    direction = direction / size(direction, norm).unsqueeze(1)
    if start == "surface":
        return direction * limit
    distance = share ** (1.0 / count) if start == "uniform" else share
    return direction * distance * limit


def _column(step_size: float | Tensor, points: Tensor) -> float | Tensor:
    if isinstance(step_size, Tensor):
        return step_size.view(-1, *[1] * (points.ndim - 1))
    return step_size
