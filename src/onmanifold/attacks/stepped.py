"""Attacks of a fixed number of steps: FGSM, PGD, MIA, projected Adam, and random points."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from onmanifold.attacks.core import Best, Walk, evaluate, fooled_of, going_on, selected
from onmanifold.attacks.gradient import GradientAttack
from onmanifold.attacks.updates import Adam, Momentum, Steepest, StepSizes, Update
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.registry import ATTACKS
from onmanifold.threats.base import Region, Variables
from onmanifold.threats.geometry import Start


@dataclass(frozen=True)
class SteppedAttack(GradientAttack, ABC):
    """Base of the attacks whose number and size of steps are known beforehand."""

    @abstractmethod
    def plan(self, region: Region) -> tuple[int, StepSizes, Update]:
        """Number of steps, step size of each variable, update rule."""

    def ascend(self, walk: Walk, best: Best, start: Variables) -> None:
        """The planned steps from one start."""
        steps, step_sizes, update = self.plan(walk.region)
        _ascend(walk, best, start, steps, step_sizes, update)


def _ascend(
    walk: Walk,
    best: Best,
    variables: Variables,
    steps: int,
    step_sizes: StepSizes,
    update: Update,
) -> None:
    """One search from one start: steps + 1 points are evaluated, fooled samples leave."""
    state = update.start(variables)
    for step in range(steps + 1):
        last = step == steps
        point = evaluate(walk, variables, not last, best.passes)
        best.count(walk, backward=not last)
        values = point.values.detach()
        fooled = fooled_of(walk, best, variables, values, point.logits) if best.judges else None
        best.offer(walk, variables, values, fooled)
        if last:
            return
        rest = going_on(walk, best, point, variables)
        if rest is None:
            return
        left, walk, gradients = rest
        if left is not None:
            state, variables = state.keep(left), selected(variables, left)
            step_sizes = _selected_sizes(step_sizes, left)
        variables, state = update.move(walk.region, variables, gradients, step_sizes, state)
        variables = walk.region.project(variables)


def _selected_sizes(step_sizes: StepSizes, selected: Tensor) -> StepSizes:
    """The step sizes of the samples selected by a mask or by positions."""
    return {
        name: size[selected] if isinstance(size, Tensor) else size
        for name, size in step_sizes.items()
    }


StepSize = float | dict[str, float] | None


def resolve_step_sizes(step_size: StepSize, region: Region, share: float) -> StepSizes:
    """The step size of each variable: as given, or a share of its radius.

    Raises:
        InputError: One number for several variables, or a variable that the threat model has not.
    """
    names = list(region.balls)
    if step_size is None:
        return {
            name: share * (ball.radius if ball.common is None else ball.common)
            for name, ball in region.balls.items()
        }
    if isinstance(step_size, Mapping):
        if set(step_size) != set(names):
            raise InputError(
                f"step_size: expected one for each of {names}, found {list(step_size)}."
            )
        return {name: float(step_size[name]) for name in names}
    if len(names) > 1:
        raise InputError(
            f"step_size: expected one for each of {names}, as a mapping, found {step_size}."
        )
    return {names[0]: float(step_size)}


def check_steps(steps: int, step_size: StepSize) -> None:
    """Raises InputError unless there is a step, and step sizes are finite numbers of at least 0."""
    if steps < 1:
        raise InputError(f"steps: expected at least 1, found {steps}.")
    sizes = step_size.values() if isinstance(step_size, Mapping) else [step_size]
    if any(size is not None and not 0 <= size < float("inf") for size in sizes):
        raise InputError(f"step_size: expected finite numbers >= 0, found {step_size}.")


@ATTACKS.register("fgsm")
@dataclass(frozen=True)
class FGSM(SteppedAttack):
    """Fast gradient (sign) method: one step of steepest ascent from the image (Goodfellow et al. 2015).

    On a latent ball this is OM-FGSM.

    Attributes:
        step_size: In each variable's own units; None: the radius.
    """

    step_size: StepSize = None
    start: Start = field(default="zero", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(1, self.step_size)

    def plan(self, region: Region) -> tuple[int, StepSizes, Update]:
        """One step."""
        return 1, resolve_step_sizes(self.step_size, region, 1.0), Steepest()


@ATTACKS.register("pgd")
@dataclass(frozen=True)
class PGD(SteppedAttack):
    """Projected gradient descent (Madry et al. 2018): steepest ascent steps, each followed by projection.

    On an image ball this is PGD, on a latent ball OM-PGD, on a joint ball JSA, on a transformation ball the
    adversarial-transformation attack.

    Attributes:
        steps: Number of steps.
        step_size: In each variable's own units, one number or one per variable; None: 2.5 · radius / steps.
    """

    steps: int = 20
    step_size: StepSize = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self.steps, self.step_size)

    def plan(self, region: Region) -> tuple[int, StepSizes, Update]:
        """Steps of steepest ascent."""
        return self.steps, resolve_step_sizes(self.step_size, region, 2.5 / self.steps), Steepest()


@ATTACKS.register("mia")
@dataclass(frozen=True)
class MIA(SteppedAttack):
    """Momentum iterative attack (Dong et al. 2018), from the image itself.

    Attributes:
        steps: Number of steps.
        step_size: In each variable's own units; None: 2.5 · radius / steps.
        decay: Of the momentum; 0 gives PGD from zero.
    """

    steps: int = 50
    step_size: StepSize = None
    decay: float = 1.0
    start: Start = field(default="zero", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self.steps, self.step_size)

    def plan(self, region: Region) -> tuple[int, StepSizes, Update]:
        """Steps along the momentum."""
        return (
            self.steps,
            resolve_step_sizes(self.step_size, region, 2.5 / self.steps),
            Momentum(self.decay),
        )


@ATTACKS.register("adam")
@dataclass(frozen=True)
class ProjectedAdam(SteppedAttack):
    """Projected Adam with sampled distance and direction (Disentangling section 3.1 and eq. 17 to 19).

    Attributes:
        steps: Number of steps.
        step_size: Adam's learning rate.
    """

    steps: int = 40
    step_size: float | dict[str, float] = 0.005
    start: Start = field(default="distance", kw_only=True)
    restarts: int = field(default=5, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self.steps, self.step_size)

    def plan(self, region: Region) -> tuple[int, StepSizes, Update]:
        """Steps of Adam."""
        sizes: StepSize = self.step_size
        if isinstance(sizes, float) and len(region.balls) > 1:
            sizes = dict.fromkeys(region.balls, sizes)
        return self.steps, resolve_step_sizes(sizes, region, 0.0), Adam()


@ATTACKS.register("random")
@dataclass(frozen=True)
class RandomPerturbation(SteppedAttack):
    """The baseline that does not optimise: random points, by default of uniform distance and direction.

    ``restarts`` is the number of points; the one with the largest objective is kept.
    """

    start: Start = field(default="distance", kw_only=True)

    def plan(self, region: Region) -> tuple[int, StepSizes, Update]:
        """No step."""
        return 0, dict.fromkeys(region.balls, 0.0), Steepest()
