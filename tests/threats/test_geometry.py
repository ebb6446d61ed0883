import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from onmanifold.threats import geometry
from onmanifold.threats.base import Ball

NORMS = ("linf", "l2", "l1")


def norm_of(point, norm):
    return {
        "linf": np.abs(point).max,
        "l2": lambda: np.sqrt((point**2).sum()),
        "l1": np.abs(point).sum,
    }[norm]()


def farthest(direction, norm, radius, low, high):
    """The point of ball ∩ box that is farthest along a direction, one sample, by bisection or greedily."""
    room = np.where(direction > 0, high, -low)
    room = np.where(direction == 0, 0.0, room)
    if norm == "linf":
        return np.sign(direction) * np.minimum(room, radius)
    if norm == "l1":
        moved, left = np.zeros_like(direction), radius
        for place in np.argsort(-np.abs(direction)):
            moved[place] = min(room[place], left)
            left -= moved[place]
        return np.sign(direction) * moved
    slope = np.abs(direction)
    if np.sqrt((room**2).sum()) <= radius or not slope.any():
        return np.sign(direction) * room
    few, many = 0.0, max(radius, 1.0) * 1e3 / slope[slope > 0].min()
    for _ in range(2000):
        middle = (few + many) / 2
        inside = np.sqrt((np.minimum(middle * slope, room) ** 2).sum()) <= radius
        few, many = (middle, many) if inside else (few, middle)
        if many - few <= 1e-16 * many:
            break
    return np.sign(direction) * np.minimum(few * slope, room)


numbers = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 0.5, -0.5, 1e-3]),
    st.floats(-3, 3, allow_subnormal=False).map(lambda value: round(value, 6)),
)
sides = st.one_of(
    st.sampled_from([0.0, 0.25, 1.0]),
    st.floats(0, 1, allow_subnormal=False).map(lambda value: round(value, 6)),
)


@st.composite
def problems(draw):
    """Rows of points, radii and boxes, many of them with ties, empty sides and radius 0."""
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 7))

    def table(elements):
        lists = draw(
            st.lists(
                st.lists(elements, min_size=columns, max_size=columns), min_size=rows, max_size=rows
            )
        )
        return torch.tensor(lists, dtype=torch.float64)

    radius = draw(
        st.lists(st.one_of(st.just(0.0), sides, st.just(4.0)), min_size=rows, max_size=rows)
    )
    boxed = draw(st.booleans())
    low, high = (-table(sides), table(sides)) if boxed else (None, None)
    return table(numbers), torch.tensor(radius, dtype=torch.float64), low, high


def rows_of(points, radius, low, high):
    """One sample after the other, as numpy; no box is a very large one."""
    far = torch.full_like(points, 1e3)
    low, high = (-far, far) if low is None else (low, high)
    return zip(*(tensor.numpy() for tensor in (points, radius, low, high)), strict=True)


@pytest.mark.parametrize("norm", NORMS)
@given(problems())
@settings(max_examples=150, deadline=None)
def test_projection_is_inside_and_satisfies_the_variational_inequality(norm, problem):
    # p is the projection of v on a convex set exactly if p is in it and (v − p)·(c − p) <= 0 for all c in it.
    projected = geometry.project(problem[0], norm, *problem[1:]).numpy()
    for point, (given_, radius, low, high) in zip(projected, rows_of(*problem), strict=True):
        assert (low <= point).all()
        assert (point <= high).all()
        assert norm_of(point, norm) <= radius + 1e-12
        outwards = given_ - point
        most = farthest(outwards, norm, radius, low, high)
        assert outwards @ (most - point) <= 1e-9


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("boxed", [False, True])
def test_projection_agrees_with_a_generic_solver(norm, boxed):
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(12, 5, generator=generator).double()
    radius = torch.linspace(0.1, 1.5, 12, dtype=torch.float64)
    low = -torch.rand(12, 5, generator=generator).double() if boxed else None
    high = 0.6 * torch.rand(12, 5, generator=generator).double() if boxed else None
    projected = geometry.project(points, norm, radius, low, high).numpy()
    for found, (point, limit, below, above) in zip(
        projected, rows_of(points, radius, low, high), strict=True
    ):
        # Positive and negative part apart make both norms smooth.
        def parts(both):
            return both[:5] - both[5:]

        def room(both, limit=limit):
            return limit - both.sum() if norm == "l1" else limit**2 - (parts(both) ** 2).sum()

        solved = optimize.minimize(
            lambda both, point=point: ((parts(both) - point) ** 2).sum(),
            np.full(10, 1e-3),
            method="SLSQP",
            bounds=[(0, side) for side in (*above, *-below)],
            constraints={"type": "ineq", "fun": room},
            options={"ftol": 1e-14, "maxiter": 500},
        )
        assert np.abs(found - parts(solved.x)).max() < 1e-5


@pytest.mark.parametrize("norm", NORMS)
@given(problems())
@settings(max_examples=50, deadline=None)
def test_projection_is_idempotent_and_leaves_inner_points(norm, problem):
    once = geometry.project(problem[0], norm, *problem[1:])
    torch.testing.assert_close(geometry.project(once, norm, *problem[1:]), once, rtol=0, atol=1e-12)
    inner = 0.5 * once
    assert torch.equal(geometry.project(inner, norm, *problem[1:]), inner)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("boxed", [False, True])
def test_radius_0_projects_to_the_origin(norm, boxed):
    points = torch.randn(4, 9)
    box = (-torch.ones(4, 9), torch.ones(4, 9)) if boxed else (None, None)
    assert torch.equal(geometry.project(points, norm, torch.zeros(4), *box), torch.zeros(4, 9))


@pytest.mark.parametrize("norm", NORMS)
def test_each_row_has_its_own_radius(norm):
    points = torch.randn(5, 20, generator=torch.Generator().manual_seed(0)).double() + 3
    radius = torch.tensor([0.0, 0.1, 1.0, 2.0, 1e6], dtype=torch.float64)
    together = geometry.project(points, norm, radius, None, None)
    torch.testing.assert_close(geometry.size(together, norm)[:4], radius[:4], rtol=1e-12, atol=0)
    assert torch.equal(together[4], points[4])
    for row in range(5):
        alone = geometry.project(points[row : row + 1], norm, radius[row : row + 1], None, None)
        torch.testing.assert_close(alone[0], together[row], rtol=1e-14, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_a_box_that_only_touches_the_origin(norm):
    # Pixels at 0 or 1 may move to one side only; a box without room nowhere.
    points = torch.tensor([[2.0, -2.0, 1.0], [2.0, 2.0, 2.0]]).double()
    low = torch.tensor([[0.0, 0.0, -1.0], [0.0, 0.0, 0.0]]).double()
    high = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]).double()
    radius = torch.tensor([0.5, 0.5]).double()
    projected = geometry.project(points, norm, radius, low, high)
    assert torch.equal(projected.abs(), torch.tensor([[0.5, 0, 0], [0, 0, 0]]).double())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_float32_projection_is_the_rounded_float64_one(norm, scale):
    generator = torch.Generator().manual_seed(0)
    points = scale * torch.randn(20, 3072, generator=generator)
    low, high = (
        -torch.rand(20, 3072, generator=generator),
        torch.rand(20, 3072, generator=generator),
    )
    radius = torch.full((20,), {"linf": 0.03, "l2": 0.5, "l1": 12.0}[norm])
    narrow = geometry.project(points, norm, radius, low, high)
    wide = geometry.project(points.double(), norm, radius.double(), low.double(), high.double())
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, wide.float(), rtol=1e-5, atol=1e-7)
    assert (geometry.size(narrow.double(), norm) <= radius.double() * (1 + 1e-6)).all()
    assert ((low <= narrow) & (narrow <= high)).all()


@pytest.mark.parametrize("norm", NORMS)
def test_size_is_the_norm_of_each_sample(norm):
    points = torch.randn(6, 2, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    expected = [norm_of(point.flatten().numpy(), norm) for point in points]
    assert geometry.size(points, norm).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("norm", NORMS)
def test_a_step_without_gradient_stays(norm):
    points = torch.rand(2, 1, 5, 5)
    gradients = torch.zeros_like(points)
    gradients[1, 0, 2, 3] = 1e-30
    moved = geometry.ascend(points, gradients, norm, 0.5, None, None)
    assert torch.equal(moved[0], points[0])
    expected = points[1].clone()
    expected[0, 2, 3] += 0.5
    assert torch.equal(moved[1], expected)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("per_sample", [False, True])
def test_a_step_is_the_steepest_of_its_length(norm, per_sample):
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(3, 2, 5, 5, generator=generator).double()
    gradients = torch.randn(3, 2, 5, 5, generator=generator).double()
    steps = torch.tensor([0.1, 0.2, 0.3]).double() if per_sample else torch.full((3,), 0.2).double()
    moved = geometry.ascend(points, gradients, norm, steps if per_sample else 0.2, None, None)
    moves = (moved - points).flatten(1)
    torch.testing.assert_close(geometry.size(moves, norm), steps)
    # The dual norm is the most that a step of length 1 can gain; 50 coordinates give l1 steps of one.
    dual = geometry.size(gradients, {"linf": "l1", "l2": "l2", "l1": "linf"}[norm])
    torch.testing.assert_close((moves * gradients.flatten(1)).sum(1), steps * dual)


def test_an_l1_step_is_shared_by_the_largest_percent_of_the_gradient():
    gradients = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0)).double()
    moved = geometry.ascend(torch.zeros_like(gradients), gradients, "l1", 0.5, None, None)
    for row, gradient in zip(moved, gradients, strict=True):
        largest = gradient.abs().topk(10).indices
        expected = torch.zeros_like(row)
        expected[largest] = 0.05 * gradient[largest].sign()
        torch.testing.assert_close(row, expected)


def test_an_l1_step_goes_round_coordinates_at_their_bound():
    gradients = torch.tensor([[4.0, -3.0, 2.0, 1.0]])
    low, high = torch.tensor([[-1.0, -0.25, -1.0, -1.0]]), torch.tensor([[0.0, 1.0, 0.5, 1.0]])
    moved = geometry.ascend(torch.zeros(1, 4), gradients, "l1", 1.0, low, high)
    assert moved.tolist() == [[0.0, -0.25, 0.5, 0.25]]


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-44, 1e30])
def test_unit_has_length_1_where_squares_underflow_or_overflow(scale):
    gradients = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * scale
    gradients[2] = 0
    unit = geometry.unit(gradients)
    length = torch.linalg.vector_norm(unit.double().flatten(1), dim=1)
    torch.testing.assert_close(length, torch.tensor([1, 1, 0, 1]).double(), rtol=1e-5, atol=0)
    wide = gradients.double()
    direction = wide / torch.linalg.vector_norm(wide.flatten(1), dim=1).clamp(min=1e-300).view(
        -1, 1, 1, 1
    )
    torch.testing.assert_close(unit.double(), direction, rtol=1e-5, atol=1e-6)


def points_of(norm, start, count, dimension, radius=2.0, dtype=torch.float64):
    radii = torch.full((count,), radius, dtype=dtype)
    return geometry.random_points(dimension, norm, radii, start, 0, torch.arange(count), "start")


@pytest.mark.parametrize("norm", NORMS)
def test_uniform_points_have_the_distance_law_of_the_volume(norm):
    points = points_of(norm, "uniform", 20_000, 3)
    share = geometry.size(points, norm) / 2.0
    assert share.max() <= 1 + 1e-12
    # The share of a ball's volume within s radii is s^D.
    assert stats.kstest((share**3).numpy(), "uniform").pvalue > 0.001
    assert share.mean().item() == pytest.approx(3 / 4, abs=0.01)


@pytest.mark.parametrize("norm", NORMS)
def test_uniform_points_fill_the_ball_evenly(norm):
    # Points drawn from the cube and rejected outside the ball are uniform; so are their coordinates.
    cube = 4 * torch.rand(120_000, 3, generator=torch.Generator().manual_seed(0)).double() - 2
    kept = cube[geometry.size(cube, norm) <= 2]
    points = points_of(norm, "uniform", 20_000, 3)
    for direction in ([1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0], [1.0, -2.0, 0.5]):
        along = torch.tensor(direction).double()
        assert stats.ks_2samp((points @ along).numpy(), (kept @ along).numpy()).pvalue > 0.001


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dimension", [2, 50])
def test_distance_points_have_uniform_distance_and_gaussian_direction(norm, dimension):
    # Disentangling eq. 19.
    points = points_of(norm, "distance", 5_000, dimension)
    share = geometry.size(points, norm) / 2.0
    assert stats.kstest(share.numpy(), "uniform").pvalue > 0.001
    angle = torch.atan2(points[:, 0], points[:, 1]) / (2 * math.pi) + 0.5
    assert stats.kstest(angle.numpy(), "uniform").pvalue > 0.001


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("start", ["uniform", "distance"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_points_of_a_ball_are_inside(norm, start, dtype):
    images = torch.rand(50, 3, 6, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    images[:, 0] = images[:, 0].round()
    radius = torch.linspace(0, 3, 50, dtype=dtype)
    ball = Ball.of(norm, radius, images, -images, 1 - images)
    points = ball.random(start, 0, torch.arange(50), "start")
    assert points.dtype == dtype
    assert (ball.size(points) <= radius * (1 + 1e-6)).all()
    assert torch.equal(points[0], torch.zeros_like(points[0]))
    assert ((points >= -images) & (points <= 1 - images)).all()
    assert (ball.size(points)[1:] > 0).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("start", ["uniform", "distance"])
def test_a_random_point_depends_on_seed_and_index_alone(norm, start):
    indices = torch.tensor([5, 9, 0, 10**9])
    radius = torch.tensor([1.0, 0.5, 2.0, 3.0]).double()

    def draw(rows, dtype=torch.float64, seed=4, stream="start/image/0"):
        return geometry.random_points(
            30, norm, radius[rows].to(dtype), start, seed, indices[rows], stream
        )

    everything = draw([0, 1, 2, 3])
    assert torch.equal(everything[[2, 0]], draw([2, 0]))
    assert torch.equal(everything[3:], draw([3]))
    narrow = draw([0, 1, 2, 3], torch.float32)
    torch.testing.assert_close(narrow.double(), everything, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(draw([0], seed=5), everything[:1])
    assert not torch.allclose(draw([0], stream="start/image/1"), everything[:1])


def test_the_start_zero_is_the_centre():
    assert torch.equal(points_of("l2", "zero", 3, 4), torch.zeros(3, 4).double())


@pytest.mark.parametrize("norm", NORMS)
def test_a_ball_keeps_the_selected_samples(norm):
    images = torch.rand(6, 1, 3, 3).double()
    ball = Ball.of(norm, torch.linspace(0.1, 2, 6), images, -images, 1 - images)
    points = torch.randn(6, 1, 3, 3).double()
    mask = torch.tensor([True, False, True, True, False, False])
    assert torch.equal(ball.keep(mask).project(points[mask]), ball.project(points)[mask])
    assert torch.equal(ball.keep(mask).zero(), torch.zeros(3, 1, 3, 3).double())
