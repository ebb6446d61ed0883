"""AutoAttack: a cascade of attacks without parameters, on every threat model (Croce and Hein 2020)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from onmanifold.attacks.apgd import APGD
from onmanifold.attacks.base import Attack, Found, Search, judged
from onmanifold.attacks.engine import FrozenNetwork
from onmanifold.attacks.fab import FAB
from onmanifold.attacks.square import Square
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.registry import ATTACKS, nearest
from onmanifold.objectives import DLR, BoundObjective, Margin, TargetedDLR
from onmanifold.threats import ImageBall
from onmanifold.threats.base import Variables

CLEAN = "clean"
"""Name of what fooled the model where no attack was needed."""
Member = Literal["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"]

# Member n searches with the seed plus n strides: no two members of a run share a start, nor do any of two runs
# whose seeds differ by less than a stride.
_SEED_STRIDE = 1_000_003


@ATTACKS.register("autoattack")
@dataclass(frozen=True)
class AutoAttack(Attack):
    """A cascade of attacks: each is given the samples that withstood those before it.

    - "standard": APGD-CE, APGD-T, FAB-T, Square. In an l1 ball APGD-CE has 5 restarts and APGD-T 5 targets;
      outside of image balls, where a few variables often have several maxima, APGD-CE has 5 restarts too.
    - "plus": APGD-CE and APGD-DLR with 5 restarts, FAB with 5, Square, APGD-T, FAB-T.
    - "rand", for random models: APGD-CE and APGD-DLR, each gradient averaged over 20 passes.

    On threat models other than `ImageBall` FAB is left out, and Square searches the perturbation variables: a
    parameter-free attack on the manifold, and on both spaces at once. In a `PerceptualBall`, which no norm of the
    variables bounds, Square is left out too. Success after each member is what the model
    itself says of its images. `AttackResult.found_by` and the ledger name the member that fooled it.

    Attributes:
        version: "standard", "plus" or "rand".
        only: Names of members, to run some only; None: all of the version.
        steps: Of APGD and FAB.
        queries: Of Square.
    """

    version: Literal["standard", "plus", "rand"] = "standard"
    only: tuple[Member, ...] | None = field(default=None, kw_only=True)
    steps: int = field(default=100, kw_only=True)
    queries: int = field(default=5000, kw_only=True)

    def __post_init__(self) -> None:
        known = self._makers()
        for name in self.only or ():
            if name not in known:
                raise InputError(f"only: no member {name!r} here.{nearest(str(name), known)}")
        if self.only == ():
            raise InputError("only: expected at least one member, found none.")
        # Made once, so that wrong numbers are met now and not after the first member.
        _ = self.cascade

    @property
    def cascade(self) -> dict[str, Attack]:
        """The members by name, in their order."""
        makers = self._makers()
        return {name: make() for name, make in makers.items() if name in (self.only or makers)}

    @property
    def members(self) -> tuple[str, ...]:
        """What `AttackResult.found_by` may name."""
        return (CLEAN, *self.cascade)

    def _makers(self) -> dict[str, Callable[[], Attack]]:
        threat, engine, steps = self.threat, self.engine, self.steps
        standard, plus = self.version == "standard", self.version == "plus"
        images = isinstance(threat, ImageBall)
        l1 = isinstance(threat, ImageBall) and threat.norm == "l1"
        # Where one start often ends in a poor maximum: in l1 balls, and with few variables.
        rugged = l1 or not images
        passes = 20 if self.version == "rand" else 1
        makers: dict[str, Callable[[], Attack]] = {
            "apgd-ce": lambda: APGD(
                threat,
                steps,
                restarts=5 if plus or (standard and rugged) else 1,
                passes=passes,
                engine=engine,
            ),
            "apgd-dlr": lambda: APGD(
                threat,
                steps,
                objective=DLR(),
                restarts=5 if plus else 1,
                passes=passes,
                engine=engine,
            ),
            "apgd-t": lambda: APGD(
                threat, steps, objective=TargetedDLR(5 if standard and l1 else 9), engine=engine
            ),
            "fab": lambda: FAB(threat, steps, targets=None, restarts=5, engine=engine),
            "fab-t": lambda: FAB(threat, steps, engine=engine),
            "square": lambda: Square(threat, self.queries, engine=engine),
        }
        order = {
            "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
            "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
            "rand": ("apgd-ce", "apgd-dlr"),
        }[self.version]
        possible = {"fab": images, "fab-t": images, "square": threat.by_norm}
        return {name: makers[name] for name in order if possible.get(name, True)}

    def bind(
        self, network: FrozenNetwork, images: Tensor, labels: Tensor, targets: Tensor | None
    ) -> BoundObjective:
        """Any misclassification counts; each member binds an objective of its own."""
        return Margin().bind(network, images, labels, targets)

    def search(self, search: Search) -> Found:
        """Member by member, each on the samples that are still classified correctly."""
        cascade = _Cascade(search)
        for number, member in enumerate(self.cascade.values(), start=1):
            if not bool(cascade.robust.any()):
                break
            cascade.take(member, number)
        return cascade.found()


class _Cascade:
    """What the members found so far.

    Attributes:
        by: (B,) number of the member whose point is kept; 0 where none found a better one than the start.
        robust: (B,) bool, which samples are still classified correctly.
    """

    def __init__(self, search: Search) -> None:
        self.search = search
        self.variables: Variables = search.region.zero()
        count = torch.zeros_like(search.indices, dtype=torch.int32)
        self.forwards, self.backwards = count, count.clone()
        self.by = torch.zeros_like(search.indices)
        self.robust = torch.ones_like(search.indices, dtype=torch.bool)
        self.margin = torch.full_like(search.images.flatten(1)[:, 0], -torch.inf)
        self.judge(0, self.variables)

    def take(self, member: Attack, number: int) -> None:
        """Run a member on the samples that are still robust."""
        search, robust = self.search, self.robust
        part = search.keep(robust)
        seed = search.seed + number * _SEED_STRIDE
        objective = member.bind(part.network, part.images, part.labels, None)
        found = member.search(replace(part, objective=objective, seed=seed))
        self.forwards[robust] += found.forwards
        self.backwards[robust] += found.backwards
        self.judge(number, found.variables)

    def judge(self, number: int, points: Variables) -> None:
        """Let the model itself say which points fool it, and keep those, else those of the largest margin."""
        search, positions = self.search, self.robust.nonzero().squeeze(1)
        part = search.keep(self.robust)
        with torch.no_grad():
            images = part.region.render(points).clamp(0, 1)
            fooled, _ = judged(search.network.original, images, part.objective, search.random)
            margin, _ = part.objective(images)
        better = fooled | (margin > self.margin[positions])
        rows = positions[better]
        self.by[rows] = number
        self.robust = self.robust.index_fill(0, positions[fooled], False)
        self.margin[rows] = margin[better]
        for name, tensor in points.items():
            self.variables[name] = self.variables[name].index_copy(0, rows, tensor[better])

    def found(self) -> Found:
        """All of it."""
        return Found(self.variables, self.margin, self.forwards, self.backwards, self.by)
