"""What attacks with restarts, and those for the smallest perturbation, do between their searches."""

import itertools
from dataclasses import dataclass, field, fields

import pytest
import torch

from onmanifold.attacks import APGD, PGD, Engine, Square
from onmanifold.attacks.core import evaluate
from onmanifold.attacks.restarts import RestartedAttack
from onmanifold.attacks.smallest import Smallest
from onmanifold.foundation.errors import ConfigError, InputError
from onmanifold.objectives import Margin, Objective, TargetedDLR
from onmanifold.threats import ImageBall, JointBall, LatentBall

COUNT = 12


@dataclass(frozen=True)
class Draws(RestartedAttack):
    """One random point per restart."""

    where: list[tuple[int, list[int]]]
    restarts: int = field(default=3, kw_only=True)
    objective: Objective = field(default=Margin(), kw_only=True)
    early_stop: bool = field(default=True, kw_only=True)

    def restart(self, walk, best, number):
        self.where.append((number, walk.positions.tolist()))
        points = walk.region.random("surface", best.search.seed, walk.indices, number)
        with torch.no_grad():
            point = evaluate(walk, points, differentiable=False)
        fooled = walk.objective.fooled(point.logits)
        best.offer(walk, points, point.values, fooled)


@pytest.fixture
def call(small_net, images):
    batch = images(COUNT)

    def run(attack, **options):
        return attack(small_net, batch.images, batch.labels, indices=batch.indices, **options)

    return run


PLAIN = Engine(fold=False, threads=1)
BALL = ImageBall("linf", 0.08)


def test_each_restart_of_each_target_has_a_number_of_its_own(call):
    attack = Draws(BALL, [], objective=TargetedDLR(3), early_stop=False, restarts=2, engine=PLAIN)
    call(attack)
    assert attack.where == [(number, list(range(COUNT))) for number in range(6)]


def test_fooled_samples_are_not_searched_again(call):
    attack = Draws(BALL, [], restarts=8, engine=PLAIN)
    result = call(attack)
    assert [number for number, _ in attack.where] == list(range(8))
    searched = [set(positions) for _, positions in attack.where]
    assert all(later <= earlier for earlier, later in itertools.pairwise(searched))
    assert 0 < len(searched[-1]) < COUNT
    fooled = set(result.success.nonzero().squeeze(1).tolist())
    assert set(range(COUNT)) - searched[-1] <= fooled
    # With nobody left there is no further restart.
    attack = Draws(ImageBall("linf", 1.0), [], restarts=50, engine=PLAIN)
    assert call(attack).success.all()
    assert len(attack.where) < 50


@pytest.mark.parametrize("kind", [PGD, APGD, Square])
def test_what_all_of_them_check(kind):
    assert kind(BALL, objective="margin").objective == Margin()
    with pytest.raises(ConfigError, match="'margn'"):
        kind(BALL, objective="margn")
    with pytest.raises(InputError, match=r"objective: expected the objective's name .*found 3"):
        kind(BALL, objective=3)
    with pytest.raises(InputError, match=r"restarts: expected at least 1, found 0"):
        kind(BALL, restarts=0)


def test_fields_are_in_their_old_places():
    # They are what users write by position, and what is listed.
    assert [part.name for part in fields(Square)] == [
        "threat",
        "engine",
        "queries",
        "first_share",
        "restarts",
        "rescale_schedule",
        "objective",
        "early_stop",
    ]
    assert [part.name for part in fields(PGD)][:7] == [
        "threat",
        "engine",
        "objective",
        "early_stop",
        "restarts",
        "start",
        "passes",
    ]
    attack = Square(BALL, 100, 0.3)
    assert (attack.queries, attack.first_share, attack.restarts) == (100, 0.3, 1)


def some_region(images, plane):
    batch = images(4, on_manifold=True)
    threat = JointBall(ImageBall("l2", 2.0), LatentBall(plane, "linf", 0.5))
    return threat.around(batch.images, batch.labels, batch.codes)


def offered(region, value):
    return {name: torch.full_like(zero, value) for name, zero in region.zero().items()}


def test_only_what_is_smaller_and_fools_is_kept(images, plane):
    region = some_region(images, plane)
    smallest = Smallest(region, early_stop=False)
    rows, half = torch.arange(4), region.keep(torch.tensor([False, True, False, True]))
    sizes = torch.tensor([3.0, 3.0, 3.0, 3.0]).double()
    smallest.offer(rows, offered(region, 3.0), sizes, torch.tensor([True, True, False, False]))
    part = torch.tensor([1, 3])
    yes = torch.tensor([True, True])
    smallest.offer(part, offered(half, 1.0), torch.tensor([1.0, 1.0]).double(), yes)
    smallest.offer(part, offered(half, 2.0), torch.tensor([2.0, 0.5]).double(), ~yes)
    smallest.offer(rows, offered(region, 9.0), torch.full_like(sizes, 9.0), sizes > 0)
    assert smallest.size.tolist() == [3, 1, 9, 1]
    for tensor in smallest.variables.values():
        flat = tensor.flatten(1)
        assert (flat == torch.tensor([[3.0], [1.0], [9.0], [1.0]])).all()
    found = smallest.found(smallest.variables)
    assert found.objective.tolist() == [-3, -1, -9, -1]


def test_samples_are_under_way_until_there_is_no_need(images, plane):
    region = some_region(images, plane)
    sizes = torch.tensor([0.0, 1.9, 2.0, 2.1]).double()
    for early_stop, expected in ((True, [0, 0, 0, 1]), (False, [0, 1, 1, 1])):
        smallest = Smallest(region, early_stop)
        assert smallest.under_way.all()
        smallest.offer(torch.arange(4), offered(region, 0.1), sizes, sizes > -1)
        assert smallest.under_way.tolist() == expected
