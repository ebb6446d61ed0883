"""Fast adaptive boundary attack: the nearest misclassified image (Croce and Hein 2020, arXiv:1907.02044)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from onmanifold.attacks.base import Attack, Found, Search
from onmanifold.attacks.engine import FrozenNetwork
from onmanifold.attacks.smallest import Smallest
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.registry import ATTACKS
from onmanifold.objectives import BoundObjective, Margin, likeliest_others
from onmanifold.threats import geometry
from onmanifold.threats.geometry import Norm
from onmanifold.threats.image import ImageRegion

# Newton steps to a hyperplane within a box; each but the last takes at least one coordinate to its bound.
_NEWTON_STEPS = 50
_LEAST = 1e-30


@ATTACKS.register("fab")
@dataclass(frozen=True)
class FAB(Attack):
    """Fast adaptive boundary attack: steps to the linearised boundary that stay close to the image.

    It looks for the smallest perturbation, whatever the radius; only one within the radius is a success. Images
    only, in linf, l2 and l1. The reported objective is minus the norm of the smallest perturbation found.

    Attributes:
        steps: For each target and restart.
        targets: How many classes to aim at in turn, the most likely ones of the clean image (FAB-T); None: at
            each step the nearest boundary of all classes, at the cost of a backward pass for each.
        restarts: The first begins at the image, the others at random points around it.
        largest_pull: Largest weight of the image's own projection (α_max).
        overshoot: How far steps go beyond the boundary (η).
        backward_step: Share of its perturbation that a misclassified point keeps (β).
        early_stop: Whether a sample leaves with its first success within the radius; False: the smallest
            perturbation is looked for to the end.
    """

    steps: int = 100
    targets: int | None = 9
    restarts: int = 1
    largest_pull: float = 0.1
    overshoot: float = 1.05
    backward_step: float = 0.9
    early_stop: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("steps", "restarts"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: expected at least 1, found {getattr(self, name)}.")
        if self.targets is not None and self.targets < 1:
            raise InputError(f"targets: expected at least 1 or None, found {self.targets}.")
        for name in ("largest_pull", "backward_step"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(
                    f"{name}: expected a number in [0, 1], found {getattr(self, name)}."
                )
        if not self.overshoot >= 1:
            raise InputError(f"overshoot: expected at least 1, found {self.overshoot}.")

    def bind(
        self, network: FrozenNetwork, images: Tensor, labels: Tensor, targets: Tensor | None
    ) -> BoundObjective:
        """Any misclassification counts."""
        return Margin().bind(network, images, labels, targets)

    def search(self, search: Search) -> Found:
        """For each target and restart, steps from the image; the smallest perturbation is kept."""
        region = search.region
        if not isinstance(region, ImageRegion):
            raise InputError(
                "threat: FAB measures distances between images; expected an ImageBall."
            )
        ball, smallest = region.balls["image"], Smallest(region, self.early_stop)
        logits = search.network(search.images)
        smallest.forwards += 1
        wrong = logits.argmax(1) != search.labels
        everyone = torch.arange(len(logits), device=logits.device)
        smallest.offer(everyone, region.zero(), torch.zeros_like(smallest.size), wrong)
        aims = (
            None if self.targets is None else likeliest_others(logits, search.labels, self.targets)
        )
        for restart in range(self.restarts):
            for turn in range(1 if aims is None else aims.shape[1]):
                walk = smallest.under_way.nonzero().squeeze(1)
                if len(walk) == 0:
                    break
                aim = None if aims is None else aims[walk, turn]
                start = _start(search, smallest, ball.norm, walk, restart)
                self._walk(search, smallest, ball.norm, walk, aim, start)
        inside = (smallest.size <= smallest.radius).view(-1, 1, 1, 1)
        return smallest.found({"image": torch.where(inside, smallest.variables["image"], 0.0)})

    def _walk(
        self,
        search: Search,
        smallest: Smallest,
        norm: Norm,
        walk: Tensor,
        aim: Tensor | None,
        points: Tensor,
    ) -> None:
        """All steps of the samples at positions ``walk`` towards one class each, or to the nearest boundary."""
        origin, labels = search.images[walk], search.labels[walk]
        for _ in range(self.steps):
            slope, missing = _plane(search.network, points, labels, aim, norm)
            points = self._step(points, origin, slope, missing, norm)
            logits = search.network(points)
            smallest.forwards[walk] += 2
            smallest.backwards[walk] += 1 if aim is not None else logits.shape[1]
            crossed = logits.argmax(1) != labels
            if not bool(crossed.any()):
                continue
            change = points - origin
            smallest.offer(walk, {"image": change}, geometry.size(change, norm), crossed)
            rows = crossed.nonzero().squeeze(1)
            back = torch.lerp(origin[rows], points[rows], self.backward_step)
            points = points.index_copy(0, rows, back)
            left = smallest.under_way[walk]
            if not bool(left.all()):
                walk, points, origin, labels = walk[left], points[left], origin[left], labels[left]
                aim = None if aim is None else aim[left]
                if len(walk) == 0:
                    return

    def _step(
        self, points: Tensor, origin: Tensor, slope: Tensor, missing: Tensor, norm: Norm
    ) -> Tensor:
        """Between the projections of the point and of the image on the linearised boundary, a little beyond."""
        both = torch.cat([points.flatten(1), origin.flatten(1)])
        # Both look for the same hyperplane, which already rose or fell between them.
        from_origin = missing - (slope * (origin - points).flatten(1)).sum(1)
        moves = reach(both, slope.repeat(2, 1), torch.cat([missing, from_origin]), norm)
        near, far = geometry.size(moves, norm).clamp(min=1e-8).chunk(2)
        pull = (near / (near + far)).clamp(max=self.largest_pull).unsqueeze(1)
        ahead, anew = both.add_(moves, alpha=self.overshoot).chunk(2)
        return torch.lerp(ahead, anew, pull).clamp_(0, 1).view_as(points)


def _start(search: Search, smallest: Smallest, norm: Norm, walk: Tensor, restart: int) -> Tensor:
    """The images; at a restart, points around them, at most half as far as what counts."""
    images = search.images[walk]
    if restart == 0:
        return images
    distance = smallest.size[walk].minimum(smallest.radius[walk]) / 2
    points = geometry.random_points(
        images[0].numel(),
        norm,
        distance,
        "surface",
        search.seed,
        search.indices[walk],
        f"start/image/{restart}",
    )
    points = geometry.project(points, norm, distance, None, None)
    return (images + points.view_as(images)).clamp(0, 1)


def _plane(
    network: Callable[[Tensor], Tensor],
    points: Tensor,
    labels: Tensor,
    aim: Tensor | None,
    norm: Norm,
) -> tuple[Tensor, Tensor]:
    """The linearised boundary: its slope (B, D), and how much of z_aim − z_y is missing to it, (B,).

    Without an aim it is that of all classes which is nearest in the norm.
    """
    with torch.enable_grad():
        leaf = points.detach().requires_grad_()
        logits = network(leaf)
        own = logits.gather(1, labels.unsqueeze(1))
        if aim is not None:
            lead = (logits.gather(1, aim.unsqueeze(1)) - own).squeeze(1)
            slope = torch.autograd.grad(lead, leaf, torch.ones_like(lead))[0].flatten(1)
            return slope, -lead.detach()
        leads = logits - own
        slopes = torch.stack(
            [
                torch.autograd.grad(lead.sum(), leaf, retain_graph=True)[0].flatten(1)
                for lead in leads.unbind(1)
            ],
            dim=1,
        )
    dual: Norm = {"linf": "l1", "l2": "l2", "l1": "linf"}[norm]  # type: ignore[assignment]
    steepness = geometry.size(slopes.flatten(0, 1), dual).view_as(leads).clamp(min=1e-12)
    distance = (leads.detach().abs() / steepness).scatter(1, labels.unsqueeze(1), torch.inf)
    nearest = distance.argmin(1)
    rows = torch.arange(len(labels), device=labels.device)
    return slopes[rows, nearest], -leads.detach()[rows, nearest]


def reach(points: Tensor, slope: Tensor, rise: Tensor, norm: Norm) -> Tensor:
    """The smallest move within [0, 1] that rises by ``rise`` along ``slope``; as far as it goes where it cannot.

    Args:
        points: (B, D) in [0, 1].
        slope: (B, D).
        rise: (B,) wanted inner product of slope and move.
        norm: In which the move is smallest.

    Returns:
        (B, D).
    """
    direction = slope * rise.sign().unsqueeze(1)
    steepness, wanted = direction.abs(), rise.abs()
    room = ((direction > 0).to(points.dtype) - points).abs()
    moves = (
        _reach_l1(steepness, room, wanted)
        if norm == "l1"
        else (_reach_level(steepness, room, wanted, steepness if norm == "l2" else None))
    )
    return moves * direction.sign()


def _reach_level(steepness: Tensor, room: Tensor, wanted: Tensor, pace: Tensor | None) -> Tensor:
    """Moves min(level · pace, room) that rise by ``wanted`` (B,); pace None: 1 everywhere.

    The rise is concave and piecewise linear in the level, so that Newton's method from below ends on it after
    finitely many steps, without sorting.
    """
    full = steepness * room
    gain = steepness if pace is None else steepness * pace
    wanted = wanted.unsqueeze(1)
    level = wanted / gain.sum(1, keepdim=True).clamp(min=_LEAST)
    for _ in range(_NEWTON_STEPS):
        # 1 where there is room left, else 0; arithmetic is much faster than masks here.
        free = (room - (level if pace is None else level * pace)).sign().clamp(min=0)
        missing = wanted - torch.linalg.vecdot(full, 1 - free).unsqueeze(1)
        rate = torch.linalg.vecdot(gain, free).unsqueeze(1)
        higher = (missing / rate.clamp(min=_LEAST)).maximum(level)
        if bool((higher <= level * (1 + 1e-6)).all()):
            break
        level = higher
    return torch.minimum(level if pace is None else level * pace, room)


def _reach_l1(steepness: Tensor, room: Tensor, wanted: Tensor) -> Tensor:
    """Moves that use up the room of the steepest coordinates first, (B, D)."""
    order = steepness.argsort(dim=1, descending=True)
    rises = (steepness * room).gather(1, order)
    missing = (wanted.unsqueeze(1) - (rises.cumsum(1) - rises)).clamp(min=0)
    share = torch.where(rises > 0, missing / rises.clamp(min=_LEAST), 0.0).clamp(max=1)
    return torch.zeros_like(room).scatter(1, order, share * room.gather(1, order))
