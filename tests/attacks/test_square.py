"""The square attack: its schedule, its start, what it proposes, and what it never asks twice."""

import itertools

import pytest
import torch
from torch import nn

from onmanifold.attacks import Engine, Square
from onmanifold.attacks.square import share_of
from onmanifold.attacks.square_moves import Flips, Grid
from onmanifold.attacks.square_shifts import Shifts, _peak
from onmanifold.foundation.errors import InputError
from onmanifold.threats import ImageBall, JointBall, LatentBall, TransformationBall

COUNT, SHAPE = 10, (3, 8, 8)


def inner(norm, radius, images):
    return ImageBall(norm, radius).around(images, torch.zeros(len(images))).balls["image"]


def some_images(count=COUNT, shape=SHAPE):
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(0)).double()


class Recorder(nn.Module):
    """A linear model that keeps what it is asked about."""

    def __init__(self, shape=SHAPE, remembers=True):
        super().__init__()
        size = torch.Size(shape).numel()
        weight = torch.randn(2, size, generator=torch.Generator().manual_seed(0)).double()
        self.register_buffer("weight", weight)
        self.seen = []

    def forward(self, images):
        self.seen.append(images.detach().clone())
        return (images.flatten(1).unsqueeze(1) * self.weight).sum(2)


def test_the_share_halves_after_the_papers_queries():
    halvings = [10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000]
    share = 0.8
    for before, after in itertools.pairwise([0, *halvings, 10_000]):
        assert share_of(before + 1) == share_of(after) == share
        share /= 2
    # Stretched to the number of queries only where that is asked for.
    assert share_of(101, 0.8, queries=10_000) == 0.2
    assert share_of(101, 0.8, queries=1000) == 0.8 / 2**5


@pytest.mark.parametrize(
    ("share", "side", "odd"),
    [(0.8, 25, 25), (0.2, 13, 13), (0.1, 9, 9), (0.05, 6, 7), (0.0125, 3, 3), (0.00625, 2, 3)],
)
def test_sides_of_squares_on_28_pixels(share, side, odd):
    grid = Grid.of((1, 28, 28))
    assert grid.window(share, symmetric=False) == (side, side)
    assert grid.window(share, symmetric=True) == (odd, odd)


def test_blocks_of_other_variables():
    grid = Grid.of((6,))
    assert [grid.window(share, symmetric=True) for share in (0.8, 0.4, 0.1)] == [
        (1, 5),
        (1, 2),
        (1, 1),
    ]


def test_the_start_in_linf_is_stripes_at_the_radius():
    images = 0.3 + 0.4 * some_images()
    moves = Flips(inner("linf", 0.1, images), remembers=True)
    moves.start(0, torch.arange(COUNT), "start")
    points = moves.grid.points(moves.flat)
    torch.testing.assert_close(points.abs(), torch.full_like(points, 0.1))
    assert (points == points[:, :, :1]).all()
    stripes = points[:, :, 0]
    assert 0.4 < (stripes > 0).double().mean() < 0.6
    assert (stripes[:, 0] != stripes[:, 1]).any()
    assert (stripes[0] != stripes[1]).any()


@pytest.mark.parametrize(("norm", "order"), [("l2", 2), ("l1", 1)])
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 28, 28), (6,), (2,)])
def test_the_start_in_l2_and_l1_is_tiles_at_the_radius(norm, order, shape):
    images = 0.5 * torch.ones(COUNT, *shape).double()
    ball = inner(norm, 0.2, images)
    moves = Shifts(ball, remembers=True)
    moves.start(0, torch.arange(COUNT), "start")
    size = torch.linalg.vector_norm(moves.flat, order, dim=1)
    torch.testing.assert_close(size, torch.full_like(size, 0.2))
    assert (moves.flat.sum(0) != 0).any()


def test_the_peak_is_two_opposite_pyramids():
    peak = _peak(5, 5, 2, torch.float64)
    assert float(peak.square().sum()) == pytest.approx(1)
    upper, lower = peak[:2], peak[2:]
    assert (upper > 0).all()
    assert (lower < 0).all()
    # Of the lower, 3 by 5: rings of 1, 1/4 and 1/9, added up inwards.
    rings = torch.tensor([1 / 9, 1 / 9 + 1 / 4, 1 / 9 + 1 / 4 + 1, 1 / 9 + 1 / 4, 1 / 9]).double()
    torch.testing.assert_close(lower[1] / lower[1, 2], rings / rings[2])


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_query_changes_squares_only(norm):
    images = 0.3 + 0.4 * some_images()
    ball = inner(norm, 0.3, images)
    moves = (Flips if norm == "linf" else Shifts)(ball, remembers=True)
    indices = torch.arange(COUNT)
    moves.start(0, indices, "start")
    draws = torch.rand(COUNT, 1, moves.draws, generator=torch.Generator().manual_seed(0)).double()
    moves.plan([0.14], draws)
    waiting = indices != 4
    rows, candidates = moves.propose(0, waiting)
    assert 4 not in rows
    before = moves.grid.points(moves.flat)[rows]
    changed = moves.grid.points(candidates) != before
    for sample in changed.any(1):
        places = sample.nonzero()
        extent = places.amax(0) - places.amin(0) + 1
        assert (extent <= 3).all() if norm == "linf" else len(places) <= 18
    assert (ball.keep(rows).size(moves.grid.points(candidates)) <= 0.3 + 1e-9).all()


def test_squares_are_as_likely_at_the_edges():
    grid = Grid.of((1, 5, 7))
    draws = torch.rand(20_000, 1, 2, generator=torch.Generator().manual_seed(0)).double()
    corners = grid.corners(draws, [(2, 2)]).flatten()
    top, left = corners // 7, corners % 7
    assert torch.bincount(top, minlength=4).min() > 4500
    assert torch.bincount(left, minlength=6).min() > 3000
    assert top.max() == 3
    assert left.max() == 5


def test_no_image_is_asked_about_twice_in_linf():
    model, shape = Recorder((1, 3, 3)), (1, 3, 3)
    images = 0.3 + 0.4 * some_images(6, shape)
    labels = model(images).argmax(1)
    attack = Square(
        ImageBall("linf", 0.2),
        queries=600,
        first_share=0.2,
        early_stop=False,
        engine=Engine(fold=False),
    )
    result = attack(model, images, labels)
    # The last one is the verification.
    searched = torch.cat(model.seen[:-1])
    # Which of the two bounds each pixel is at, for each image that is at a bound at all.
    for image, forwards in zip(images, result.forwards, strict=True):
        own = searched[((searched - image).abs() - 0.2).abs().flatten(1).amax(1) < 1e-9]
        assert len(own) == len(own.unique(dim=0))
        assert forwards == len(own) + 1
    assert (result.forwards < 512).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_more_queries_never_report_less_and_near_the_optimum(norm):
    model = Recorder()
    images = 0.3 + 0.4 * some_images()
    labels = model(images).argmax(1)
    threat = ImageBall(norm, {"linf": 0.05, "l2": 0.2, "l1": 0.5}[norm])
    before = None
    for queries in (2, 10, 66, 300, 1500):
        result = Square(threat, queries=queries, early_stop=False)(model, images, labels)
        assert (result.forwards <= queries).all()
        assert before is None or (result.objective >= before - 1e-12).all()
        before = result.objective
    slope = model.weight[1] - model.weight[0]
    dual = {"linf": slope.abs().sum(), "l2": slope.norm(), "l1": slope.abs().max()}[norm]
    with torch.no_grad():
        logits = model(images)
    clean = -(logits[:, 0] - logits[:, 1]).abs()
    gained = (before - clean) / (threat.radius * dual)
    assert (gained <= 1 + 1e-9).all()
    assert gained.mean() > {"linf": 0.85, "l2": 0.5, "l1": 0.3}[norm]


def test_fooled_samples_cost_no_more_queries():
    model = Recorder()
    images = 0.3 + 0.4 * some_images(40)
    labels = model(images).argmax(1)
    labels[::4] = 1 - labels[::4]
    result = Square(ImageBall("linf", 0.03), queries=150)(model, images, labels)
    assert (result.forwards[::4] == 1).all()
    assert result.success[::4].all()
    assert (result.forwards[result.success] < 150).all()
    assert (result.objective[result.success] >= 0).all()
    assert (result.backwards == 0).all()


def test_every_variable_is_searched(plane, images, small_net):
    good = images(30, on_manifold=True)
    threat = JointBall(ImageBall("linf", 0.01), LatentBall(plane, "l2", 0.2))
    few, many = (
        Square(threat, queries=queries, early_stop=False)(
            small_net, good.images, good.labels, good.codes
        )
        for queries in (2, 80)
    )
    for name in ("image", "latent"):
        moved = (few.variables[name] != many.variables[name]).flatten(1).any(1)
        assert moved.float().mean() > 0.8


def test_transformations_are_searched(images, small_net):
    good = images(60)
    result = Square(TransformationBall(0.3), queries=60)(small_net, good.images, good.labels)
    start = Square(TransformationBall(0.3), queries=2)(small_net, good.images, good.labels)
    assert result.success.sum() > start.success.sum() + 3


@pytest.mark.parametrize(
    "fields",
    [{"queries": 1}, {"restarts": 0}, {"first_share": 0.0}, {"first_share": 1.5}, {"objective": 3}],
)
def test_impossible_settings_are_refused(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        Square(ImageBall(), **fields)


def test_the_objective_may_be_named(images, small_net):
    good = images(12)
    attack = Square(ImageBall("linf", 0.04), queries=20, objective="targeted_dlr", restarts=2)
    result = attack(small_net, good.images, good.labels)
    # The image once, then two searches for each of three targets.
    assert (result.forwards <= 1 + 6 * 20).all()
    assert result.success.sum() >= 2
