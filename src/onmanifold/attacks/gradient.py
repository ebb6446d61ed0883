"""The gradient core, and the attacks that are settings of it: FGSM, PGD, MIA, projected Adam, random points."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from onmanifold.attacks.base import Attack, Found, Search
from onmanifold.attacks.engine import FrozenNetwork, full_float32
from onmanifold.attacks.updates import Adam, Momentum, Steepest, StepSizes, Update
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.registry import ATTACKS
from onmanifold.objectives import BoundObjective, CrossEntropy, KullbackLeibler, Objective
from onmanifold.threats.base import Region, Variables
from onmanifold.threats.geometry import Start

# Fooled samples leave the batch once they are this share of it; until then they only stand still.
_LEAVING_SHARE = 0.05
# Where no more than this share remains, its forward pass is done again rather than the backward pass of all.
_AGAIN_SHARE = 0.3


@dataclass(frozen=True)
class GradientAttack(Attack, ABC):
    """Base of the attacks that follow the gradient of the objective.

    Attributes:
        objective: What is maximised.
        early_stop: True: a sample leaves at its first success, with that point. False: all steps are done
            and the point with the largest objective is kept; outside training a success before all else.
        restarts: Number of searches from different starts; the best point over all is kept.
        start: Where a search starts: "zero", "uniform" in the ball's volume, or "distance", uniform over
            distance and direction (Disentangling eq. 19).
    """

    objective: Objective = field(default=CrossEntropy(), kw_only=True)
    early_stop: bool = field(default=True, kw_only=True)
    restarts: int = field(default=1, kw_only=True)
    start: Start = field(default="uniform", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.objective, str):
            # Python users may name the objective, as a specification does.
            object.__setattr__(self, "objective", Objective.registry.build(self.objective))
        if not isinstance(self.objective, Objective):
            raise InputError(
                f"objective: expected an objective, found {type(self.objective).__name__}."
            )
        if self.restarts < 1:
            raise InputError(f"restarts: expected at least 1, found {self.restarts}.")
        if isinstance(self.objective, KullbackLeibler) and self.start == "zero":
            raise InputError(
                "start: the divergence to the clean prediction has no gradient at the clean image; "
                "expected 'uniform' or 'distance', found 'zero'."
            )
        if self.start not in ("zero", "uniform", "distance"):
            raise InputError(
                f"start: expected 'zero', 'uniform' or 'distance', found {self.start!r}."
            )

    def bind(
        self, network: FrozenNetwork, images: Tensor, labels: Tensor, targets: Tensor | None
    ) -> BoundObjective:
        """The objective on a batch."""
        return self.objective.bind(network, images, labels, targets)

    @abstractmethod
    def plan(self, region: Region) -> tuple[int, StepSizes, Update]:
        """Number of steps, step size of each variable, update rule."""

    def search(self, search: Search) -> Found:
        """Ascend from each start; keep the best point of each sample."""
        steps, step_sizes, update = self.plan(search.region)
        best = _Best(search, self.early_stop)
        for restart in range(self.restarts):
            walk = best.remaining()
            if walk is None:
                break
            start = walk.region.random(self.start, search.seed, walk.indices, restart)
            _ascend(walk, best, start, steps, _kept(step_sizes, walk.positions), update)
        return best.found


@dataclass
class _Walk:
    """The samples still under way: their region, objective and positions in the batch."""

    region: Region
    objective: BoundObjective
    indices: Tensor
    positions: Tensor

    def keep(self, mask: Tensor) -> _Walk:
        return _Walk(
            self.region.keep(mask),
            self.objective.keep(mask),
            self.indices[mask],
            self.positions[mask],
        )


class _Best:
    """The point kept of each sample so far, and the passes spent on it.

    With early stop a sample keeps its first success. Without it, where success counts, a success is kept
    before all else, and among equals the point with the largest objective.
    """

    def __init__(self, search: Search, early_stop: bool) -> None:
        self.search = search
        self.early_stop = early_stop
        count, device = len(search.indices), search.indices.device
        self.fooled = torch.zeros(count, dtype=torch.bool, device=device)
        zero = search.region.zero()
        dtype = next(iter(zero.values())).dtype
        self.value = torch.full((count,), -torch.inf, dtype=dtype, device=device)
        passes = torch.zeros(count, dtype=torch.int32, device=device)
        self.found = Found(zero, self.value.clone(), passes, passes.clone())

    @property
    def judges(self) -> bool:
        """Whether it matters which points are successes."""
        return self.early_stop or self.search.success_first

    def remaining(self) -> _Walk | None:
        """All samples that are still searched; None where there are none."""
        search = self.search
        positions = torch.arange(len(self.fooled), device=self.fooled.device)
        walk = _Walk(search.region, search.objective, search.indices, positions)
        if not self.early_stop or not bool(self.fooled.any()):
            return walk
        return None if bool(self.fooled.all()) else walk.keep(~self.fooled)

    def offer(
        self, walk: _Walk, variables: Variables, values: Tensor, fooled: Tensor | None
    ) -> None:
        """Keep the points that are better than those kept so far.

        Args:
            walk: Whose points these are.
            variables: The points.
            values: (B,) of the objective.
            fooled: (B,) which are successes; None: success does not matter.
        """
        found, positions = self.found, walk.positions
        if len(positions) == len(self.fooled):
            self._offer_all(variables, values, fooled)
            return
        kept, was = self.value[positions], self.fooled[positions]
        better, values = self._better(kept, was, values, fooled)
        if fooled is not None:
            self.fooled[positions] = was | fooled
        self.value[positions] = torch.where(better, values, kept)
        found.objective[positions] = torch.fmax(found.objective[positions], values)
        rows = positions[better]
        for name, new in variables.items():
            found.variables[name] = found.variables[name].index_copy(0, rows, new[better])

    def _offer_all(self, variables: Variables, values: Tensor, fooled: Tensor | None) -> None:
        """The same where no sample has left: without the cost of indexing."""
        found = self.found
        better, values = self._better(self.value, self.fooled, values, fooled)
        if fooled is not None:
            self.fooled = self.fooled | fooled
        self.value = torch.where(better, values, self.value)
        found.objective = torch.fmax(found.objective, values)
        for name, new in variables.items():
            column = better.view(-1, *[1] * (new.ndim - 1))
            found.variables[name] = torch.where(column, new, found.variables[name])

    def _better(
        self, kept: Tensor, was: Tensor, values: Tensor, fooled: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Which points replace those kept, and the values that count: a sample that is done has no new ones."""
        better = values > kept
        if fooled is None:
            return better, values
        if self.early_stop:
            return (better | fooled) & ~was, torch.where(was, kept, values)
        return torch.where(fooled == was, better, fooled), values

    def count(self, walk: _Walk, backward: bool) -> None:
        """Count a forward pass, and a backward pass, of the samples that are still searched."""
        found = self.found
        if not self.early_stop:
            found.forwards += 1
            found.backwards += backward
            return
        active = (~self.fooled[walk.positions]).int()
        found.forwards.index_add_(0, walk.positions, active)
        if backward:
            found.backwards.index_add_(0, walk.positions, active)


def _ascend(
    walk: _Walk,
    best: _Best,
    variables: Variables,
    steps: int,
    step_sizes: StepSizes,
    update: Update,
) -> None:
    """One search from one start: steps + 1 points are evaluated, fooled samples leave."""
    state = update.start(variables)
    for step in range(steps + 1):
        last = step == steps
        point = _evaluate(walk, variables, differentiable=not last)
        best.count(walk, backward=not last)
        values = point.values.detach()
        fooled = _fooled(walk, best, variables, values, point.logits) if best.judges else None
        best.offer(walk, variables, values, fooled)
        if last:
            return
        left = ~best.fooled[walk.positions] if best.early_stop else None
        remaining = len(values) if left is None else int(left.sum())
        if remaining == 0:
            return
        if left is None or remaining > (1 - _LEAVING_SHARE) * len(values):
            gradients = point.gradients()
        else:
            again = remaining <= _AGAIN_SHARE * len(values)
            gradients = {} if again else _selected(point.gradients(), left)
            walk, state = walk.keep(left), state.keep(left)
            step_sizes, variables = _kept(step_sizes, left), _selected(variables, left)
            if again:
                # A second forward pass of few costs less than the backward pass of all.
                gradients = _evaluate(walk, variables, differentiable=True).gradients()
        variables, state = update.move(walk.region, variables, gradients, step_sizes, state)
        variables = walk.region.project(variables)


class _Point(NamedTuple):
    """Variables evaluated: values (B,), logits (B, K), and the leaves of the graph that led there."""

    values: Tensor
    logits: Tensor
    leaves: Variables

    def gradients(self) -> Variables:
        """The gradient of each sample's value to its own variables."""
        ones = torch.ones_like(self.values)
        found = torch.autograd.grad(self.values, list(self.leaves.values()), ones)
        # A NaN, such as that of a square root at 0, would stop its sample for good and look like robustness.
        return {
            name: gradient.nan_to_num(nan=0.0)
            for name, gradient in zip(self.leaves, found, strict=True)
        }


def _evaluate(walk: _Walk, variables: Variables, differentiable: bool) -> _Point:
    leaves = variables
    with torch.set_grad_enabled(differentiable):
        if differentiable:
            leaves = {name: tensor.detach().requires_grad_() for name, tensor in variables.items()}
        values, logits = walk.objective(walk.region.render(leaves))
    return _Point(values, logits.detach(), leaves)


def _selected(variables: Variables, mask: Tensor) -> Variables:
    return {name: tensor[mask] for name, tensor in variables.items()}


def _fooled(
    walk: _Walk, best: _Best, variables: Variables, values: Tensor, logits: Tensor
) -> Tensor:
    """Which samples are fooled; what low precision claims for the first time is checked in full precision."""
    fooled = walk.objective.finished(values, logits)
    network = best.search.network
    if network.exact is network or not best.early_stop:
        return fooled
    new = fooled & ~best.fooled[walk.positions]
    if not bool(new.any()):
        return fooled
    claimed = walk.keep(new)
    with torch.no_grad(), full_float32():
        images = claimed.region.render({name: tensor[new] for name, tensor in variables.items()})
        confirmed = claimed.objective.fooled(network.exact(images))
    best.found.forwards.index_add_(
        0, claimed.positions, torch.ones_like(confirmed, dtype=torch.int32)
    )
    return fooled.masked_scatter(new, confirmed)


def _kept(step_sizes: StepSizes, selected: Tensor) -> StepSizes:
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


def _check_steps(steps: int, step_size: StepSize) -> None:
    if steps < 1:
        raise InputError(f"steps: expected at least 1, found {steps}.")
    sizes = step_size.values() if isinstance(step_size, Mapping) else [step_size]
    if any(size is not None and not 0 <= size < float("inf") for size in sizes):
        raise InputError(f"step_size: expected finite numbers >= 0, found {step_size}.")


@ATTACKS.register("fgsm")
@dataclass(frozen=True)
class FGSM(GradientAttack):
    """Fast gradient (sign) method: one step of steepest ascent from the image (Goodfellow et al. 2015).

    On a latent ball this is OM-FGSM.

    Attributes:
        step_size: In each variable's own units; None: the radius.
    """

    step_size: StepSize = None
    start: Start = field(default="zero", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_steps(1, self.step_size)

    def plan(self, region: Region) -> tuple[int, StepSizes, Update]:
        """One step."""
        return 1, resolve_step_sizes(self.step_size, region, 1.0), Steepest()


@ATTACKS.register("pgd")
@dataclass(frozen=True)
class PGD(GradientAttack):
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
        _check_steps(self.steps, self.step_size)

    def plan(self, region: Region) -> tuple[int, StepSizes, Update]:
        """Steps of steepest ascent."""
        return self.steps, resolve_step_sizes(self.step_size, region, 2.5 / self.steps), Steepest()


@ATTACKS.register("mia")
@dataclass(frozen=True)
class MIA(GradientAttack):
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
        _check_steps(self.steps, self.step_size)

    def plan(self, region: Region) -> tuple[int, StepSizes, Update]:
        """Steps along the momentum."""
        return (
            self.steps,
            resolve_step_sizes(self.step_size, region, 2.5 / self.steps),
            Momentum(self.decay),
        )


@ATTACKS.register("adam")
@dataclass(frozen=True)
class ProjectedAdam(GradientAttack):
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
        _check_steps(self.steps, self.step_size)

    def plan(self, region: Region) -> tuple[int, StepSizes, Update]:
        """Steps of Adam."""
        sizes: StepSize = self.step_size
        if isinstance(sizes, float) and len(region.balls) > 1:
            sizes = dict.fromkeys(region.balls, sizes)
        return self.steps, resolve_step_sizes(sizes, region, 0.0), Adam()


@ATTACKS.register("random")
@dataclass(frozen=True)
class RandomPerturbation(GradientAttack):
    """The baseline that does not optimise: random points, by default of uniform distance and direction.

    ``restarts`` is the number of points; the one with the largest objective is kept.
    """

    start: Start = field(default="distance", kw_only=True)

    def plan(self, region: Region) -> tuple[int, StepSizes, Update]:
        """No step."""
        return 0, dict.fromkeys(region.balls, 0.0), Steepest()
