"""Attacks that follow the gradient of an objective: what they have in common, whatever their steps are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from onmanifold.attacks.base import Search
from onmanifold.attacks.core import Best, Walk
from onmanifold.attacks.restarts import RestartedAttack
from onmanifold.foundation.errors import InputError
from onmanifold.objectives import CrossEntropy, KullbackLeibler, Objective
from onmanifold.threats.base import Region, Variables
from onmanifold.threats.geometry import Start


@dataclass(frozen=True)
class GradientAttack(RestartedAttack, ABC):
    """Base of the attacks that follow the gradient of the objective.

    Attributes:
        objective: What is maximised.
        early_stop: True: a sample leaves at its first success, with that point. False: all steps are done
            and the point with the largest objective is kept; outside training a success before all else.
        restarts: Number of searches from different starts; the best point over all is kept.
        start: Where a search starts: "zero", "uniform" in the ball's volume, or "distance", uniform over
            distance and direction (Disentangling eq. 19), "surface", at distance ``radius``, or "nearby",
            0.001 times a Gaussian point (TRADES, MART).
        passes: Of a random model, over how many forward and backward passes each gradient is averaged
            (expectation over transformation, Athalye et al. 2018).
    """

    objective: Objective = field(default=CrossEntropy(), kw_only=True)
    early_stop: bool = field(default=True, kw_only=True)
    restarts: int = field(default=1, kw_only=True)
    start: Start = field(default="uniform", kw_only=True)
    passes: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.objective, KullbackLeibler) and self.start == "zero":
            raise InputError(
                "start: the divergence to the clean prediction has no gradient at the clean image; "
                "expected 'nearby', 'uniform' or 'distance', found 'zero'."
            )
        if self.passes < 1:
            raise InputError(f"passes: expected at least 1, found {self.passes}.")

    def nothing_yet(self, search: Search) -> Best:
        """The same, each gradient averaged over the passes."""
        return Best(search, self.early_stop, self.passes)

    def restart(self, walk: Walk, best: Best, number: int) -> None:
        """Ascend from a random start."""
        region = self.starting(walk.region)
        start = region.random(self.start, best.search.seed, walk.indices, number)
        self.ascend(walk, best, start)

    def starting(self, region: Region) -> Region:
        """The region that random starts are drawn from."""
        return region

    @abstractmethod
    def ascend(self, walk: Walk, best: Best, start: Variables) -> None:
        """One search from one start; points worth keeping are offered to ``best``."""
