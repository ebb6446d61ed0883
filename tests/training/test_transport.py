"""Sinkhorn's plan against exact solvers and iterations written out, its gradient against slopes.

A plan in closed form is in tests/golden.
"""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog

from onmanifold.training.transport import cosine_costs, sinkhorn, transport_distance


def some_costs(rows=7, columns=7, seed=0, dtype=torch.float64):
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some_features(rows, seed, dtype=torch.float64):
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_with_strong_regularisation_all_is_shared_equally():
    plan = sinkhorn(some_costs(3, 5), regularisation=1e6)
    torch.testing.assert_close(plan, torch.full((3, 5), 1 / 15).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("seed", range(4))
def test_towards_no_regularisation_it_is_the_best_assignment(seed):
    costs = some_costs(seed=seed)
    rows, columns = linear_sum_assignment(costs.numpy())
    least = costs.numpy()[rows, columns].mean()
    plan = sinkhorn(costs, regularisation=2e-3, iterations=20_000, tolerance=1e-10)
    assert (plan * costs).sum().item() == pytest.approx(least, abs=1e-3)
    assert plan.argmax(1).tolist() == columns.tolist()


def test_batches_of_different_size_against_a_linear_programme():
    costs = some_costs(4, 6)
    marginals = np.zeros((10, 24))
    for row in range(4):
        marginals[row, 6 * row : 6 * row + 6] = 1
    for column in range(6):
        marginals[4 + column, column::6] = 1
    mass = [1 / 4] * 4 + [1 / 6] * 6
    least = linprog(costs.numpy().ravel(), A_eq=marginals, b_eq=mass).fun
    plan = sinkhorn(costs, regularisation=1e-3, iterations=50_000, tolerance=1e-11)
    # The entropy of 24 equal parts is the most that it can cost; rows are not quite at their marginal.
    assert least - 1e-5 <= (plan * costs).sum().item() <= least + 1e-3 * math.log(24)


@pytest.mark.parametrize("shape", [(7, 7), (4, 6), (1, 3), (1, 1)])
def test_marginals_are_uniform(shape):
    costs = some_costs(*shape)
    plan = sinkhorn(costs, 0.05, iterations=5000, tolerance=1e-12)
    assert (plan >= 0).all()
    torch.testing.assert_close(plan.sum(0), torch.full(shape[1:], 1 / shape[1]).double())
    torch.testing.assert_close(plan.sum(1), torch.full(shape[:1], 1 / shape[0]).double())


def plain_sinkhorn(costs, regularisation, iterations, tolerance):
    """Row by row and column by column, with exponentials as they stand."""
    count, other = costs.shape
    u, v = np.zeros(count), np.zeros(other)
    for done in range(1, iterations + 1):  # noqa: B007 - it is returned
        change = 0.0
        for i in range(count):
            total = sum(math.exp((v[j] - costs[i, j]) / regularisation) for j in range(other))
            new = regularisation * (math.log(1 / count) - math.log(total))
            change += abs(new - u[i])
            u[i] = new
        for j in range(other):
            total = sum(math.exp((u[i] - costs[i, j]) / regularisation) for i in range(count))
            v[j] = regularisation * (math.log(1 / other) - math.log(total))
        if change < tolerance:
            break
    return np.exp((u[:, None] + v[None] - costs) / regularisation), done


@pytest.mark.parametrize(
    ("settings", "done"),
    [((0.1, 100, 0.1), 2), ((0.01, 100, 0.1), 2), ((0.1, 100, 1e-4), None), ((0.05, 7, 0.0), 7)],
)
def test_it_stops_where_the_plain_iterations_stop(settings, done):
    costs = some_costs(6, 6, seed=3)
    expected, count = plain_sinkhorn(costs.numpy(), *settings)
    assert done is None or count == done
    torch.testing.assert_close(sinkhorn(costs, *settings), torch.from_numpy(expected))
    # One more or one less would be seen.
    for other in (count - 1, count + 1):
        changed = sinkhorn(costs, settings[0], other, 0.0)
        assert not torch.allclose(changed, torch.from_numpy(expected), rtol=1e-9, atol=0)


@pytest.mark.parametrize("regularisation", [0.01, 1e-3, 1e-4])
def test_float32_is_stable_where_exponentials_would_underflow(regularisation):
    costs = 2 * some_costs(20, 20)
    assert torch.exp(-costs.float() / 1e-3).eq(0).any(0).all()
    low = sinkhorn(costs.float(), regularisation, 200, 0.0)
    exact = sinkhorn(costs, regularisation, 200, 0.0)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.sum(0), torch.full((20,), 1 / 20), rtol=5e-3, atol=0)
    assert (low - exact).abs().max() < 5e-4


def test_costs_are_one_minus_the_cosine():
    one = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    other = torch.tensor([[3.0, 0.0], [0.0, 5.0], [-1.0, 0.0], [1.0, 1.0]])
    expected = torch.tensor([[0.0, 1.0, 2.0, 1 - math.sqrt(0.5)], [1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(cosine_costs(one, other), expected)
    # A cosine above 1 by rounding costs nothing.
    many = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    assert (cosine_costs(many, 7 * many) >= 0).all()


def test_the_gradient_holds_the_plan_fixed():
    one, other = some_features(6, 0), some_features(6, 1).requires_grad_()
    (found,) = torch.autograd.grad(transport_distance(one, other), other)
    with torch.no_grad():
        plan = sinkhorn(cosine_costs(one, other))
        expected = torch.zeros_like(other)
        for j, point in enumerate(other):
            length = point.norm()
            for i, place in enumerate(one):
                unit = place / place.norm()
                cosine = unit @ point / length
                expected[j] -= plan[i, j] * (unit - cosine * point / length) / length
    torch.testing.assert_close(found, expected)


def test_converged_it_is_the_slope_of_the_regularised_problem():
    one, other = some_features(6, 0), some_features(6, 1).requires_grad_()
    settings = 0.1, 5000, 1e-13

    def least(features):
        costs = cosine_costs(one, features)
        plan = sinkhorn(costs, *settings)
        return (plan * costs + 0.1 * plan * (plan.log() - 1)).sum().item()

    (slope,) = torch.autograd.grad(transport_distance(one, other, *settings), other)
    direction, step = some_features(6, 2), 1e-5
    with torch.no_grad():
        ends = [least(other + sign * step * direction) for sign in (1, -1)]
    numeric = (ends[0] - ends[1]) / (2 * step)
    assert (slope * direction).sum().item() == pytest.approx(numeric, rel=1e-6)
