"""What the adversary may change: a threat model is a specification, a region is it around a batch."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from onmanifold.foundation.errors import InputError
from onmanifold.foundation.registry import THREATS, Component
from onmanifold.threats import geometry
from onmanifold.threats.geometry import Norm, Start

Variables = dict[str, Tensor]
"""The perturbation variables by name; each (B, ...), zero where nothing is changed."""


def check_radius(radius: float | Tensor) -> None:
    """Raises InputError unless all radii are finite numbers of at least 0."""
    values = torch.as_tensor(radius)
    if values.ndim > 1 or not bool(((values >= 0) & values.isfinite()).all()):
        raise InputError(f"radius: expected a number >= 0, or one per sample (B,), found {radius}.")


@dataclass(frozen=True)
class Ball:
    """Where one variable may be: a norm ball around zero, cut by a box that contains zero.

    Attributes:
        shape: Shape of one sample's variable.
        norm: "linf", "l2" or "l1".
        radius: (B,).
        low: (B, D) or None; at most 0.
        high: (B, D) or None; at least 0.
        common: The radius as a number where all samples share it and there is no need for one each.
    """

    shape: tuple[int, ...]
    norm: Norm
    radius: Tensor
    low: Tensor | None = None
    high: Tensor | None = None
    common: float | None = None

    @staticmethod
    def of(
        norm: Norm,
        radius: float | Tensor,
        like: Tensor,
        low: Tensor | None = None,
        high: Tensor | None = None,
    ) -> Ball:
        """The ball for a variable of the shape, dtype and device of ``like``, boxed by ``low`` and ``high``.

        Raises:
            InputError: A radius per sample whose number is not that of the samples.
        """
        radii = torch.as_tensor(radius, dtype=like.dtype, device=like.device)
        if radii.ndim == 1 and len(radii) != len(like):
            raise InputError(f"radius: found {len(radii)} values for {len(like)} samples.")
        common = float(radius) if radii.ndim == 0 else None
        radii = radii.expand(len(like)) if radii.ndim == 0 else radii
        if low is not None and high is not None:
            # A point outside the box, by rounding or because a code lies there, may stay where it is.
            low, high = low.clamp(max=0), high.clamp(min=0)
        if norm == "linf" and low is not None and high is not None:
            # Ball and box are both boxes: cut once, here, so that projecting is one clamp.
            limit = radii.view(-1, *[1] * (like.ndim - 1))
            low, high = torch.maximum(low, -limit), torch.minimum(high, limit)
        elif low is not None and high is not None:
            low, high = low.flatten(1), high.flatten(1)
        return Ball(tuple(like.shape[1:]), norm, radii, low, high, common)

    def zero(self) -> Tensor:
        """No perturbation, (B, *shape)."""
        return torch.zeros(
            len(self.radius), *self.shape, dtype=self.radius.dtype, device=self.radius.device
        )

    def random(self, start: Start, seed: int, indices: Tensor, stream: str) -> Tensor:
        """A random point of each sample's ball ∩ box; see `geometry.random_points`."""
        count = int(torch.Size(self.shape).numel())
        points = geometry.random_points(count, self.norm, self.radius, start, seed, indices, stream)
        return self.project(points.view(-1, *self.shape))

    def project(self, points: Tensor) -> Tensor:
        """The nearest point of ball ∩ box."""
        if self.norm == "linf":
            if self.low is not None and self.high is not None:
                return geometry.clip(points, self.low, self.high)
            if self.common is not None:
                return points.clamp(-self.common, self.common)
        projected = geometry.project(points.flatten(1), self.norm, self.radius, self.low, self.high)
        return projected.view_as(points)

    def ascend(self, points: Tensor, gradients: Tensor, step_size: float | Tensor) -> Tensor:
        """A step of steepest ascent in the ball's norm, not yet projected."""
        return geometry.ascend(points, gradients, self.norm, step_size, self.low, self.high)

    def size(self, points: Tensor) -> Tensor:
        """Norm of each sample's variable, (B,)."""
        return geometry.size(points, self.norm)

    def scaled_in_l1(self, factor: float) -> Ball:
        """An l1 ball with its radius multiplied; a ball of another norm as it is."""
        if self.norm != "l1" or factor == 1:
            return self
        common = None if self.common is None else factor * self.common
        return replace(self, radius=factor * self.radius, common=common)

    def keep(self, mask: Tensor) -> Ball:
        """The ball of the selected samples."""
        low = None if self.low is None else self.low[mask]
        high = None if self.high is None else self.high[mask]
        return replace(self, radius=self.radius[mask], low=low, high=high)


def check_by_norm(threat: Threat, attack: str) -> None:
    """Raises InputError unless a norm bounds each variable of the threat model."""
    if not threat.by_norm:
        raise InputError(
            f"threat: {attack} needs variables that a norm bounds, not so in {type(threat).__name__}."
        )


class Region(ABC):
    """A threat model around a batch: all that an attack works in.

    Attributes:
        balls: Where each variable may be.
    """

    balls: Mapping[str, Ball]

    @abstractmethod
    def render(self, variables: Variables) -> Tensor:
        """Images (B, C, H, W) in [0, 1] (up to float rounding) of the variables; differentiable."""

    @abstractmethod
    def keep(self, mask: Tensor) -> Region:
        """The region of the samples selected by ``mask``, (B,) bool."""

    def scaled_in_l1(self, factor: float) -> Region:
        """The same region with the radius of its l1 balls multiplied; boxes stay."""
        larger = copy.copy(self)
        larger.balls = {name: ball.scaled_in_l1(factor) for name, ball in self.balls.items()}
        return larger

    def zero(self) -> Variables:
        """No perturbation."""
        return {name: ball.zero() for name, ball in self.balls.items()}

    def random(self, start: Start, seed: int, indices: Tensor, restart: int = 0) -> Variables:
        """Random variables, the same for a (seed, index, restart) in any batch and on any device."""
        return {
            name: ball.random(start, seed, indices, f"start/{name}/{restart}")
            for name, ball in self.balls.items()
        }

    def project(self, variables: Variables) -> Variables:
        """The nearest allowed variables, each in its own ball."""
        return {name: ball.project(variables[name]) for name, ball in self.balls.items()}

    def ascend(
        self, variables: Variables, gradients: Variables, step_sizes: Mapping[str, float | Tensor]
    ) -> Variables:
        """A step of steepest ascent in each variable's own norm, not yet projected."""
        return {
            name: ball.ascend(variables[name], gradients[name], step_sizes[name])
            for name, ball in self.balls.items()
        }

    def size(self, variables: Variables) -> dict[str, Tensor]:
        """Norm of each variable, (B,) each."""
        return {name: ball.size(variables[name]) for name, ball in self.balls.items()}


class Threat(Component, ABC):
    """A specification of what the adversary may change, and how much.

    Attributes:
        by_norm: Whether a norm bounds each variable; some attacks need it.
    """

    registry = THREATS
    by_norm: ClassVar[bool] = True

    def facing(self, model: nn.Module, images: Tensor) -> Threat:
        """The threat model where this model is attacked: itself, unless what may change depends on the model.

        Args:
            model: What is attacked.
            images: (B, C, H, W) that it takes.
        """
        return self

    @abstractmethod
    def around(self, images: Tensor, labels: Tensor, codes: Tensor | None = None) -> Region:
        """Bind the specification to a batch.

        Args:
            images: (B, C, H, W) in [0, 1].
            labels: (B,) int64.
            codes: (B, code_size) codes of the images, where the threat model needs them and they are known.
        """
