"""What all checks work on: the model, some samples, a threat model, and the outcomes of attacks already run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from onmanifold.attacks import APGD, PGD, Attack
from onmanifold.attacks.engine import full_float32, untouched
from onmanifold.evaluation.audits.balls import label_of, scaled
from onmanifold.evaluation.audits.subject import Subject
from onmanifold.evaluation.ledger import Evaluation
from onmanifold.objectives import DLR, CrossEntropy, Margin, TargetedDLR
from onmanifold.threats import Threat, Variables
from onmanifold.threats.base import Region

Bools = npt.NDArray[np.bool_]

# Over how many passes a random model is judged: one failure may be luck.
_PASSES = 11
# Of the second look at what only a black box breaks.
_RESTARTS = 3
# How torch says that the output does not depend on the input through anything differentiable.
_NO_GRADIENT = ("does not require grad", "appears to not have been used")


@dataclass(frozen=True)
class Budget:
    """How much an audit may spend.

    Attributes:
        samples: How many samples are examined where the caller does not say.
        steps: Of the gradient attacks.
        factor: How many times more steps count as many more.
        queries: Of the square attack.
        decision_queries: Of RayS, which sees decisions only; 0: it is left out.
        draws: Largest number of random draws.
        planted: Samples with a planted adversarial example.
        student_steps: For how many batches the surrogate is trained.
        targeted: Whether white box includes APGD-T.
    """

    samples: int = 200
    steps: int = 40
    factor: int = 5
    queries: int = 1000
    decision_queries: int = 0
    draws: int = 200
    planted: int = 24
    student_steps: int = 200
    targeted: bool = False


BUDGETS = {
    "quick": Budget(),
    "thorough": Budget(
        samples=1000,
        steps=100,
        queries=5000,
        decision_queries=2000,
        draws=500,
        planted=100,
        student_steps=1000,
        targeted=True,
    ),
}


@dataclass(frozen=True)
class Outcome:
    """What an attack did to the samples that the model gets right on clean images.

    Attributes:
        broken: (M,) bool.
        images: (M, C, H, W) that it returned.
        variables: The perturbations, (M, ...) each.
        forwards: The most forward passes that it spent on a sample.
        differentiable: False where there was no gradient to follow, not even zero.
    """

    broken: Bools
    images: Tensor
    variables: Variables
    forwards: int
    differentiable: bool = True


@dataclass(frozen=True)
class Saved:
    """An evaluation that is audited too, and the directory of its images where there is one."""

    evaluation: Evaluation
    directory: Path | None


@dataclass
class Study:
    """A subject in one threat model.

    Attributes:
        subject: The model and the samples.
        threat: What the adversary may change.
        attacks: The attacks under audit, by name; all on ``threat``.
        budget: How much may be spent.
        surrogate: A model to transfer images from; None: one is trained.
        saved: The evaluation under audit, or None.
    """

    subject: Subject
    threat: Threat
    attacks: Mapping[str, Attack]
    budget: Budget
    surrogate: nn.Module | None = None
    saved: Saved | None = None
    _outcomes: dict[str, Outcome] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """Of all that is random."""
        return self.subject.seed

    @cached_property
    def label(self) -> str:
        """A short name of the threat model."""
        return label_of(self.threat)

    @property
    def right(self) -> int:
        """M, how many samples can be attacked: those that the model gets right."""
        return int(self.subject.right.sum())

    def accuracy(self, broken: Bools) -> float:
        """Share of all samples that are right and not among the broken (M,)."""
        return float((~broken).sum() / len(self.subject.labels))

    def run(self, attack: Attack) -> Outcome:
        """What an attack does to the samples that are right; computed once for each attack."""
        attack = self._unfolded(attack)
        key = repr(attack)
        if key not in self._outcomes:
            self._outcomes[key] = self._run(attack)
        return self._outcomes[key]

    def all_outcomes(self) -> list[Outcome]:
        """Of all attacks run so far that were confined to this threat model."""
        return [self._outcomes[key] for key in self._outcomes if repr(self.threat) in key]

    def _unfolded(self, attack: Attack) -> Attack:
        """The attack on the model itself, where the private copy has other gradients."""
        if self.subject.foldable:
            return attack
        return replace(attack, engine=replace(attack.engine, fold=False))

    def _run(self, attack: Attack, positions: Tensor | None = None) -> Outcome:
        chosen = self.subject.right.nonzero().squeeze(1) if positions is None else positions
        try:
            parts = [
                attack(p.model, p.images, p.labels, p.codes, p.seed, indices=p.indices)
                for p in self.subject.batches(chosen)
            ]
        except RuntimeError as error:
            if not any(sign in str(error) for sign in _NO_GRADIENT):
                raise
            clean = self.subject.images[chosen]
            nothing = np.zeros(len(clean), dtype=bool)
            return Outcome(nothing, clean, {}, 0, differentiable=False)
        return Outcome(
            torch.cat([part.success for part in parts]).cpu().numpy(),
            torch.cat([part.images for part in parts]),
            {
                name: torch.cat([part.variables[name] for part in parts])
                for name in parts[0].variables
            },
            max(int(part.forwards.max()) for part in parts),
        )

    def parts(self, count: int | None = None) -> Iterator[Subject]:
        """The samples that are right, batch by batch; with a count, the first so many."""
        yield from self.subject.batches(self.subject.right.nonzero().squeeze(1)[:count])

    @contextmanager
    def regions(self, count: int | None = None) -> Iterator[Iterator[tuple[Subject, Region]]]:
        """The same with the threat model around each batch, on the frozen model."""
        with untouched(self.subject.model, self.seed), full_float32():
            yield (
                (
                    part,
                    self.threat.facing(part.model, part.images).around(
                        part.images, part.labels, part.codes
                    ),
                )
                for part in self.parts(count)
            )

    def primary(self) -> Bools:
        """Which samples the attacks under audit break, together, (M,) bool."""
        broken: Bools = np.logical_or.reduce(
            [self.run(attack).broken for attack in self.attacks.values()]
        )
        return broken

    def cross_entropy(self) -> Attack:
        """APGD on cross-entropy, at the audit's number of steps."""
        return APGD(self.threat, steps=self.budget.steps, objective=CrossEntropy())

    def scale_free(self) -> Attack:
        """The same on an objective that does not change when the logits are multiplied or shifted."""
        return APGD(self.threat, steps=self.budget.steps, objective=DLR())

    def white_box(self) -> Bools:
        """Which samples any attack by gradient breaks, (M,) bool."""
        attacks = [self.cross_entropy(), self.scale_free()]
        if self.budget.targeted:
            attacks.append(APGD(self.threat, steps=self.budget.steps, objective=TargetedDLR()))
        broken: Bools = np.logical_or.reduce(
            [self.primary(), *(self.run(attack).broken for attack in attacks)]
        )
        return broken

    def still_missed(self, chosen: Bools) -> Bools:
        """Which of some samples (M,) many more steps towards each class, and restarts, leave unbroken too."""
        places = np.flatnonzero(chosen)
        if not len(places):
            return chosen
        positions = self.subject.right.nonzero().squeeze(1)
        among = positions[torch.from_numpy(places).to(positions.device)]
        steps = 2 * self.budget.steps
        attacks = (
            APGD(self.threat, steps=steps, objective=TargetedDLR()),
            APGD(self.threat, steps=steps, objective=Margin(), restarts=_RESTARTS),
        )
        broken = [self._run(self._unfolded(attack), among).broken for attack in attacks]
        missed = np.zeros_like(chosen)
        missed[places] = ~np.logical_or.reduce(broken)
        return missed

    def ladder(self, steps: int, factor: float = 1.0) -> Outcome | None:
        """Plain PGD with some number of steps and the radius multiplied; None where it has no radius."""
        threat = scaled(self.threat, factor)
        return None if threat is None else self.run(PGD(threat, steps=steps))

    def margins(self, images: Tensor) -> npt.NDArray[np.float64]:
        """Largest other logit minus the label's on images (M, C, H, W) of the samples that are right."""
        labels = self.subject.labels[self.subject.right]
        logits = self.subject.logits_of(images, _PASSES if self.subject.random else 1)
        values = torch.stack([Margin().value(rows, labels) for rows in logits])
        found: npt.NDArray[np.float64] = values.median(0).values.double().cpu().numpy()
        return found
