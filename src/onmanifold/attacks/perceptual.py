"""The fast Lagrangian perceptual attack (Laidlaw et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from onmanifold.attacks.core import (
    Best,
    Point,
    Walk,
    evaluate,
    fooled_of,
    going_on,
    gradients_of,
    selected,
)
from onmanifold.attacks.gradient import GradientAttack
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.registry import ATTACKS
from onmanifold.objectives import Margin, Objective
from onmanifold.threats.base import Variables
from onmanifold.threats.geometry import Start
from onmanifold.threats.perceptual import LikenessBall, PerceptualBall

# Over all steps the step size falls to this share, and the multiplier begins at this share of its end.
_DECAY = 0.1


@ATTACKS.register("fast_lpa")
@dataclass(frozen=True)
class FastLPA(GradientAttack):
    """Fast Lagrangian perceptual attack (Laidlaw et al. 2021, section 4 and algorithm 3), in a `PerceptualBall`.

    It ascends the objective minus a multiplier times max(distance − radius, 0), freely in [0, 1]. Over the steps
    the multiplier grows tenfold, from a tenth of ``multiplier``, and the steps shrink to a tenth, exponentially.
    Each step follows the gradient and is as long as makes a perceptual distance of the step size.

    The points within the radius that the search meets count, and so does its last point, projected. The paper
    projects in evaluation alone (its slower LPA), so that in training points may lie outside: see
    ``project_in_training``. The released code starts at 0.01 times a Gaussian point, ten times as far as
    "nearby". With `AdversarialTraining` this is fast perceptual adversarial training.

    Attributes:
        steps: Number of steps.
        step_size: Of the first, in units of the distance; None: the radius.
        multiplier: Of the distance beyond the radius, at the end (λ).
        project_in_training: False: examples for training are where the search ends, as in the paper. What
            attacks return elsewhere is always inside.
    """

    steps: int = 20
    step_size: float | None = None
    multiplier: float = 10.0
    project_in_training: bool = True
    objective: Objective = field(default=Margin(confidence=1.0), kw_only=True)
    start: Start = field(default="nearby", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.threat, PerceptualBall):
            raise InputError(
                f"threat: FastLPA needs a PerceptualBall, found {type(self.threat).__name__}."
            )
        if self.steps < 1:
            raise InputError(f"steps: expected at least 1, found {self.steps}.")
        if self.step_size is not None and not 0 <= self.step_size < float("inf"):
            raise InputError(f"step_size: expected a finite number >= 0, found {self.step_size}.")
        if not 0 <= self.multiplier < float("inf"):
            raise InputError(f"multiplier: expected a finite number >= 0, found {self.multiplier}.")

    def ascend(self, walk: Walk, best: Best, start: Variables) -> None:
        """All steps from one start."""
        if best.judges and not self._offer_images(walk, best):
            return
        found = self._all_steps(walk, best, start)
        if found is None:
            return
        walk, variables = found
        if best.search.success_first or self.project_in_training:
            variables = walk.region.project(variables)
        point = evaluate(walk, variables, differentiable=False, passes=best.passes)
        best.count(walk, backward=False)
        self._offer(walk, best, variables, point.values, point.logits)

    def _offer_images(self, walk: Walk, best: Best) -> bool:
        """Offer the images themselves, which may be fooled already; whether some are to be searched."""
        zero = walk.region.zero()
        point = evaluate(walk, zero, differentiable=False, passes=best.passes)
        best.count(walk, backward=False)
        self._offer(walk, best, zero, point.values, point.logits)
        return not best.early_stop or not bool(best.fooled[walk.positions].all())

    def _all_steps(
        self, walk: Walk, best: Best, variables: Variables
    ) -> tuple[Walk, Variables] | None:
        """The samples that are still searched at the end, and where they are; None: no sample is."""
        for step in range(self.steps):
            decay = _DECAY ** (step / self.steps)
            multiplier = self.multiplier * _DECAY / decay
            point, inside = self._penalised(walk, variables, multiplier, best.passes)
            best.count(walk, backward=True)
            self._offer(walk, best, variables, point.values, point.logits, inside)
            rest = going_on(walk, best, point, variables)
            if rest is None:
                return None
            left, walk, gradients = rest
            if left is not None:
                variables = selected(variables, left)
            ball = _ball(walk)
            size = decay * (ball.radius if self.step_size is None else self.step_size)
            moved = ball.ascend(variables["image"], gradients["image"], size)
            variables = {"image": ball.boxed(moved)}
        return walk, variables

    def _penalised(
        self, walk: Walk, variables: Variables, multiplier: float, passes: int
    ) -> tuple[Point, Tensor]:
        """The objective, the gradients of it minus the penalty, and which samples are inside, (B,) bool."""
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in variables.items()}
        ball = _ball(walk)
        beyond = ball.measured(leaves["image"]) - ball.radius
        slopes = gradients_of(-multiplier * beyond.clamp(min=0), leaves)
        point = evaluate(walk, variables, differentiable=True, passes=passes)
        gradients = point.gradients()
        total = {name: gradients[name] + slope for name, slope in slopes.items()}
        return Point(point.values.detach(), point.logits, {}, total), beyond.detach() <= 0

    def _offer(
        self,
        walk: Walk,
        best: Best,
        variables: Variables,
        values: Tensor,
        logits: Tensor,
        inside: Tensor | None = None,
    ) -> None:
        """Offer the points that are inside; None: all are."""
        fooled = fooled_of(walk, best, variables, values, logits) if best.judges else None
        if inside is not None:
            values = values.masked_fill(~inside, -torch.inf)
            fooled = None if fooled is None else fooled & inside
        best.offer(walk, variables, values, fooled)


def _ball(walk: Walk) -> LikenessBall:
    """Where the images of the samples may be."""
    ball = walk.region.balls["image"]
    assert isinstance(ball, LikenessBall)
    return ball
