"""What the square attack proposes: squares of an image's perturbation, blocks of any other variable."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from onmanifold.foundation import randomness
from onmanifold.threats.base import Ball

# Images that each sample remembers to have been asked about; a power of 2.
_MEMORY = 4096


@dataclass(frozen=True)
class Grid:
    """A variable laid out as pixels with channels; what is no image is one row of pixels.

    Tensors are flat, (B, height * width * channels), the channels of a pixel side by side.
    """

    height: int
    width: int
    channels: int
    shape: tuple[int, ...]

    @staticmethod
    def of(shape: tuple[int, ...]) -> Grid:
        """The layout of a variable of that shape per sample."""
        if len(shape) == 3:
            return Grid(shape[1], shape[2], shape[0], shape)
        return Grid(1, math.prod(shape), 1, shape)

    def flat(self, points: Tensor) -> Tensor:
        """(B, *shape) to (B, D)."""
        points = points.view(len(points), *self.shape)
        return (points.permute(0, 2, 3, 1) if len(self.shape) == 3 else points).flatten(1)

    def points(self, flat: Tensor) -> Tensor:
        """(B, D) to (B, *shape); images in channels_last."""
        if len(self.shape) != 3:
            return flat.view(-1, *self.shape)
        return flat.view(-1, self.height, self.width, self.channels).permute(0, 3, 1, 2)

    def window(self, share: float, symmetric: bool) -> tuple[int, int]:
        """Height and width of the square, or block, that is ``share`` of the variable; symmetric: of odd side."""
        if self.height == 1:
            return 1, max(1, round(share * self.width))
        side = max(round(math.sqrt(share * self.height * self.width)), 1)
        if symmetric:
            side = max(side, 3)
            side += 1 - side % 2
        side = min(side, self.height, self.width)
        return side, side

    def corners(self, draws: Tensor, windows: list[tuple[int, int]]) -> Tensor:
        """The places in flat tensors of the first pixels of Q windows, (Q, B, 1), for uniform draws (B, Q, 2)."""
        sizes = torch.tensor(windows, device=draws.device)
        top = (draws[..., 0] * (self.height - sizes[:, 0] + 1)).long()
        left = (draws[..., 1] * (self.width - sizes[:, 1] + 1)).long()
        return ((top * self.width + left) * self.channels).T.unsqueeze(2).contiguous()

    def inside(self, window: tuple[int, int], device: torch.device) -> Tensor:
        """The places of a window's coordinates after that of its first pixel, (1, pixels · channels)."""
        return _inside(self, window, device)


class Moves(ABC):
    """How one variable is searched: a start, then proposals of which some are taken.

    Args:
        ball: Where the variable may be.
        remembers: Whether what was asked about once need not be asked about again.
        images: (B, C, H, W), where the variable is only added to them; else None.
    """

    def __init__(self, ball: Ball, remembers: bool, images: Tensor | None = None) -> None:
        self.ball = ball
        self.grid = Grid.of(ball.shape)
        self.flat = self.grid.flat(ball.zero())
        self.origin = None if images is None else self.grid.flat(images)

    @property
    def points(self) -> Tensor:
        """The variable where the samples are, (B, *shape)."""
        return self.grid.points(self.flat)

    def images(self, rows: Tensor | None, candidates: Tensor) -> Tensor:
        """The images plus candidates of the samples at ``rows`` (None: all), (rows, C, H, W)."""
        if self.origin is None:
            raise TypeError("these moves were given no images")
        origin = self.origin if rows is None else self.origin.index_select(0, rows)
        return self.grid.points(origin + candidates)

    @property
    @abstractmethod
    def draws(self) -> int:
        """How many random numbers a proposal takes."""

    @abstractmethod
    def start(self, seed: int, indices: Tensor, stream: str) -> None:
        """Put all samples at their starts."""

    @abstractmethod
    def plan(self, shares: list[float], draws: Tensor) -> None:
        """Prepare the next Q proposals.

        Args:
            shares: Of the variable that each changes, in (0, 1].
            draws: (B, Q, self.draws) uniform.
        """

    @abstractmethod
    def propose(self, number: int, waiting: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates.

        Args:
            number: Which of the planned proposals.
            waiting: (B,) bool, which samples want one.

        Returns:
            Positions of the samples that have a candidate worth asking about, and these candidates (rows, D).
        """

    @abstractmethod
    def take(self, rows: Tensor, candidates: Tensor) -> None:
        """Put the samples at positions ``rows`` at the candidates last proposed to them."""

    def keep(self, mask: Tensor) -> None:
        """Go on with the selected samples only."""
        self.ball, self.flat = self.ball.keep(mask), self.flat[mask]
        self.origin = None if self.origin is None else self.origin[mask]


class Flips(Moves):
    """linf: every coordinate is at one of its two bounds, and a proposal puts those of a square at one of them.

    An image that was asked about once is not asked about again: a refused one would be refused again, since
    the value to beat only grows. On small grey images that saves a fourth of the queries.

    Where the variable is added to images, all is done on their sum, which saves the adding.
    """

    def __init__(self, ball: Ball, remembers: bool, images: Tensor | None = None) -> None:
        super().__init__(ball, remembers, images)
        limit = ball.radius.unsqueeze(1).expand_as(self.flat)
        low = -limit if ball.low is None else self.grid.flat(ball.low)
        high = limit if ball.high is None else self.grid.flat(ball.high)
        if self.origin is not None:
            low, high, self.flat = self.origin + low, self.origin + high, self.origin
        self.bounds = torch.cat([low, high], dim=1)
        # A point is known by the sum of the keys of its coordinates at the upper bound, up to a constant.
        self.key = torch.zeros(len(self.flat), dtype=torch.int64, device=self.flat.device)
        self.proposed = self.key
        self.known = self.key.new_zeros(len(self.flat), _MEMORY) if remembers else None

    @property
    def points(self) -> Tensor:
        """The variable where the samples are."""
        if self.origin is None:
            return self.grid.points(self.flat)
        # Rounding may have led out of the ball.
        return self.ball.project(self.grid.points(self.flat - self.origin))

    def images(self, rows: Tensor | None, candidates: Tensor) -> Tensor:
        """The candidates themselves."""
        return self.grid.points(candidates)

    @property
    def draws(self) -> int:
        """A corner, and the side of each channel."""
        return 2 + self.grid.channels

    def start(self, seed: int, indices: Tensor, stream: str) -> None:
        """Vertical stripes one pixel wide, each channel of each on a random side."""
        grid = self.grid
        draws = randomness.uniform(seed, indices, (grid.width, grid.channels), stream=stream)
        upper = (draws < 0.5).unsqueeze(1).expand(-1, grid.height, -1, -1).flatten(1)
        low, high = self.bounds.chunk(2, dim=1)
        self.flat = torch.where(upper, high, low)

    def plan(self, shares: list[float], draws: Tensor) -> None:
        """Places and sides of the next squares."""
        self.windows = [self.grid.window(share, symmetric=False) for share in shares]
        self.corners = self.grid.corners(draws, self.windows)
        self.sides = (draws[..., 2:] < 0.5).transpose(0, 1).contiguous()

    def propose(self, number: int, waiting: Tensor) -> tuple[Tensor, Tensor]:
        """Squares moved to one side; of the waiting samples those whose image is a new one."""
        window, upper = self.windows[number], self.sides[number]
        places = self.corners[number] + self.grid.inside(window, waiting.device)
        if self.grid.channels > 1:
            upper = upper.repeat(1, window[0] * window[1])
        moved = self.bounds.gather(1, places + upper * self.flat.shape[1])
        if self.known is not None:
            waiting = waiting & self._is_new(places, moved, upper)
        rows = waiting.nonzero().squeeze(1)
        if self.known is not None:
            asked = self.proposed.index_select(0, rows)
            self.known[rows, asked & (_MEMORY - 1)] = asked
        candidates = self.flat.index_select(0, rows)
        return rows, candidates.scatter_(1, places.index_select(0, rows), moved[rows])

    def _is_new(self, places: Tensor, moved: Tensor, upper: Tensor) -> Tensor:
        """Which samples were not asked before about the image that this move gives, (B,) bool."""
        if self.known is None:
            raise TypeError("nothing was remembered")
        changed = moved != self.flat.gather(1, places)
        keys = _keys(self.flat.shape[1], places.device)[places] * changed
        self.proposed = self.key + torch.where(upper, keys, -keys).sum(1)
        met = self.known.gather(1, (self.proposed & (_MEMORY - 1)).unsqueeze(1)).squeeze(1)
        return (met != self.proposed) & (self.proposed != self.key)

    def take(self, rows: Tensor, candidates: Tensor) -> None:
        """The candidates, and their keys."""
        self.flat.index_copy_(0, rows, candidates)
        if self.known is not None:
            self.key.index_copy_(0, rows, self.proposed[rows])

    def keep(self, mask: Tensor) -> None:
        """Of all that there is per sample."""
        super().keep(mask)
        self.bounds, self.key = self.bounds[mask], self.key[mask]
        self.known = None if self.known is None else self.known[mask]


@functools.lru_cache(maxsize=8)
def _keys(count: int, device: torch.device) -> Tensor:
    """A random number of 60 bits for each coordinate, (count,) int64."""
    parts = randomness.integers(0, torch.arange(count), 2**20, (3,), stream="square/keys")
    high, middle, low = parts.unbind(1)
    return ((high << 40) | (middle << 20) | low).to(device)


@functools.lru_cache(maxsize=64)
def _inside(grid: Grid, window: tuple[int, int], device: torch.device) -> Tensor:
    rows = torch.arange(window[0], device=device).view(-1, 1, 1) * grid.width
    columns = torch.arange(window[1], device=device).view(1, -1, 1)
    channels = torch.arange(grid.channels, device=device)
    return ((rows + columns) * grid.channels + channels).view(1, -1)
