"""What adversarial training makes of the linear model's covariance (Directions section 4.4, Theorems 5 and 6).

The game is min over (mean, Σ), max over M, of the mean loss of x + A M (x − mean) with E|M (x − mean)|² = radius²,
which is the paper's problem (10): one multiplier L serves all points. A = W and M = Wᵀ (LΣ − WWᵀ)⁻¹ in latent
space, A = I in image space. Σ is the answer to M where it is the covariance of the attacked points.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigvalsh
from scipy.optimize import brentq, minimize_scalar

from onmanifold.analysis.theory.model import (
    Array,
    Estimate,
    LinearModel,
    Source,
    Space,
    estimate,
    sample_source,
    source_covariance,
    source_eigenvalues,
)
from onmanifold.foundation.errors import InputError

_MOST_ROUNDS = 200_000
_SETTLED = 1e-13
_ROUNDING = 1e-9


class Trained(NamedTuple):
    """What rounds of attack and refit ended in.

    Attributes:
        covariance: (d, d).
        rounds: How many there were.
    """

    covariance: Array
    rounds: int


def saddle_eigenvalues(
    model: LinearModel, space: Space, multiplier: float, source: Source
) -> Array:
    """(d,) eigenvalues of the covariance at the saddle point (Theorem 5 in latent, Theorem 6 in image space).

    ½ s + g / L + ½ s √(1 + 4 g / (L s)) for a variance s of the points and a gain g: λ − s² in the leading
    directions and 0 in the others in latent space, 1 in image space. It exists for every L above 0.
    """
    changed, gains = source_eigenvalues(model, source), model.gains(space)
    if not (np.isfinite(multiplier) and multiplier > 0):
        raise InputError(f"multiplier: expected a finite number above 0, found {multiplier!r}.")
    return _saddle(changed, gains, multiplier)


def saddle_ratio(multiplier: float) -> float:
    """½ + 1 / L + √(¼ + 1 / L): what each eigenvalue of data of rank q grows by under latent training.

    >>> round(saddle_ratio(4.0), 4)
    1.4571
    """
    return float(_saddle(np.ones(1), np.ones(1), multiplier)[0])


def saddle_residual(
    model: LinearModel, space: Space, multiplier: float, source: Source, eigenvalues: Array
) -> Array:
    """(d,) r − s (Lr / (Lr − g))²: how far eigenvalues r are from being those of the points they attack.

    Where points have no variance, s = 0, it is how far r is from the limit g / L.
    """
    changed, gains = source_eigenvalues(model, source), model.gains(space)
    scaled, moved = multiplier * eigenvalues, changed > 0
    factors = np.divide(scaled, scaled - gains, out=np.ones_like(scaled), where=moved)
    return np.where(moved, eigenvalues - changed * factors**2, eigenvalues - gains / multiplier)


def saddle_multiplier(model: LinearModel, space: Space, radius: float, source: Source) -> float:
    """L at the saddle point where the root mean square length of the perturbations is ``radius``.

    There a direction's part of the mean square length is g / (L² r), which falls from infinity to 0 with L.
    """
    changed, gains = source_eigenvalues(model, source), model.gains(space)
    movable = gains > 0
    if not (np.isfinite(radius) and radius > 0):
        raise InputError(f"radius: expected a finite number above 0, found {radius!r}.")
    if not movable.any():
        raise InputError(
            "model: expected a leading eigenvalue above the noise; no latent moves anything."
        )

    def excess(logarithm: float) -> float:
        multiplier = float(np.exp(logarithm))
        eigenvalues = _saddle(changed, gains, multiplier)
        length = (gains[movable] / eigenvalues[movable]).sum() / multiplier**2
        return float(0.5 * np.log(length) - np.log(radius))

    low, high = -1.0, 1.0
    while excess(low) < 0:
        low *= 2
    while excess(high) > 0:
        high *= 2
    return float(np.exp(brentq(excess, low, high, xtol=1e-14)))


def train_adversarially(
    model: LinearModel,
    space: Space,
    multiplier: float,
    source: Source,
    points: Array | None = None,
) -> Trained:
    """Attack and refit in turn until nothing changes: adversarial training with infinitely many samples.

    Σ becomes the covariance of the points that the worst M against Σ makes, (I + AM) C (I + AM)ᵀ, by matrices
    and without eigenvectors. A full step may jump over the saddle point and away, as the answer to a smaller Σ is
    a larger one; it is shortened by that answer's slope. From below the sequence then rises to the saddle.

    Off the plane of points of lower rank the mean loss falls with Σ as long as the worst M is bounded, which takes
    AAᵀ / L. There Σ is left at this limit, where no M gains or loses.

    Args:
        model: Gives W, and the points' covariance C.
        space: Where the perturbation is.
        multiplier: L.
        source: Where the points come from.
        points: (d, d) C, if another than the source's.

    Raises:
        InputError: It does not settle, for a multiplier that is too small beside the points' variance.
    """
    points = source_covariance(model, source) if points is None else points
    move = model.mover(space)
    covariance = points + move @ move.T / multiplier
    plane = points @ np.linalg.pinv(points, rcond=_ROUNDING, hermitian=True)
    for rounds in range(_MOST_ROUNDS):
        precision = np.linalg.pinv(covariance, rcond=_ROUNDING, hermitian=True)
        inner = multiplier * np.eye(move.shape[1]) - move.T @ precision @ move
        answer = move @ np.linalg.pinv(inner, rcond=_ROUNDING, hermitian=True) @ move.T
        shift = answer @ precision
        attacked = points + shift @ points + points @ shift.T + shift @ points @ shift.T
        change = plane @ (attacked - covariance) @ plane.T
        if np.abs(change).max() <= _SETTLED * np.abs(covariance).max():
            return Trained(covariance, rounds)
        # Along an eigenvector the answer's slope is twice its move and its growth; no direction has more.
        steepest = 2 * _largest(answer, precision)
        growth = max(1.0, _largest(attacked, precision))
        covariance = covariance + change / (1 + steepest * growth)
    raise InputError(f"multiplier: with {multiplier:.4g} attack and refit do not settle.")


def minimise_adversarial_loss(
    model: LinearModel, space: Space, multiplier: float, source: Source
) -> Array:
    """(d,) the same by two nested searches along each eigenvector: over the variance, for the worst move to each.

    Neither knows what is stationary: the outer one sees values of half the maximum over m of
    log r + s (1 + √g m)² / r − L s m².
    """
    changed, gains = source_eigenvalues(model, source), model.gains(space)
    pairs = zip(changed, np.sqrt(gains), strict=True)
    return np.array([_best_variance(float(s), float(a), multiplier) for s, a in pairs])


def _best_variance(variance: float, length: float, multiplier: float) -> float:
    if variance == 0:
        return length**2 / multiplier
    least = length**2 / multiplier

    def worst(logarithm: float) -> float:
        tested = least + float(np.exp(logarithm))

        def gain(move: float) -> float:
            return (1 + length * move) ** 2 / tested - multiplier * move**2

        if length == 0:
            return float(0.5 * (np.log(tested) + variance * gain(0.0)))
        found = minimize_scalar(lambda move: -gain(move), bracket=(0.0, 1.0), tol=1e-10)
        return float(0.5 * (np.log(tested) + variance * gain(float(found.x))))

    start = float(np.log(variance))
    found = minimize_scalar(worst, bracket=(start, start + 0.5), tol=1e-10)
    return least + float(np.exp(found.x))


def line_saddle_within(variance: float, radius: float) -> float:
    """The variance at the saddle point of eq. 4 in one dimension, where every point moves by ``radius``.

    E(|v| + radius)² = λ + 2 radius √(2λ/π) + radius². Theorem 6 is printed as the solution of eq. 4, but solves
    the modified problem, in which only the mean square of the moves is bound; see `line_saddle_on_average`.
    """
    return float(variance + 2 * radius * np.sqrt(2 * variance / np.pi) + radius**2)


def line_saddle_on_average(variance: float, radius: float) -> float:
    """Theorem 6 in one dimension with L solved from the mean square radius: (√λ + radius)²."""
    return float((np.sqrt(variance) + radius) ** 2)


def sampled_line_saddle_within(
    variance: float, radius: float, samples: int, seed: int = 0
) -> Estimate:
    """Monte Carlo of `line_saddle_within`: the variance about the mean of points that all moved outwards."""
    line = LinearModel(np.array([variance]), 1, 0.0, np.eye(1), np.zeros(1))
    moved = np.abs(sample_source(line, "data", samples, seed)[:, 0]) + radius
    return estimate(moved**2)


def _saddle(changed: Array, gains: Array, multiplier: float) -> Array:
    """√r = ½ (√s + √(s + 4 g / L)), squared: the same as printed, without dividing by s."""
    roots = np.sqrt(changed) + np.sqrt(changed + 4 * gains / multiplier)
    return np.asarray(roots**2 / 4)


def _largest(matrix: Array, precision: NDArray[np.floating]) -> float:
    """The largest ratio of a matrix to the covariance of this precision, in the covariance's plane."""
    values, vectors = np.linalg.eigh(precision)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    return float(eigvalsh(root @ matrix @ root)[-1])
