"""What all searches by gradient share: the samples under way, a point evaluated, the best point so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from onmanifold.attacks.base import Found, Search
from onmanifold.attacks.engine import full_float32
from onmanifold.objectives import BoundObjective
from onmanifold.threats.base import Region, Variables

# Fooled samples leave the batch once they are this share of it; until then they only stand still.
_LEAVING_SHARE = 0.05
# Where no more than this share remains, its forward pass is done again rather than the backward pass of all.
_AGAIN_SHARE = 0.3


@dataclass
class Walk:
    """The samples still under way: their region, objective and positions in the batch."""

    region: Region
    objective: BoundObjective
    indices: Tensor
    positions: Tensor

    def keep(self, mask: Tensor) -> Walk:
        return Walk(
            self.region.keep(mask),
            self.objective.keep(mask),
            self.indices[mask],
            self.positions[mask],
        )


class Best:
    """The point kept of each sample so far, and the passes spent on it.

    With early stop a sample keeps its first success. Without it, where success counts, a success is kept
    before all else, and among equals the point with the largest objective.
    """

    def __init__(self, search: Search, early_stop: bool, passes: int = 1) -> None:
        self.search = search
        # One success of a random model may be luck: the point that is best on average is wanted.
        self.early_stop = early_stop and not search.random
        self.passes = passes
        count, device = len(search.indices), search.indices.device
        self.fooled = torch.zeros(count, dtype=torch.bool, device=device)
        zero = search.region.zero()
        dtype = next(iter(zero.values())).dtype
        self.value = torch.full((count,), -torch.inf, dtype=dtype, device=device)
        none = torch.zeros(count, dtype=torch.int32, device=device)
        self.found = Found(zero, self.value.clone(), none, none.clone())

    @property
    def judges(self) -> bool:
        """Whether it matters which points are successes."""
        return self.early_stop or self.search.success_first

    def remaining(self, objective: BoundObjective) -> Walk | None:
        """All samples that are still searched, on that objective; None where there are none."""
        search = self.search
        positions = torch.arange(len(self.fooled), device=self.fooled.device)
        walk = Walk(search.region, objective, search.indices, positions)
        if not self.early_stop or not bool(self.fooled.any()):
            return walk
        return None if bool(self.fooled.all()) else walk.keep(~self.fooled)

    def offer(
        self, walk: Walk, variables: Variables, values: Tensor, fooled: Tensor | None
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
            found.variables[name].index_copy_(0, rows, new[better])

    def _offer_all(self, variables: Variables, values: Tensor, fooled: Tensor | None) -> None:
        """The same where no sample has left: without the cost of indexing."""
        found = self.found
        better, values = self._better(self.value, self.fooled, values, fooled)
        if fooled is not None:
            self.fooled = self.fooled | fooled
        self.value = torch.where(better, values, self.value)
        found.objective = torch.fmax(found.objective, values)
        replace_rows(found.variables, variables, better)

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

    def count(self, walk: Walk, backward: bool) -> None:
        """Count a forward pass, and a backward pass, of the samples that are still searched."""
        found = self.found
        if not self.early_stop and len(walk.positions) == len(self.fooled):
            found.forwards += self.passes
            found.backwards += self.passes * backward
            return
        active = self.passes * (~self.fooled[walk.positions] | (not self.early_stop)).int()
        found.forwards.index_add_(0, walk.positions, active)
        if backward:
            found.backwards.index_add_(0, walk.positions, active)


class Point(NamedTuple):
    """Variables evaluated: values (B,), logits (B, K), and what the gradients come from.

    Attributes:
        values: Of the objective; of a random model the mean over several passes.
        logits: The same; without gradient.
        leaves: Of the graph that led to the values, where ``slopes`` is None.
        slopes: The gradients, where they had to be taken pass by pass.
    """

    values: Tensor
    logits: Tensor
    leaves: Variables
    slopes: Variables | None = None

    def gradients(self) -> Variables:
        """The gradient of each sample's value to its own variables."""
        return gradients_of(self.values, self.leaves) if self.slopes is None else self.slopes


def gradients_of(values: Tensor, leaves: Variables) -> Variables:
    """The gradient of each of the values (B,) to its own sample's leaves; 0 where the model has none."""
    if not values.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(
        values, list(leaves.values()), torch.ones_like(values), allow_unused=True
    )
    # A NaN, such as that of a square root at 0, would stop its sample for good and look like robustness.
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient.nan_to_num(nan=0.0)
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }


def evaluate(walk: Walk, variables: Variables, differentiable: bool, passes: int = 1) -> Point:
    """The objective at the variables.

    Args:
        walk: Whose samples they are.
        variables: Where.
        differentiable: Whether gradients will be asked for.
        passes: Over how many passes of a random model values, logits and gradients are averaged
            (expectation over transformation, Athalye et al. 2018).
    """
    if passes > 1:
        return _averaged(walk, variables, differentiable, passes)
    leaves = variables
    with torch.set_grad_enabled(differentiable):
        if differentiable:
            leaves = {name: tensor.detach().requires_grad_() for name, tensor in variables.items()}
        values, logits = walk.objective(walk.region.render(leaves))
    return Point(values, logits.detach(), leaves)


def _averaged(walk: Walk, variables: Variables, differentiable: bool, passes: int) -> Point:
    """Pass by pass, so that only one graph is in memory."""
    points, slopes = [], []
    for _ in range(passes):
        point = evaluate(walk, variables, differentiable)
        if differentiable:
            slopes.append(point.gradients())
        points.append((point.values.detach(), point.logits))
    values, logits = (torch.stack(parts).mean(0) for parts in zip(*points, strict=True))
    mean = {
        name: torch.stack([slope[name] for slope in slopes]).mean(0)
        for name in (variables if differentiable else ())
    }
    return Point(values, logits, {}, mean)


def going_on(
    walk: Walk, best: Best, point: Point, variables: Variables
) -> tuple[Tensor | None, Walk, Variables] | None:
    """Let fooled samples leave, where they are many enough for that to pay, and take the gradients of the others.

    Returns:
        A mask of the samples that go on (None: all), their walk and their gradients; None where nobody does.
    """
    if not best.early_stop:
        return None, walk, point.gradients()
    left = ~best.fooled[walk.positions]
    remaining, count = int(left.sum()), len(left)
    if remaining == 0:
        return None
    if remaining > (1 - _LEAVING_SHARE) * count:
        return None, walk, point.gradients()
    if remaining > _AGAIN_SHARE * count or point.slopes is not None:
        return left, walk.keep(left), selected(point.gradients(), left)
    # A second forward pass of few costs less than the backward pass of all.
    walk = walk.keep(left)
    return left, walk, evaluate(walk, selected(variables, left), differentiable=True).gradients()


def replace_rows(kept: Variables, new: Variables, mask: Tensor) -> None:
    """Overwrite the rows of ``kept`` that are in the mask with those of ``new``."""
    if mask.is_cuda:
        # Which rows they are would have to be waited for.
        for name, tensor in new.items():
            column = mask.view(-1, *[1] * (tensor.ndim - 1))
            torch.where(column, tensor, kept[name], out=kept[name])
        return
    rows = mask.nonzero().squeeze(1)
    for name, tensor in new.items():
        kept[name].index_copy_(0, rows, tensor.index_select(0, rows))


def selected(variables: Variables, mask: Tensor) -> Variables:
    """The variables of the selected samples."""
    return {name: tensor[mask] for name, tensor in variables.items()}


def fooled_of(
    walk: Walk, best: Best, variables: Variables, values: Tensor, logits: Tensor
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
