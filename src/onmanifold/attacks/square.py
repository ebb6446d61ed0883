"""The square attack: random search by queries alone (Andriushchenko et al. 2020, arXiv:1912.00049)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from onmanifold.attacks.core import Best, Walk
from onmanifold.attacks.engine import full_float32
from onmanifold.attacks.restarts import RestartedAttack
from onmanifold.attacks.square_moves import Flips, Moves
from onmanifold.attacks.square_shifts import Shifts
from onmanifold.foundation import randomness
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.registry import ATTACKS
from onmanifold.objectives import Margin, Objective
from onmanifold.threats.base import Variables, check_by_norm
from onmanifold.threats.image import ImageRegion

# After how many queries of 10 000 the squares become half as large.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
# For how many queries random numbers are drawn at once; fooled samples leave in between.
_CHUNK = 64
# Fooled samples leave once they are this share.
_LEAVING_SHARE = 0.05
# An objective must rise by more than this many times the rounding error, else a sample's batch would decide.
_ROUNDINGS = 100


def share_of(query: int, first: float = 0.8, queries: int = 10_000) -> float:
    """The share p of a variable that a query changes (Andriushchenko et al. 2020, section 4).

    Args:
        query: How many were asked before.
        first: The share in the beginning.
        queries: The number for which the schedule of 10 000 queries is shortened or stretched.

    >>> [share_of(query) for query in (0, 10, 11, 51, 9000)]
    [0.8, 0.8, 0.4, 0.2, 0.0015625]
    """
    at = query * 10_000 / queries
    return first / float(2 ** sum(at > halving for halving in _HALVINGS))


@ATTACKS.register("square")
@dataclass(frozen=True)
class Square(RestartedAttack):
    """Square attack: random search that needs no gradients, only logits.

    The first query of all is the image itself, the second a start of vertical stripes (linf) or tiles (l2 and
    l1). Each further one changes a square of the perturbation, smaller and smaller, and is kept where the
    objective rises. In linf the square goes to the edge of the ball; in l2 and l1 it receives the mass of another
    square. In place of squares, variables that are not images have contiguous blocks of coordinates; of several
    variables each query changes one, in turn.

    A query about an image that was asked about before would change nothing: it counts as one of ``queries``,
    but costs no forward pass and is not among the counted ones. Random models are always asked.

    Attributes:
        queries: For each restart.
        first_share: Share of the variable that the first queries change (p).
        restarts: Number of searches from different starts.
        rescale_schedule: Whether the shares follow the schedule of 10 000 queries on the scale of ``queries``.
            False: as it is, as in AutoAttack, whatever their number.
        objective: What is maximised.
        early_stop: True: a sample leaves at its first success. False: all queries are made.
    """

    queries: int = 5000
    first_share: float = 0.8
    restarts: int = field(default=1, kw_only=True)
    rescale_schedule: bool = field(default=False, kw_only=True)
    objective: Objective = field(default=Margin(), kw_only=True)
    early_stop: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_by_norm(self.threat, "Square")
        if self.queries < 2:
            raise InputError(f"queries: expected at least 2, found {self.queries}.")
        if not 0 < self.first_share <= 1:
            raise InputError(f"first_share: expected a number in (0, 1], found {self.first_share}.")

    @torch.no_grad()
    def restart(self, walk: Walk, best: Best, number: int) -> None:
        """Query by query from one start; before the first start the images themselves are asked about."""
        if number == 0:
            climb = _Climb(walk, best)
            climb.evaluate()
            climb.hand_in()
            # Nobody had left before, so that this is the objective of all.
            left = best.remaining(walk.objective)
            if left is None:
                return
            walk = left
        climb, seed = _Climb(walk, best), best.search.seed
        for name, moves in climb.moves.items():
            moves.start(seed, walk.indices, f"square/{name}/{number}/start")
        climb.evaluate()
        names = list(climb.moves)
        schedule = self.queries if self.rescale_schedule else 10_000
        for begin in range(2, self.queries, _CHUNK):
            if not climb.go_on():
                return
            queries = range(begin, min(begin + _CHUNK, self.queries))
            shares = [share_of(query, self.first_share, schedule) for query in queries]
            for name, moves in climb.moves.items():
                draws = randomness.uniform(
                    seed,
                    climb.walk.indices,
                    (_CHUNK, moves.draws),
                    stream=f"square/{name}/{number}/{begin}",
                    dtype=torch.float64,
                )
                moves.plan(shares, draws[:, : len(shares)])
            for query in queries:
                climb.query(names[query % len(names)], query - begin)
        climb.hand_in()


class _Climb:
    """The samples of one restart on their way up."""

    def __init__(self, walk: Walk, best: Best) -> None:
        self.walk, self.best = walk, best
        # With several variables, the image of a move depends on where the other ones are.
        remembers = not best.search.random and len(walk.region.balls) == 1
        images = walk.region.images if isinstance(walk.region, ImageRegion) else None
        self.moves: dict[str, Moves] = {
            name: (Flips if ball.norm == "linf" else Shifts)(ball, remembers, images)
            for name, ball in walk.region.balls.items()
        }
        count, device = len(walk.positions), walk.positions.device
        self.values = torch.full_like(best.value[walk.positions], -torch.inf)
        # What a value must exceed.
        self.least = self.values
        self.fooled = torch.zeros(count, dtype=torch.bool, device=device)
        self.asked = torch.zeros(count, dtype=torch.int32, device=device)

    @property
    def variables(self) -> Variables:
        """Where the samples are."""
        return {name: moves.points for name, moves in self.moves.items()}

    def evaluate(self) -> None:
        """Ask about the points where the samples are."""
        rows = torch.arange(len(self.fooled), device=self.fooled.device)
        self.values, self.fooled = self._ask(rows, None, self.values.new_zeros(0))
        self.least = _more(self.values)

    def query(self, name: str, number: int) -> None:
        """Propose a change of one variable, and keep it where it is better."""
        moves = self.moves[name]
        waiting = ~self.fooled if self.best.early_stop else torch.ones_like(self.fooled)
        rows, candidates = moves.propose(number, waiting)
        if len(rows) == 0:
            return
        values, fooled = self._ask(rows, name, candidates)
        taken = values > self.least.index_select(0, rows)
        if self.best.judges:
            taken = torch.where(fooled == self.fooled.index_select(0, rows), taken, fooled)
        places = taken.nonzero().squeeze(1)
        if len(places) == 0:
            return
        chosen, values = rows[places], values[places]
        moves.take(chosen, candidates[places])
        self.values[chosen], self.least[chosen] = values, _more(values)
        self.fooled[chosen] = fooled[places]

    def go_on(self) -> bool:
        """Let fooled samples leave where they are many enough; whether any are left."""
        if not self.best.early_stop:
            return True
        gone = int(self.fooled.sum())
        if gone == len(self.fooled):
            self.hand_in()
            return False
        if gone > _LEAVING_SHARE * len(self.fooled):
            self.hand_in()
            self._keep(~self.fooled)
        return True

    def hand_in(self) -> None:
        """Offer the points that the samples have reached, and report the passes."""
        best, walk = self.best, self.walk
        best.found.forwards.index_add_(0, walk.positions, self.asked)
        self.asked = torch.zeros_like(self.asked)
        best.offer(walk, self.variables, self.values, self.fooled if best.judges else None)

    def _keep(self, mask: Tensor) -> None:
        self.walk = self.walk.keep(mask)
        for moves in self.moves.values():
            moves.keep(mask)
        self.values, self.fooled = self.values[mask], self.fooled[mask]
        self.asked, self.least = self.asked[mask], self.least[mask]

    def _ask(self, rows: Tensor, name: str | None, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Values and success of the samples at ``rows``, one variable replaced by candidates."""
        self.asked.index_add_(0, rows, torch.ones_like(rows, dtype=torch.int32))
        everyone = len(rows) == len(self.fooled)
        objective = self.walk.objective if everyone else self.walk.objective.keep(rows)
        images = self._images(rows, name, candidates, everyone)
        values, logits = objective(images)
        fooled = objective.finished(values, logits)
        network = self.best.search.network
        if network.exact is not network and bool(fooled.any()):
            # What low precision claims is checked in full precision.
            with full_float32():
                confirmed = objective.keep(fooled).fooled(network.exact(images[fooled]))
            self.asked[rows[fooled]] += 1
            fooled = fooled.masked_scatter(fooled, confirmed)
        return values, fooled

    def _images(self, rows: Tensor, name: str | None, candidates: Tensor, everyone: bool) -> Tensor:
        if isinstance(self.walk.region, ImageRegion):
            # Without the cost of cutting the ball's box for each query.
            moves = self.moves["image"]
            flat = moves.flat if name is None else candidates
            return moves.images(None if everyone else rows, flat)
        variables = {}
        for own, moves in self.moves.items():
            flat = candidates if own == name else moves.flat if everyone else moves.flat[rows]
            variables[own] = moves.grid.points(flat)
        region = self.walk.region
        if not everyone:
            mask = torch.zeros_like(self.fooled)
            mask[rows] = True
            region = region.keep(mask)
        return region.render(variables)


def _more(values: Tensor) -> Tensor:
    """Values above which there is more than rounding error."""
    return values + _ROUNDINGS * torch.finfo(values.dtype).eps * (1 + values.abs())
