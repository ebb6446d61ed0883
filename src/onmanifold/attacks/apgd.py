"""Auto-PGD: steepest ascent that chooses its own step sizes (Croce and Hein 2020; l1: Croce and Hein 2021)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from onmanifold.attacks.core import (
    Best,
    Point,
    Walk,
    evaluate,
    fooled_of,
    going_on,
    replace_rows,
    selected,
)
from onmanifold.attacks.gradient import GradientAttack
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.registry import ATTACKS
from onmanifold.threats.base import Ball, Region, Variables
from onmanifold.threats.geometry import Start

# Weight of the new step against the previous one.
_MOMENTUM = 0.75
# The l1 ball shrinks to its radius in phases: factor on the radius, and share of the steps.
_L1_PHASES = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))
# l1: share of the coordinates that the first steps move, and by how much fewer of them each further check allows.
_L1_SHARE, _L1_NARROWING = 0.2, 1.5
# l1: what a step size is divided by at a check, and its least share of the radius.
_L1_SHRINKING, _L1_LEAST = 1.5, 0.1


def checkpoints(steps: int) -> list[int]:
    """After which steps APGD decides whether to halve the step sizes (Croce and Hein 2020, section 3.1).

    >>> checkpoints(100)
    [22, 41, 57, 70, 80, 87, 93, 99]
    """
    window, shorter, shortest = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    found, at = [], window
    while at <= steps:
        found.append(at)
        window = max(window - shorter, shortest)
        at += window
    return found


@ATTACKS.register("apgd")
@dataclass(frozen=True)
class APGD(GradientAttack):
    """Auto-PGD (Croce and Hein 2020): no step size to choose, on any threat model.

    Steps begin at twice the radius. At each of the `checkpoints` the step sizes of a sample are halved, and it
    goes back to its best point, where the objective rose in too few of the last steps or has not improved since
    the last check. With objective "targeted_dlr" this is APGD-T.

    In an l1 ball each step moves only the coordinates of largest gradient, as many as the best point suggests,
    and the ball shrinks from three times the radius to the radius (Croce and Hein 2021).

    Attributes:
        steps: N.
        rising_share: Step sizes are halved where the objective rose in at most this share of the steps (ρ).
    """

    steps: int = 100
    rising_share: float = 0.75
    start: Start = field(default="surface", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise InputError(f"steps: expected at least 1, found {self.steps}.")
        if not 0 <= self.rising_share <= 1:
            raise InputError(
                f"rising_share: expected a number in [0, 1], found {self.rising_share}."
            )

    def starting(self, region: Region) -> Region:
        """Where searches start: in the largest of the shrinking l1 balls."""
        return region.scaled_in_l1(_L1_PHASES[0][0])

    def ascend(self, walk: Walk, best: Best, start: Variables) -> None:
        """All steps from one start; in l1 balls, phase by phase."""
        if all(ball.norm != "l1" for ball in walk.region.balls.values()):
            self._phase(walk, best, start, self.steps)
            return
        done = 0
        for number, (factor, share) in enumerate(_L1_PHASES):
            last = number == len(_L1_PHASES) - 1
            steps = self.steps - done if last else int(share * self.steps)
            done += steps
            larger = replace(walk, region=walk.region.scaled_in_l1(factor))
            start = larger.region.project(start)
            start = self._phase(larger, best, start, steps, first=number == 0, offers=last)

    def _phase(
        self,
        walk: Walk,
        best: Best,
        start: Variables,
        steps: int,
        first: bool = True,
        offers: bool = True,
    ) -> Variables:
        """Some steps in one ball.

        Args:
            walk: The samples.
            best: Where points are offered.
            start: Where to begin.
            steps: How many.
            first: Whether ``start`` is random, and not what an earlier phase found.
            offers: Whether the points count; those outside the true ball do not. Only then samples leave.

        Returns:
            The best points, where none left.
        """
        point = _evaluated(walk, best, start, offers, last=steps == 0)
        rest = going_on(walk, best, point, start) if steps else None
        if rest is None:
            return start
        left, walk, gradients = rest
        values = point.values.detach()
        if left is not None:
            start, values = selected(start, left), values[left]
        state = _State.begin(walk.region, start, gradients, values, first)
        checks = set(checkpoints(steps))
        sparse_checks = max(int(0.04 * steps), 1)
        for step in range(1, steps + 1):
            state.move(walk.region, _MOMENTUM if step > 1 else 1.0)
            point = _evaluated(walk, best, state.variables, offers, last=step == steps)
            values = point.values.detach()
            if step == steps:
                state.note(values, None)
                break
            rest = going_on(walk, best, point, state.variables)
            if rest is None:
                break
            left, walk, gradients = rest
            if left is not None:
                state, values = state.keep(left), values[left]
            state.note(values, gradients)
            if step in checks:
                state.check(self.rising_share)
            if step % sparse_checks == 0:
                state.check_sparsity(walk.region)
        return state.best


def _evaluated(walk: Walk, best: Best, variables: Variables, offers: bool, last: bool) -> Point:
    point = evaluate(walk, variables, not last, best.passes)
    best.count(walk, backward=not last)
    if offers:
        values = point.values.detach()
        fooled = fooled_of(walk, best, variables, values, point.logits) if best.judges else None
        best.offer(walk, variables, values, fooled)
    return point


@dataclass
class _State:
    """What APGD remembers of each sample.

    Attributes:
        variables: Where the samples are.
        previous: Where they were a step before.
        gradients: At the variables.
        best: The point of the largest value in this search.
        best_gradients: There.
        best_value: (B,).
        value: (B,) the last one.
        step_sizes: (B,) of each variable.
        steps: Since the last check.
        rises: (B,) how often the value rose since then.
        halved: (B,) whether the last check halved the step sizes.
        checked_value: (B,) the best value at the last check.
        moving: (B,) of each variable in an l1 ball: how many coordinates a step moves.
        support: (B,) the same: how many coordinates of the best point were not zero at the last check.
    """

    variables: Variables
    previous: Variables
    gradients: Variables
    best: Variables
    best_gradients: Variables
    best_value: Tensor
    value: Tensor
    step_sizes: Variables
    steps: int
    rises: Tensor
    halved: Tensor
    checked_value: Tensor
    moving: Variables
    support: Variables

    @staticmethod
    def begin(
        region: Region, start: Variables, gradients: Variables, values: Tensor, first: bool
    ) -> _State:
        sparse = {name: ball for name, ball in region.balls.items() if ball.norm == "l1"}
        if first:
            support = {name: _size(ball).expand(len(values)) for name, ball in sparse.items()}
            moving = {name: _L1_SHARE * count for name, count in support.items()}
        else:
            support = {name: _support(start[name]) for name in sparse}
            moving = {name: count / _L1_NARROWING for name, count in support.items()}
        return _State(
            # Copies: the state is changed in place.
            _copies(start),
            start,
            _copies(gradients),
            _copies(start),
            gradients,
            values,
            values,
            {
                name: ball.radius if ball.norm == "l1" else 2 * ball.radius
                for name, ball in region.balls.items()
            },
            0,
            torch.zeros_like(values, dtype=torch.int32),
            # As if halved already: the first check has no earlier one to compare with.
            torch.ones_like(values, dtype=torch.bool),
            values,
            moving,
            support,
        )

    def keep(self, mask: Tensor) -> _State:
        """The state of the selected samples."""
        kept: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, dict):
                kept[name] = selected(value, mask)
            elif isinstance(value, Tensor):
                kept[name] = value[mask]
        return replace(self, **kept)

    def move(self, region: Region, weight: float) -> None:
        """A step along the gradient, and, but in l1 balls, along the step before."""
        moved: Variables = {}
        for name, ball in region.balls.items():
            here, gradient, size = (
                self.variables[name],
                self.gradients[name],
                self.step_sizes[name],
            )
            if ball.norm == "l1":
                moved[name] = ball.project(_sparse_step(here, gradient, size, self.moving[name]))
                continue
            ahead = ball.project(ball.ascend(here, gradient, size))
            if weight < 1:
                ahead = ahead.sub_(here).mul_(weight).add_(here)
                ahead = ball.project(ahead.add_(here - self.previous[name], alpha=1 - weight))
            moved[name] = ahead
        self.previous, self.variables = self.variables, moved

    def note(self, values: Tensor, gradients: Variables | None) -> None:
        """Take in what was found after a step."""
        improved = values > self.best_value
        self.rises += values > self.value
        self.steps += 1
        self.value = values
        self.best_value = torch.where(improved, values, self.best_value)
        replace_rows(self.best, self.variables, improved)
        if gradients is not None:
            self.gradients = gradients
            replace_rows(self.best_gradients, gradients, improved)

    def check(self, rising_share: float) -> None:
        """Halve the step sizes of the samples that make no progress, and send them back to their best points."""
        stalled = self.rises <= rising_share * self.steps
        stalled |= ~self.halved & (self.checked_value >= self.best_value)
        for name, size in self.step_sizes.items():
            if name not in self.moving:
                self.step_sizes[name] = torch.where(stalled, size / 2, size)
        dense = [name for name in self.variables if name not in self.moving]
        self._go_back(stalled, dense)
        self.halved, self.checked_value = stalled, self.best_value
        self.rises, self.steps = torch.zeros_like(self.rises), 0

    def check_sparsity(self, region: Region) -> None:
        """In l1 balls: steps as sparse as the best point, at full size where that has become sparser."""
        for name, before in self.support.items():
            radius = region.balls[name].radius
            support = _support(self.best[name])
            sparser = support < 0.95 * before
            smaller = (self.step_sizes[name] / _L1_SHRINKING).maximum(_L1_LEAST * radius)
            self.step_sizes[name] = torch.where(sparser, radius, smaller)
            self.moving[name], self.support[name] = support / _L1_NARROWING, support
            self._go_back(sparser, [name])

    def _go_back(self, mask: Tensor, names: list[str]) -> None:
        for now, best in (
            (self.variables, self.best),
            (self.gradients, self.best_gradients),
        ):
            replace_rows(now, {name: best[name] for name in names}, mask)


def _sparse_step(points: Tensor, gradients: Tensor, step_size: Tensor, moving: Tensor) -> Tensor:
    """Move the coordinates of largest gradient, all by the same and together by the step size."""
    slope = gradients.flatten(1)
    largest = slope.abs().sort(dim=1, descending=True).values
    # A whole number of coordinates, which rounding may have left a little above.
    last = moving.round(decimals=3).ceil().long().clamp(1, slope.shape[1]) - 1
    signs = slope.sign() * (slope.abs() >= largest.gather(1, last.unsqueeze(1)))
    count = signs.abs().sum(1).clamp(min=1)
    return points + ((step_size / count).unsqueeze(1) * signs).view_as(points)


def _size(ball: Ball) -> Tensor:
    return ball.radius.new_tensor(float(torch.Size(ball.shape).numel()))


def _support(points: Tensor) -> Tensor:
    return (points != 0).flatten(1).sum(1).to(points.dtype)


def _copies(variables: Variables) -> Variables:
    return {name: tensor.clone() for name, tensor in variables.items()}
