"""Carlini and Wagner's attack: the smallest perturbation that fools with confidence (2017, arXiv:1608.04644)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from onmanifold.attacks.base import Attack, Found, Search
from onmanifold.attacks.core import gradients_of, selected
from onmanifold.attacks.engine import FrozenNetwork
from onmanifold.attacks.smallest import Smallest
from onmanifold.attacks.updates import Adam
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.registry import ATTACKS
from onmanifold.objectives import BoundObjective, Margin, TargetedMargin
from onmanifold.threats.base import Ball, Region, Variables
from onmanifold.threats.geometry import clip

# tanh cannot reach its bounds; this near to them is near enough (as in the authors' code).
_INSIDE = 1 - 1e-6
_LARGEST_CONSTANT = 1e10

Bounds = Literal["tanh", "clip"]

# A sample leaves a round where its loss is not below this share of what it was a tenth of the steps ago.
_PROGRESS = 0.9999


@ATTACKS.register("carlini_wagner")
@dataclass(frozen=True)
class CarliniWagner(Attack):
    """Carlini and Wagner's l2 attack on any threat model; on latent balls it stays on the manifold.

    It minimises ``‖δ‖² + c · max(z_y − max over i != y of z_i + confidence, 0)`` by Adam and searches the
    smallest constant c that succeeds (binary search). The largest other logit is taken over the other classes
    alone (Disentangling eq. 20 and 21; the released code puts 0 in place of the true logit instead, which is the
    largest where all others are negative). In a linf ball the box is cut to the ball. Of several variables, each
    is measured in units of its radius.

    The smallest point found is returned where it is within the radius, else its projection on the ball, which
    counts as a failure unless it happens to fool too. The reported objective is minus its size in the ball's
    norm (several variables: the largest share of a radius, times the first one), −inf where none was found.
    With targets the sample must be taken for its target.

    Attributes:
        steps: Of Adam, for each constant.
        rounds: How many constants are tried.
        step_size: Adam's learning rate, in units of tanh's argument where there is a box and bounds are "tanh".
        bounds: How variables stay in their box. "tanh": its centre plus tanh times its half width, as in the
            paper; a coordinate that starts at a bound, such as a black pixel, hardly moves then, and the points
            found are larger by a third on images with many of them. "clip": clipped after each step.
        confidence: By how much the largest other logit must exceed the true one (κ), in units of logits.
        first_constant: The first c; it is multiplied by 10 until it succeeds.
        early_stop: Whether a sample leaves with its first success within the radius; False: the smallest
            perturbation is looked for to the end.
    """

    steps: int = 1000
    rounds: int = 9
    step_size: float = 0.01
    confidence: float = 0.0
    first_constant: float = 1e-3
    bounds: Bounds = field(default="tanh", kw_only=True)
    early_stop: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("steps", "rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: expected at least 1, found {getattr(self, name)}.")
        for name in ("step_size", "first_constant"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name}: expected a number > 0, found {getattr(self, name)}.")
        if not self.confidence >= 0:
            raise InputError(f"confidence: expected a number >= 0, found {self.confidence}.")

    def bind(
        self, network: FrozenNetwork, images: Tensor, labels: Tensor, targets: Tensor | None
    ) -> BoundObjective:
        """The margin, up to the confidence."""
        if targets is not None:
            wanted = TargetedMargin(confidence=self.confidence)
            return wanted.bind(network, images, labels, targets)
        return Margin(confidence=self.confidence).bind(network, images, labels)

    def search(self, search: Search) -> Found:
        """Minimise for one constant after the other; keep the smallest perturbation that fools."""
        # The smallest perturbation ends on the boundary itself, where low precision is no use.
        objective = replace(search.objective, network=search.network.exact)
        smallest = Smallest(search.region, self.early_stop)
        everyone = torch.arange(len(search.indices), device=search.indices.device)
        with torch.no_grad():
            zero = search.region.zero()
            values, logits = objective(search.region.render(zero))
        smallest.offer(
            everyone, zero, _size(zero, search.region), objective.finished(values, logits)
        )
        smallest.forwards += 1
        constant = torch.full_like(smallest.size, self.first_constant)
        low, high = torch.zeros_like(constant), torch.full_like(constant, _LARGEST_CONSTANT)
        for _ in range(self.rounds):
            left = smallest.under_way
            if not bool(left.any()):
                break
            run = _Run(search.region, objective, everyone, constant).keep(left)
            succeeded = self._minimise(run, smallest)
            high = torch.where(succeeded, torch.minimum(high, constant), high)
            low = torch.where(succeeded, low, torch.maximum(low, constant))
            between = (low + high) / 2
            constant = torch.where(high < _LARGEST_CONSTANT, between, 10 * constant)
        return smallest.found(search.region.project(smallest.variables))

    def _minimise(self, run: _Run, smallest: Smallest) -> Tensor:
        """All steps with one constant each; which samples succeeded at any distance, (B,) bool."""
        succeeded = torch.zeros_like(smallest.size, dtype=torch.bool)
        bends = {name: _Bend.of(ball, self.bounds) for name, ball in run.region.balls.items()}
        arguments = {name: bend.start(run.region.balls[name]) for name, bend in bends.items()}
        adam, rates = Adam(), dict.fromkeys(bends, self.step_size)
        state = adam.start(arguments)
        before = torch.full_like(run.constant, -torch.inf)
        for step in range(self.steps):
            last = step == self.steps - 1
            with torch.set_grad_enabled(not last):
                leaves = {name: tensor.detach() for name, tensor in arguments.items()}
                if not last:
                    leaves = {name: tensor.requires_grad_() for name, tensor in leaves.items()}
                points = {name: bends[name](leaf) for name, leaf in leaves.items()}
                values, logits = run.objective(run.region.render(points))
                gain = run.constant * (values - self.confidence) - _penalty(points, run.region)
            smallest.forwards[run.rows] += 1
            fooled = run.objective.finished(values.detach(), logits.detach())
            points = {name: point.detach() for name, point in points.items()}
            smallest.offer(run.rows, points, _size(points, run.region), fooled)
            succeeded[run.rows] |= fooled
            if last:
                break
            stays = smallest.under_way[run.rows]
            if step % max(1, self.steps // 10) == 0:
                # A gain is at most 0.
                stays &= gain.detach() >= _PROGRESS * before
                before = gain.detach()
            if not bool(stays.any()):
                break
            smallest.backwards[run.rows] += stays.int()
            gradients = gradients_of(gain, leaves)
            if not bool(stays.all()):
                run, state, before = run.keep(stays), state.keep(stays), before[stays]
                bends = {name: bend.keep(stays) for name, bend in bends.items()}
                arguments, gradients = selected(arguments, stays), selected(gradients, stays)
            moved, state = adam.move(run.region, arguments, gradients, rates, state)
            arguments = {name: bends[name].clip(argument) for name, argument in moved.items()}
        return succeeded


class _Run(NamedTuple):
    """The samples of a round: where, what for, which (B,), and the constant of each (B,)."""

    region: Region
    objective: BoundObjective
    rows: Tensor
    constant: Tensor

    def keep(self, mask: Tensor) -> _Run:
        """The selected ones."""
        return _Run(
            self.region.keep(mask),
            self.objective.keep(mask),
            self.rows[mask],
            self.constant[mask],
        )


class _Bend(NamedTuple):
    """A change of variables to stay in a box: centre + half · tanh; or none, and the arguments are clipped."""

    centre: Tensor | None = None
    half: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None

    @staticmethod
    def of(ball: Ball, bounds: Bounds) -> _Bend:
        """The one for a ball's box; in linf the ball is a box itself."""
        low, high = ball.low, ball.high
        if (low is None or high is None) and ball.norm == "linf":
            high = ball.radius.view(-1, *[1] * len(ball.shape)).expand(-1, *ball.shape)
            low = -high
        if low is None or high is None:
            return _Bend()
        low, high = low.view(-1, *ball.shape), high.view(-1, *ball.shape)
        if bounds == "clip":
            return _Bend(low=low, high=high)
        return _Bend((low + high) / 2, (high - low) / 2)

    def start(self, ball: Ball) -> Tensor:
        """The argument of no perturbation."""
        if self.centre is None or self.half is None:
            return ball.zero()
        at = torch.where(self.half > 0, -self.centre / self.half, 0.0)
        return torch.atanh(at.clamp(-_INSIDE, _INSIDE))

    def __call__(self, argument: Tensor) -> Tensor:
        """The variable."""
        if self.centre is None or self.half is None:
            return argument
        return self.centre + self.half * torch.tanh(argument)

    def clip(self, argument: Tensor) -> Tensor:
        """The nearest allowed argument."""
        if self.low is None or self.high is None:
            return argument
        return clip(argument, self.low, self.high)

    def keep(self, mask: Tensor) -> _Bend:
        """That of the selected samples."""
        return _Bend(*(None if part is None else part[mask] for part in self))


def _unit(region: Region) -> Tensor:
    """(B,) the radius of the first variable: what distances are measured by."""
    return next(iter(region.balls.values())).radius


def _size(points: Variables, region: Region) -> Tensor:
    """The norm of one variable; of several the largest share of a radius, times the first radius, (B,)."""
    sizes = region.size(points)
    if len(sizes) == 1:
        return next(iter(sizes.values()))
    shares = [
        torch.where(size == 0, 0.0, size / region.balls[name].radius)
        for name, size in sizes.items()
    ]
    return torch.stack(shares).amax(0) * _unit(region)


def _penalty(points: Variables, region: Region) -> Tensor:
    """‖δ‖²; of several variables the sum, each in units of its radius, times the first radius squared, (B,)."""
    squares = {name: point.flatten(1).square().sum(1) for name, point in points.items()}
    if len(squares) == 1:
        return next(iter(squares.values()))
    total = torch.zeros_like(_unit(region))
    for name, square in squares.items():
        radius = region.balls[name].radius
        total = total + torch.where(radius > 0, square / radius.square() * _unit(region) ** 2, 0.0)
    return total
