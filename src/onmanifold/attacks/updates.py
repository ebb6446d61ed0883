"""How a gradient attack moves its variables: update rules, each with its own per-sample state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from onmanifold.threats.base import Region, Variables

StepSizes = Mapping[str, float | Tensor]


class State(NamedTuple):
    """What an update rule remembers: named per-sample tensors for each variable, and the steps taken."""

    memory: dict[str, Variables]
    steps: int

    def keep(self, mask: Tensor) -> State:
        """The state of the selected samples."""
        memory = {
            name: {variable: tensor[mask] for variable, tensor in tensors.items()}
            for name, tensors in self.memory.items()
        }
        return State(memory, self.steps)


class Update(ABC):
    """A rule that turns gradients into a step; the projection follows it, outside."""

    def start(self, variables: Variables) -> State:
        """The state before the first step."""
        return State({}, 0)

    @abstractmethod
    def move(
        self,
        region: Region,
        variables: Variables,
        gradients: Variables,
        step_sizes: StepSizes,
        state: State,
    ) -> tuple[Variables, State]:
        """The moved variables, not yet projected, and the next state."""


class Steepest(Update):
    """Steepest ascent in each variable's own norm: sign for linf, normalised gradient for l2."""

    def move(
        self,
        region: Region,
        variables: Variables,
        gradients: Variables,
        step_sizes: StepSizes,
        state: State,
    ) -> tuple[Variables, State]:
        """One step along the present gradient."""
        return region.ascend(variables, gradients, step_sizes), state


@dataclass(frozen=True)
class Momentum(Update):
    """Steepest ascent along the accumulated gradient: g ← μ g + ∇ / ‖∇‖₁ (Dong et al. 2018)."""

    decay: float = 1.0

    def start(self, variables: Variables) -> State:
        """No momentum yet."""
        return State({"momentum": {name: torch.zeros_like(v) for name, v in variables.items()}}, 0)

    def move(
        self,
        region: Region,
        variables: Variables,
        gradients: Variables,
        step_sizes: StepSizes,
        state: State,
    ) -> tuple[Variables, State]:
        """One step along the momentum."""
        momentum = {
            name: self.decay * state.memory["momentum"][name] + _over_l1(gradient)
            for name, gradient in gradients.items()
        }
        moved = region.ascend(variables, momentum, step_sizes)
        return moved, State({"momentum": momentum}, state.steps + 1)


@dataclass(frozen=True)
class Adam(Update):
    """Adam per coordinate (Kingma and Ba 2015), the step size as learning rate."""

    first_decay: float = 0.9
    second_decay: float = 0.999
    epsilon: float = 1e-8

    def start(self, variables: Variables) -> State:
        """Both moments zero."""
        return State(
            {
                moment: {name: torch.zeros_like(v) for name, v in variables.items()}
                for moment in ("first", "second")
            },
            0,
        )

    def move(
        self,
        region: Region,
        variables: Variables,
        gradients: Variables,
        step_sizes: StepSizes,
        state: State,
    ) -> tuple[Variables, State]:
        """One step of Adam, upwards."""
        steps = state.steps + 1
        first, second, moved = {}, {}, {}
        for name, gradient in gradients.items():
            first[name] = torch.lerp(state.memory["first"][name], gradient, 1 - self.first_decay)
            second[name] = torch.lerp(
                state.memory["second"][name], gradient.square(), 1 - self.second_decay
            )
            mean = first[name] / (1 - self.first_decay**steps)
            spread = (second[name] / (1 - self.second_decay**steps)).sqrt()
            size = step_sizes[name]
            column = size.view(-1, *[1] * (gradient.ndim - 1)) if isinstance(size, Tensor) else size
            moved[name] = variables[name] + column * mean / (spread + self.epsilon)
        return moved, State({"first": first, "second": second}, steps)


def _over_l1(gradient: Tensor) -> Tensor:
    length = gradient.abs().flatten(1).sum(1)
    return gradient / torch.where(length > 0, length, 1.0).view(-1, *[1] * (gradient.ndim - 1))
