"""Excess risks of the linear model (Directions section 4.3), each beside its Monte Carlo estimate.

The loss is the negative log-likelihood, in nats, under the data's own mean and covariance.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import gammaln

from onmanifold.analysis.theory.model import (
    Array,
    Estimate,
    LinearModel,
    Source,
    Space,
    Strategy,
    estimate,
    gaussian_losses,
    sample_source,
    source_eigenvalues,
)
from onmanifold.analysis.theory.perturbation import (
    least_multiplier,
    multiplier_of_radius,
    stretch,
    worst_perturbation,
    worst_within,
)


class Bounds(NamedTuple):
    """Between what numbers a risk lies.

    Attributes:
        low: At least this.
        high: At most this.
    """

    low: float
    high: float


def perturbation_risk(model: LinearModel, space: Space, multiplier: float, source: Source) -> float:
    """What the worst penalised perturbation adds to the mean loss (Theorems 2 and 4).

    ½ Σ (f² − 1) λ⁽ʲ⁾ / λ with the factors f of `stretch`; infinite where the multiplier is too small for a
    maximum. The penalty itself is not counted, as in the paper. Points that strategies 2 and 3 draw beside the
    plane of singular data have an infinite loss before and after; then the losses in the plane are compared.
    """
    factors = stretch(model, space, multiplier)
    return _weighted(factors**2 - 1, model, source, factors)


def penalised_risk(model: LinearModel, space: Space, multiplier: float, source: Source) -> float:
    """The same less the mean penalty (L / 2) |Δ|²: ½ Σ (f − 1) λ⁽ʲ⁾ / λ."""
    factors = stretch(model, space, multiplier)
    return _weighted(factors - 1, model, source, factors)


def risk_at_radius(model: LinearModel, space: Space, radius: float, source: Source) -> float:
    """`perturbation_risk` with the one L at which the mean square length is radius² (eq. 8)."""
    if radius == 0:
        return 0.0
    multiplier = multiplier_of_radius(model, space, radius, source)
    if np.isinf(multiplier):
        return float("inf")
    return perturbation_risk(model, space, multiplier, source)


def rank_risk(latent_size: int, multiplier: float) -> float:
    """Corollary 3, exactly: ½ q (2L − 1) / (L − 1)² for data of rank q, of any shape; infinite for L ≤ 1."""
    if multiplier <= 1:
        return float("inf")
    return latent_size * (2 * multiplier - 1) / (multiplier - 1) ** 2 / 2


def rank_risk_at_radius(latent_size: int, radius: float) -> float:
    """The same when each latent perturbation has length ``radius``: radius E|z| + radius² / 2, z ~ N(0, I_q)."""
    size = latent_size
    length = np.sqrt(2.0) * np.exp(gammaln((size + 1) / 2) - gammaln(size / 2))
    return float(radius * length + radius**2 / 2)


def image_risk_bounds(model: LinearModel, multiplier: float) -> Bounds:
    """Theorem 4 with its constants: f(t) and d f(t) with t = λ_min L and f(t) = (2t − 1) / (2 (t − 1)²).

    f(t) is between 1 / t and (1 / t) / (1 − 1 / t)², so that the risk falls as 1 / (λ_min L).
    """
    low = rank_risk(1, float(model.eigenvalues[-1]) * multiplier)
    return Bounds(low, model.dimensions * low)


def distribution_risk(model: LinearModel, source: Source) -> float:
    """What encoding and decoding alone add to the mean loss: ½ (Σ λ⁽ʲ⁾ / λ − d).

    The loss's covariance is the data's before and after, so that its determinant cancels: the paper's logarithm,
    see `distribution_risk_as_printed`, has no place here. Of singular covariances d is the rank, and the risk is
    infinite if points leave the data's plane.
    """
    ones = np.ones(model.dimensions)
    return float(0.5 * (_shares(model, source, ones).sum() - model.rank))


def distribution_risk_as_printed(model: LinearModel, strategy: Strategy) -> float:
    """The second formula of Theorem 2: ½ log(Π λ⁽ʲ⁾ / Π λ) more than `distribution_risk`. It is not confirmed.

    The logarithm would belong to a loss whose covariance is refitted to the changed distribution; then the sum
    would vanish. Where a λ⁽ʲ⁾ is 0 and λ is not the formula gives −infinity; 0 / 0 counts as 1.
    """
    changed, eigenvalues = source_eigenvalues(model, strategy), model.eigenvalues
    with np.errstate(divide="ignore", invalid="ignore"):
        logarithms = np.log(changed) - np.log(eigenvalues)
    both = (changed == 0) & (eigenvalues == 0)
    return float(0.5 * logarithms[~both].sum()) + distribution_risk(model, strategy)


def energy_shares(model: LinearModel, space: Space, multiplier: float, source: Source) -> Array:
    """(d,) the share of each eigen-direction in the mean square move of the image, adding up to 1."""
    moves = (stretch(model, space, multiplier) - 1) ** 2 * source_eigenvalues(model, source)
    return np.asarray(moves / moves.sum())


def sampled_perturbation_risk(
    model: LinearModel, space: Space, multiplier: float, source: Source, samples: int, seed: int = 0
) -> Estimate:
    """Monte Carlo of `perturbation_risk`: points are drawn, perturbed, and their losses compared."""
    if not multiplier > least_multiplier(model, space):
        return Estimate(float("inf"), float("nan"))
    points = sample_source(model, source, samples, seed)
    perturbations = worst_perturbation(model, points, space, multiplier)
    return _perturbed(model, points, perturbations, space)


def sampled_penalised_risk(
    model: LinearModel, space: Space, multiplier: float, source: Source, samples: int, seed: int = 0
) -> Estimate:
    """Monte Carlo of `penalised_risk`."""
    points = sample_source(model, source, samples, seed)
    perturbations = worst_perturbation(model, points, space, multiplier)
    penalties = multiplier / 2 * (perturbations**2).sum(1)
    return _perturbed(model, points, perturbations, space, penalties)


def sampled_risk_within(
    model: LinearModel, space: Space, radius: float, source: Source, samples: int, seed: int = 0
) -> Estimate:
    """Monte Carlo of the excess risk when every perturbation has length ``radius``, each with its own L."""
    points = sample_source(model, source, samples, seed)
    perturbations = worst_within(model, points, space, radius).perturbations
    return _perturbed(model, points, perturbations, space)


def sampled_distribution_risk(
    model: LinearModel, strategy: Strategy, samples: int, seed: int = 0
) -> Estimate:
    """Monte Carlo of `distribution_risk`: the losses of data, and of what the strategy makes of them."""
    data = sample_source(model, "data", samples, seed)
    changed = sample_source(model, strategy, samples, seed)
    before, after = (
        gaussian_losses(points, model.mean, model.covariance) for points in (data, changed)
    )
    return estimate(after - before)


def _perturbed(
    model: LinearModel,
    points: Array,
    perturbations: Array,
    space: Space,
    penalties: Array | float = 0.0,
) -> Estimate:
    """What perturbations add to the losses of points; no latent leads off the data's plane."""
    moved = points + perturbations @ model.mover(space).T
    before, after = (
        gaussian_losses(one, model.mean, model.covariance, in_plane=space == "latent")
        for one in (points, moved)
    )
    return estimate(after - before - penalties)


def _weighted(gains: Array, model: LinearModel, source: Source, factors: Array) -> float:
    """½ Σ gain λ⁽ʲ⁾ / λ over the directions that move."""
    shares = _shares(model, source, factors)
    return float(0.5 * np.multiply(gains, shares, out=np.zeros_like(gains), where=gains != 0).sum())


def _shares(model: LinearModel, source: Source, factors: Array) -> Array:
    """(d,) λ⁽ʲ⁾ / λ, with 0 / 0 = 0 unless a perturbation leaves the plane there: then infinite."""
    changed, eigenvalues = source_eigenvalues(model, source), model.eigenvalues
    shares = np.where((changed > 0) | np.isinf(factors), np.inf, 0.0)
    return np.divide(changed, eigenvalues, out=shares, where=eigenvalues > 0)
