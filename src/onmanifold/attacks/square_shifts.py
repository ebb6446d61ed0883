"""What the square attack proposes in l2 and l1: mass that moves from one square into another."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from onmanifold.attacks.square_moves import Moves
from onmanifold.foundation import randomness
from onmanifold.threats.base import Ball
from onmanifold.threats.geometry import size

_TINY = 1e-12
# A sum of shapes of norm 1 below this is their cancelling out.
_CANCELLED = 1e-4


class Shifts(Moves):
    """l2 and l1: a proposal empties one window and moves what was in it, in another shape, into a second one.

    Andriushchenko et al. 2020, algorithm 3 and section 3.4; the l1 form differs from it in the norm and in a
    narrower peak (weights to the fourth power), as in AutoAttack.
    """

    def __init__(self, ball: Ball, remembers: bool, images: Tensor | None = None) -> None:
        super().__init__(ball, remembers, images)
        self.power = 2 if ball.norm == "l2" else 1
        self.budget = ball.radius**self.power
        self.low = None if ball.low is None else self.grid.flat(ball.low)
        self.high = None if ball.high is None else self.grid.flat(ball.high)

    @property
    def draws(self) -> int:
        """Two corners, an orientation, and the sign of each channel."""
        return 5 + self.grid.channels

    def start(self, seed: int, indices: Tensor, stream: str) -> None:
        """Peaks on five by five tiles, of random signs, together as large as the ball allows."""
        grid = self.grid
        tiles = [max(1, side // 5) for side in (grid.height, grid.width)]
        across = min(5, grid.width)
        down = min(5, grid.height)
        peak = _peak(tiles[0], tiles[1], self.power, self.flat.dtype).to(self.flat.device)
        # At some orientation for all: the search turns the windows anyway.
        signs = 1 - 2 * randomness.integers(
            seed, indices, 2, (down, 1, across, 1, grid.channels), stream=stream
        )
        block = (signs * peak.view(1, 1, tiles[0], 1, tiles[1], 1)).flatten(3, 4).flatten(1, 2)
        points = self.flat.new_zeros(len(indices), grid.height, grid.width, grid.channels)
        top, left = (grid.height - block.shape[1]) // 2, (grid.width - block.shape[2]) // 2
        points[:, top : top + block.shape[1], left : left + block.shape[2]] = block
        flat = points.flatten(1)
        length = size(flat, "l2" if self.power == 2 else "l1").clamp(min=_TINY)
        self.flat = self._boxed(
            flat * (self.budget ** (1 / self.power) / length).unsqueeze(1), None
        )

    def plan(self, shares: list[float], draws: Tensor) -> None:
        """Places of the next pairs of squares, orientations and signs."""
        self.windows = [self.grid.window(share, symmetric=True) for share in shares]
        self.first = self.grid.corners(draws, self.windows)
        self.second = self.grid.corners(draws[..., 2:], self.windows)
        self.turned = draws[..., 4] < 0.5
        self.signs = (2 * (draws[..., 5:] < 0.5) - 1).to(self.flat.dtype)

    def propose(self, number: int, waiting: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of what two windows hold, and what the ball still allows, in the first; none in the second."""
        grid, window, power = self.grid, self.windows[number], self.power
        rows = waiting.nonzero().squeeze(1)
        flat = self.flat[rows]
        if len(rows) == 0:
            return rows, flat
        inside = grid.inside(window, flat.device)
        first, second = self.first[number, rows] + inside, self.second[number, rows] + inside
        unused = self.budget[rows] - (flat.abs() ** power).sum(1)
        held = flat.gather(1, first)
        candidates = flat.scatter(1, first, 0.0)
        also = candidates.gather(1, second)
        candidates.scatter_(1, second, 0.0)
        held, also = (part.view(len(rows), -1, grid.channels) for part in (held, also))
        allowed = _powers(held, power) + _powers(also, power)
        # Negative where rounding led out of the ball, so that such errors do not add up.
        allowed = (allowed + unused.view(-1, 1, 1) / grid.channels).clamp(min=0)
        peak = _oriented(window, power, self.turned[rows, number], flat).unsqueeze(2)
        peak = peak * self.signs[rows, number].unsqueeze(1)
        shape = peak + held / (_powers(held, power) ** (1 / power) + _TINY)
        # Where the two cancel, rounding errors would be all that is left.
        shape = torch.where(_powers(shape, power) > _CANCELLED, shape, peak)
        shape = shape * (allowed / _powers(shape, power)) ** (1 / power)
        moved = self._boxed(shape.flatten(1), rows, first)
        return rows, candidates.scatter_(1, first, moved)

    def take(self, rows: Tensor, candidates: Tensor) -> None:
        """The candidates."""
        self.flat.index_copy_(0, rows, candidates)

    def keep(self, mask: Tensor) -> None:
        """Of all that there is per sample."""
        super().keep(mask)
        self.budget = self.budget[mask]
        self.low = None if self.low is None else self.low[mask]
        self.high = None if self.high is None else self.high[mask]

    def _boxed(self, points: Tensor, rows: Tensor | None, places: Tensor | None = None) -> Tensor:
        """Points clipped to the box, of all samples, or of the coordinates at ``places`` of some."""
        if self.low is None or self.high is None:
            return points
        if rows is None or places is None:
            return points.clamp(self.low, self.high)
        low, high = (bound[rows].gather(1, places) for bound in (self.low, self.high))
        return points.clamp(low, high)


def _powers(points: Tensor, power: int) -> Tensor:
    """The sum over the pixels of magnitudes to a power, (B, 1, C) of (B, pixels, C)."""
    return (points.abs() ** power).sum(1, keepdim=True)


def _pyramid(height: int, width: int, decay: int) -> Tensor:
    """Falling from the centre: 1/(d + 1)^decay + 1/(d + 2)^decay + ... at the d-th ring of pixels."""
    rows = (torch.arange(height) - height // 2).abs().view(-1, 1)
    columns = (torch.arange(width) - width // 2).abs().view(1, -1)
    rings = max(height, width) // 2 + 1
    weights = torch.arange(1, rings + 1, dtype=torch.float64) ** -decay
    return weights.flip(0).cumsum(0).flip(0)[torch.maximum(rows, columns)]


@functools.lru_cache(maxsize=64)
def _peak(height: int, width: int, power: int, dtype: torch.dtype) -> Tensor:
    """A peak beside its negative, one above the other (side by side in a single row), of norm 1."""
    if height == 1 and width > 1:
        return _peak(width, 1, power, dtype).T
    decay, half = (2 if power == 2 else 4), height // 2
    peak = torch.cat([_pyramid(half, width, decay), -_pyramid(height - half, width, decay)])
    return (peak / (peak.abs() ** power).sum() ** (1 / power)).to(dtype)


def _oriented(window: tuple[int, int], power: int, turned: Tensor, like: Tensor) -> Tensor:
    """The peak of each sample, turned by 90 degrees or not, (B, pixels)."""
    peak = _peak(window[0], window[1], power, like.dtype).to(like.device)
    if window[0] != window[1]:
        return peak.reshape(1, -1).expand(len(turned), -1)
    return torch.where(turned.unsqueeze(1), peak.T.reshape(1, -1), peak.reshape(1, -1))
