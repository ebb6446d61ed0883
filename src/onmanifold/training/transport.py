"""Optimal transport between two batches of features, with an entropy that makes it quick to solve."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional


def cosine_costs(one: Tensor, other: Tensor) -> Tensor:
    """max(0, 1 − cosine) of each row of ``one`` (A, D) and each of ``other`` (B, D), in [0, 2], (A, B)."""
    cosines = functional.normalize(one, dim=1) @ functional.normalize(other, dim=1).T
    return (1 - cosines).clamp(min=0)


def sinkhorn(
    costs: Tensor, regularisation: float = 0.01, iterations: int = 100, tolerance: float = 0.1
) -> Tensor:
    """The plan T >= 0 between uniform marginals that minimises Σ T·C + regularisation · Σ T·(log T − 1).

    Sinkhorn's iterations (Cuturi 2013) on the two potentials u and v, T = exp((u + v − C) / regularisation), in
    the logarithmic domain: nothing underflows in float32, however small the regularisation. The columns of the
    plan have their marginal to rounding, the rows as closely as the iterations have come.

    Args:
        costs: C, (A, B).
        regularisation: In units of the costs, positive; towards 0 the plan becomes that of least cost.
        iterations: At most.
        tolerance: It ends where Σ |change of u| is below this, in units of the costs; the defaults are those of
            the released code of Feature Scattering.

    Returns:
        (A, B), without gradient.

    >>> import torch
    >>> sinkhorn(torch.tensor([[0.0, 1.0], [1.0, 0.0]])).round(decimals=4)
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]])
    """
    scaled = costs.detach() / regularisation
    row_mass, column_mass = (-math.log(size) for size in costs.shape)
    # Potentials over the regularisation: the exponents themselves.
    rows, columns = scaled.new_zeros(len(scaled), 1), scaled.new_zeros(1, scaled.shape[1])
    for _ in range(iterations):
        before = rows
        rows = row_mass - (columns - scaled).logsumexp(1, keepdim=True)
        columns = column_mass - (rows - scaled).logsumexp(0, keepdim=True)
        if regularisation * float((rows - before).abs().sum()) < tolerance:
            break
    return (rows + columns - scaled).exp()


def transport_distance(
    one: Tensor,
    other: Tensor,
    regularisation: float = 0.01,
    iterations: int = 100,
    tolerance: float = 0.1,
) -> Tensor:
    """The cost Σ T·C () of moving one batch of features (A, D) onto another (B, D), C their `cosine_costs`.

    The gradient is that with the plan T held fixed, as in the released code of Feature Scattering. Where
    Sinkhorn's iterations have converged this is, by the envelope theorem, the gradient of the regularised
    problem's least value.
    """
    costs = cosine_costs(one, other)
    return (sinkhorn(costs, regularisation, iterations, tolerance) * costs).sum()
