"""Learning-rate schedules: a factor on the learning rate as a function of the progress in epochs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from dataclasses import dataclass

from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.registry import Component, Registry

SCHEDULES: Registry[Schedule] = Registry("schedule")


class Schedule(Component, ABC):
    """How the learning rate changes. The loop asks once per step, at the middle of the step."""

    registry = SCHEDULES

    @abstractmethod
    def factor(self, progress: float, epochs: int) -> float:
        """The factor on the learning rate.

        Args:
            progress: Epochs done, in (0, epochs); the middle of the first of four steps is at 0.125.
            epochs: Length of the training.
        """


@SCHEDULES.register("constant")
@dataclass(frozen=True)
class Constant(Schedule):
    """The learning rate stays as it is."""

    def factor(self, progress: float, epochs: int) -> float:
        return 1.0


@SCHEDULES.register("exponential")
@dataclass(frozen=True)
class Exponential(Schedule):
    """Multiplied by ``decay`` after each epoch (Disentangling section 3.1: 0.95).

    >>> round(Exponential(decay=0.5).factor(2.9, epochs=20), 3)
    0.25
    """

    decay: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise ConfigError(f"decay: expected a number in (0, 1], found {self.decay}.")

    def factor(self, progress: float, epochs: int) -> float:
        return float(self.decay ** math.floor(progress))


@SCHEDULES.register("step")
@dataclass(frozen=True)
class Step(Schedule):
    """Multiplied by ``decay`` at each milestone.

    Attributes:
        milestones: Epochs after which the learning rate drops, such as (75, 90).
        decay: The factor of each drop.

    >>> Step(milestones=(75, 90), decay=0.1).factor(75.2, epochs=120)
    0.1
    """

    milestones: tuple[float, ...]
    decay: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))
        if list(self.milestones) != sorted(self.milestones):
            raise ConfigError(f"milestones: expected rising epochs, found {self.milestones}.")
        if not 0 < self.decay <= 1:
            raise ConfigError(f"decay: expected a number in (0, 1], found {self.decay}.")

    def factor(self, progress: float, epochs: int) -> float:
        return float(self.decay ** bisect_right(self.milestones, progress))


@SCHEDULES.register("cyclic")
@dataclass(frozen=True)
class Cyclic(Schedule):
    """Linear between given points; the defaults are those of DMAT's code, where the learning rate is 0.4.

    Attributes:
        epochs: Where the points lie, rising from 0; stretched so that the last is the end of training.
        factors: The factor at each point.

    >>> Cyclic().factor(3.5, epochs=20)
    0.55
    """

    epochs: tuple[float, ...] = (0, 1, 6, 12, 15, 20)
    factors: tuple[float, ...] = (0, 1, 0.1, 0.01, 0.001, 0.00025)

    def __post_init__(self) -> None:
        object.__setattr__(self, "epochs", tuple(self.epochs))
        object.__setattr__(self, "factors", tuple(self.factors))
        rising = all(
            before < after for before, after in zip(self.epochs, self.epochs[1:], strict=False)
        )
        if len(self.epochs) < 2 or self.epochs[0] != 0 or not rising:
            raise ConfigError(f"epochs: expected at least two, rising from 0, found {self.epochs}.")
        if len(self.factors) != len(self.epochs) or not all(
            0 <= f < math.inf for f in self.factors
        ):
            raise ConfigError(
                f"factors: expected {len(self.epochs)} numbers >= 0, one per point, found {self.factors}."
            )

    def factor(self, progress: float, epochs: int) -> float:
        place = min(progress / epochs, 1.0) * self.epochs[-1]
        right = min(max(bisect_right(self.epochs, place), 1), len(self.epochs) - 1)
        start, end = self.epochs[right - 1], self.epochs[right]
        share = (place - start) / (end - start)
        return self.factors[right - 1] + share * (self.factors[right] - self.factors[right - 1])


@SCHEDULES.register("cosine")
@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from 1 to ``final``, after a linear warm-up.

    Attributes:
        warmup: Epochs of linear warm-up from 0.
        final: The factor at the end.

    >>> round(Cosine().factor(10, epochs=20), 12)
    0.5
    """

    warmup: float = 0.0
    final: float = 0.0

    def __post_init__(self) -> None:
        if not self.warmup >= 0:
            raise ConfigError(f"warmup: expected a number of epochs >= 0, found {self.warmup}.")
        if not 0 <= self.final <= 1:
            raise ConfigError(f"final: expected a number in [0, 1], found {self.final}.")

    def factor(self, progress: float, epochs: int) -> float:
        if progress < self.warmup:
            return progress / self.warmup
        share = (progress - self.warmup) / max(epochs - self.warmup, 1e-12)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * min(share, 1.0))) / 2
