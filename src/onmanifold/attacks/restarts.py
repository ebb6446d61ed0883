"""Attacks that search an objective again and again from other starts: what each search finds is compared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from torch import Tensor

from onmanifold.attacks.base import Attack, Found, Search
from onmanifold.attacks.core import Best, Walk
from onmanifold.attacks.engine import FrozenNetwork
from onmanifold.foundation.errors import InputError
from onmanifold.objectives import BoundObjective, Objective


class RestartedAttack(Attack, ABC):
    """Base of the attacks that maximise an objective of the user's choice from several starts.

    Subclasses have the fields ``objective``, ``early_stop`` and ``restarts``, each with its own defaults and at
    its own place among the others.
    """

    if TYPE_CHECKING:
        # Not fields of this class, which would come before those that subclasses take by position.
        objective: Objective
        early_stop: bool
        restarts: int

    def __post_init__(self) -> None:
        if self.restarts < 1:
            raise InputError(f"restarts: expected at least 1, found {self.restarts}.")

    def bind(
        self, network: FrozenNetwork, images: Tensor, labels: Tensor, targets: Tensor | None
    ) -> BoundObjective:
        """The objective on a batch."""
        return self.objective.bind(network, images, labels, targets)

    def search(self, search: Search) -> Found:
        """Search from each start, for each of the objective's targets; keep the best point of each sample."""
        best = self.nothing_yet(search)
        for turn in range(search.objective.turns):
            objective = search.objective.turn(turn)
            for restart in range(self.restarts):
                walk = best.remaining(objective)
                if walk is None:
                    return best.found
                self.restart(walk, best, turn * self.restarts + restart)
        return best.found

    def nothing_yet(self, search: Search) -> Best:
        """What is known of each sample before the first start."""
        return Best(search, self.early_stop)

    @abstractmethod
    def restart(self, walk: Walk, best: Best, number: int) -> None:
        """One search, from the start of that number; points worth keeping are offered to ``best``."""
