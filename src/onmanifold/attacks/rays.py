"""RayS: a search over sign directions by decisions alone (Chen and Gu 2020, arXiv:2006.12792)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from onmanifold.attacks.base import Attack, AttackResult, Found, Search
from onmanifold.attacks.engine import FrozenNetwork
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.registry import ATTACKS
from onmanifold.objectives import BoundObjective, Margin
from onmanifold.threats.base import Ball, Region, Variables, check_by_norm
from onmanifold.threats.geometry import clip
from onmanifold.threats.image import ImageRegion

# After how many queries samples that are done may leave.
_CHUNK = 16
_LEAVING_SHARE = 0.05


@ATTACKS.register("rays")
@dataclass(frozen=True)
class RayS(Attack):
    """RayS: the nearest decision boundary along directions of signs; needs predictions only.

    Block by block, first of the whole vector and then of halves, quarters and so on, the signs of a direction
    are flipped where that brings the boundary nearer, and a binary search finds how near. When all blocks are
    single coordinates, it begins again with the largest ones.

    The reported objective is minus the smallest distance found, −inf where none was. An image is searched in
    all directions as far as [0, 1] goes, whatever the radius, so that the mean of the distances is the ADBD
    (average decision boundary distance; see `adbd`); other threat models up to their radius. Only a point
    within the radius is a success. Distances are those of the ball's norm: in l2 and l1 balls too, all
    coordinates move equally far. Several variables move together, each in proportion to its radius, and the
    distance is that of the first.

    Unlike the authors' code, a flip is tried out at a distance that is ``tolerance`` smaller than the best,
    since one that gains less is not worth the queries of a binary search.

    Attributes:
        queries: For each sample.
        tolerance: Of distances, in units of the radius's.
        early_stop: Whether a sample leaves at its first success; its distance is then an upper bound only.
            False, the default: the smallest distance is looked for to the end.
    """

    queries: int = 10_000
    tolerance: float = 1e-3
    early_stop: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_by_norm(self.threat, "RayS")
        if self.queries < 2:
            raise InputError(f"queries: expected at least 2, found {self.queries}.")
        if not self.tolerance > 0:
            raise InputError(f"tolerance: expected a number > 0, found {self.tolerance}.")

    def bind(
        self, network: FrozenNetwork, images: Tensor, labels: Tensor, targets: Tensor | None
    ) -> BoundObjective:
        """Any misclassification counts.

        Raises:
            InputError: Targets; RayS is untargeted.
        """
        return Margin().bind(network, images, labels, targets)

    def search(self, search: Search) -> Found:
        """Query by query; each sample is at its own block or step of a binary search."""
        # A search that ends on the boundary itself is no use in low precision.
        objective = replace(search.objective, network=search.network.exact)
        rays = _Rays.through(search.region)
        count, device = len(search.indices), search.indices.device
        distance, forwards = torch.full_like(rays.limit, torch.inf), torch.zeros_like(search.labels)
        signs = torch.ones_like(rays.scale)
        with torch.no_grad():
            wrong = objective.fooled(objective.network(search.region.render(search.region.zero())))
            forwards += 1
            distance[wrong] = 0.0
            rows = torch.arange(count, device=device)
            state = _State.begin(rays, wrong)
            for query in range(1, self.queries):
                if (query - 1) % _CHUNK == 0:
                    done = int(state.done.sum())
                    if done == len(rows):
                        break
                    if done > _LEAVING_SHARE * len(rows):
                        signs[rows] = state.signs
                        distance[rows] = torch.minimum(distance[rows], state.distance)
                        left = ~state.done
                        rows, state, rays = rows[left], state.keep(left), rays.keep(left)
                        objective = objective.keep(left)
                forwards[rows] += (~state.done).long()
                trial, at = state.trial(self.tolerance)
                fooled = objective.fooled(objective.network(rays.render(trial, at)))
                state.learn(fooled, trial, at, self.tolerance)
                if self.early_stop:
                    state.stop(rays.radius, trial)
            signs[rows] = state.signs
            distance[rows] = torch.minimum(distance[rows], state.distance)
        everything = _Rays.through(search.region)
        variables = everything.points(signs, torch.minimum(distance, everything.radius))
        passes = forwards.int()
        return Found(variables, -distance, passes, torch.zeros_like(passes))


def adbd(result: AttackResult, largest: float = 1.0) -> float:
    """Average decision boundary distance of a `RayS` on image balls (Chen and Gu 2020, section 4).

    Args:
        result: Of an attack with ``early_stop=False``.
        largest: The distance that counts for samples on which no boundary was found.

    Returns:
        The mean distance in the ball's norm; 0 for what is misclassified as it is.
    """
    return float((-result.objective).clamp(max=largest).mean())


@dataclass
class _Rays:
    """The region seen along rays from its centre.

    Attributes:
        region: Where the variables are.
        scale: (B, D) how far each coordinate of all variables goes per unit of distance.
        low: (B, D) the box.
        high: (B, D).
        limit: (B,) the largest distance that is looked at.
        radius: (B,) the largest one that is a success.
    """

    region: Region
    scale: Tensor
    low: Tensor
    high: Tensor
    limit: Tensor
    radius: Tensor

    @staticmethod
    def through(region: Region) -> _Rays:
        """The rays of a region."""
        balls = list(region.balls.values())
        first = balls[0].radius
        # Of several variables the first gives the unit, unless it may not move at all.
        unit = torch.where(first > 0, first, 1.0) if len(balls) > 1 else first
        scales, lows, highs = [], [], []
        for ball in balls:
            zero = ball.zero().flatten(1)
            power = {"linf": 0.0, "l2": 0.5, "l1": 1.0}[ball.norm]
            share = ball.radius / unit if len(balls) > 1 else torch.ones_like(unit)
            scales.append((share / zero.shape[1] ** power).unsqueeze(1).expand_as(zero))
            low, high = _box(region, ball, zero)
            lows.append(low)
            highs.append(high)
        scale = torch.cat(scales, dim=1)
        # Where every coordinate has moved by 1, an image is at the edge of [0, 1].
        limit = 1 / scale.amin(1) if isinstance(region, ImageRegion) else unit
        return _Rays(region, scale, torch.cat(lows, dim=1), torch.cat(highs, dim=1), limit, unit)

    def points(self, signs: Tensor, distance: Tensor) -> Variables:
        """The variables at a distance (B,) along directions (B, D)."""
        moved = clip(signs * self.scale * distance.unsqueeze(1), self.low, self.high)
        sizes = [torch.Size(ball.shape).numel() for ball in self.region.balls.values()]
        return {
            name: part.view(-1, *ball.shape)
            for (name, ball), part in zip(
                self.region.balls.items(), torch.split(moved, sizes, dim=1), strict=True
            )
        }

    def render(self, signs: Tensor, distance: Tensor) -> Tensor:
        """The images there."""
        return self.region.render(self.points(signs, distance))

    def keep(self, mask: Tensor) -> _Rays:
        """Those of the selected samples."""
        return _Rays(
            self.region.keep(mask),
            self.scale[mask],
            self.low[mask],
            self.high[mask],
            self.limit[mask],
            self.radius[mask],
        )


def _box(region: Region, ball: Ball, zero: Tensor) -> tuple[Tensor, Tensor]:
    """How far the coordinates may go; those of an image beyond its ball too."""
    if isinstance(region, ImageRegion):
        return -region.images.flatten(1), 1 - region.images.flatten(1)
    if ball.low is None or ball.high is None:
        return zero - torch.inf, zero + torch.inf
    return ball.low.flatten(1), ball.high.flatten(1)


@dataclass
class _State:
    """How far each sample has come.

    Attributes:
        signs: (B, D) the best direction.
        distance: (B,) of the boundary along it.
        limit: (B,) the largest distance that is looked at.
        level: (B,) int64: blocks are 1/2^level of the vector; −1: no flip yet.
        block: (B,) int64 which one is flipped.
        searching: (B,) bool: a binary search is under way.
        near: (B,) its lower end.
        far: (B,) its upper end, where the sample is fooled.
        done: (B,) bool.
    """

    signs: Tensor
    distance: Tensor
    limit: Tensor
    level: Tensor
    block: Tensor
    searching: Tensor
    near: Tensor
    far: Tensor
    done: Tensor

    @staticmethod
    def begin(rays: _Rays, done: Tensor) -> _State:
        zero = torch.zeros_like(done, dtype=torch.int64)
        infinite = torch.full_like(rays.limit, torch.inf)
        return _State(
            torch.ones_like(rays.scale),
            infinite,
            rays.limit,
            zero - 1,
            zero,
            torch.zeros_like(done),
            torch.zeros_like(rays.limit),
            infinite,
            done | (rays.limit == 0),
        )

    def keep(self, mask: Tensor) -> _State:
        """The state of the selected samples."""
        kept: dict[str, Any] = {name: value[mask] for name, value in vars(self).items()}
        return _State(**kept)

    def trial(self, tolerance: float) -> tuple[Tensor, Tensor]:
        """The direction and the distance to ask about."""
        size = self._block_size()
        begin = (self.block * size).unsqueeze(1)
        places = torch.arange(self.signs.shape[1], device=size.device)
        inside = (places >= begin) & (places < begin + size.unsqueeze(1))
        flipped = inside & (self.level >= 0).unsqueeze(1)
        trial = torch.where(flipped, -self.signs, self.signs)
        first = torch.minimum(self.distance - tolerance, self.limit).clamp(min=0)
        return trial, torch.where(self.searching, (self.near + self.far) / 2, first)

    def learn(self, fooled: Tensor, trial: Tensor, at: Tensor, tolerance: float) -> None:
        """Take in the answer; go on to the next block where a search is over."""
        fooled = fooled & ~self.done
        begins = fooled & ~self.searching
        self.near = torch.where(self.searching & ~fooled, at, self.near)
        self.near = torch.where(begins, 0.0, self.near)
        self.far = torch.where(fooled, at, self.far)
        asked = ~self.done & (self.searching | begins)
        over = asked & (self.far - self.near <= tolerance)
        self._settle(over, trial)
        refused = ~self.done & ~self.searching & ~begins
        self.searching = asked & ~over
        self._advance(over | refused)

    def stop(self, radius: Tensor, trial: Tensor) -> None:
        """Samples with a point within the radius are done."""
        inside = self.searching & (self.far <= radius)
        self._settle(inside, trial)
        self.done = self.done | (self.distance <= radius)

    def _settle(self, mask: Tensor, trial: Tensor) -> None:
        self.signs = torch.where(mask.unsqueeze(1), trial, self.signs)
        self.distance = torch.where(mask, self.far, self.distance)

    def _block_size(self) -> Tensor:
        """(B,) D / 2^level, rounded up."""
        blocks = 2 ** self.level.clamp(min=0)
        return (self.signs.shape[1] + blocks - 1) // blocks

    def _advance(self, mask: Tensor) -> None:
        size, count = self._block_size(), self.signs.shape[1]
        last = ((self.block + 1) * size >= count) | (self.level < 0)
        level = torch.where(last, self.level + 1, self.level)
        # After the single coordinates, the whole vector again.
        level = torch.where(last & (size == 1) & (self.level >= 0), 0, level)
        self.block = torch.where(mask, torch.where(last, 0, self.block + 1), self.block)
        self.level = torch.where(mask, level, self.level)
