"""The worst perturbation of a point of the linear model: with a penalty, within a radius, and by ascent.

A move of a point x by A Δ, with A = W in latent space (Δ in R^q) and A = I in image space (Δ in R^d), changes its
loss under N(mean, Σ) to ½ (v + AΔ)ᵀ Σ⁻¹ (v + AΔ) plus a constant, where v = x − mean. In the eigenvectors'
coordinates all matrices are diagonal: with the gain g, the squared length of A's column, a = g / λ is the loss's
curvature in Δ and b = √g v / λ its slope at 0. The worst Δ with the penalty (L / 2) |Δ|² is b / (L − a).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq

from onmanifold.analysis.theory.model import Array, LinearModel, Source, Space, source_eigenvalues
from onmanifold.foundation.errors import InputError

# Steps of an ascent before it counts as lost, and what its last move may be, relative to the perturbation.
_MOST_STEPS = 100_000
_SETTLED = 1e-13


class BoundedPerturbation(NamedTuple):
    """The worst perturbations of a given length.

    Attributes:
        perturbations: (n, q) latents, or (n, d) pixels; each of length ``radius``.
        multipliers: (n,) the Lagrange multiplier L of each; infinite where the loss is.
    """

    perturbations: Array
    multipliers: Array


def least_multiplier(model: LinearModel, space: Space) -> float:
    """The multiplier that L must exceed for the penalised attack to be bounded: the largest curvature.

    In latent space the largest 1 − s² / λ, in image space 1 / λ_min, infinite where λ_min = 0.
    """
    return float(_curvatures(model, space).max())


def stretch(model: LinearModel, space: Space, multiplier: float) -> Array:
    """(d,) what the worst penalised perturbation multiplies x − mean with, along each eigenvector (Lemma 2).

    In latent space 1 + (λ − s²) / ((L − 1) λ + s²) in the leading directions, in image space 1 + 1 / (Lλ − 1).
    Infinite where L is too small; 1 where nothing can move.

    Args:
        model: The model, also attacked: its mean and covariance are the loss's.
        space: Where the perturbation is.
        multiplier: L, above 0.
    """
    _check_positive("multiplier", multiplier)
    curvatures = _curvatures(model, space)
    room = multiplier - curvatures
    # 1 / (1 − a / L), which also stands for a = 0.
    factors = np.full(model.dimensions, np.inf)
    return np.asarray(np.divide(multiplier, room, out=factors, where=room > 0))


def worst_perturbation(model: LinearModel, points: Array, space: Space, multiplier: float) -> Array:
    """The Δ (n, q) or (n, d) that maximises loss − (L / 2) |Δ|² at each point (n, d) (Lemma 2, closed form).

    Wᵀ (LΣ − WWᵀ)⁻¹ (x − mean) in latent space, (LΣ − I)⁻¹ (x − mean) in image space.

    Raises:
        InputError: L does not exceed `least_multiplier`: the supremum is infinite.
    """
    least = least_multiplier(model, space)
    if not multiplier > least:
        raise InputError(
            f"multiplier: expected more than {least:.4g}, below which the penalised loss has no maximum, "
            f"found {multiplier:.4g}."
        )
    slopes = _slopes(model, model.coordinates(points), space)
    return _in_space(model, slopes / (multiplier - _curvatures(model, space)), space)


def ascend(model: LinearModel, points: Array, space: Space, multiplier: float) -> Array:
    """The same by gradient ascent on the stated objective, with matrices and no eigenvectors."""
    move, precision = model.mover(space), _precision(model)
    hessian = move.T @ precision @ move
    slopes = (points - model.mean) @ precision @ move
    found = np.zeros((len(points), move.shape[1]))
    for _ in range(_MOST_STEPS):
        # The objective curves by at most L, hence the step of 1 / L.
        step = (slopes + found @ hessian - multiplier * found) / multiplier
        found = found + step
        if np.abs(step).max() <= _SETTLED * max(1.0, np.abs(found).max()):
            return found
    raise InputError(
        f"multiplier: {multiplier:.6g} is so near its least value that the ascent does not settle."
    )


def worst_within(
    model: LinearModel, points: Array, space: Space, radius: float
) -> BoundedPerturbation:
    """The worst Δ of length at most ``radius`` at each point: L is the root of |Δ(L)| = radius (Lemma 2).

    A convex function is largest on the ball's boundary. L is found by Brent's method between bounds that the
    slopes give. Where a point has no slope in the most curved direction, L may be the largest curvature, and the
    rest of the radius goes in that direction, either way. Where the covariance is singular in image space all of
    it goes off the data's plane, where the loss is infinite.
    """
    _check_positive("radius", radius)
    curvatures = _curvatures(model, space)
    coordinates = model.coordinates(points)
    found = np.zeros_like(coordinates)
    multipliers = np.full(len(points), np.inf)
    top = int(curvatures.argmax())
    if np.isinf(curvatures[top]):
        found[:, top] = radius
        return BoundedPerturbation(_in_space(model, found, space), multipliers)
    for row, slopes in enumerate(_slopes(model, coordinates, space)):
        least = _room(curvatures, slopes, radius)
        rooms = least + (curvatures[top] - curvatures)
        moved = np.divide(slopes, rooms, out=np.zeros_like(slopes), where=rooms > 0)
        if least == 0.0:
            moved[top] = np.sqrt(max(radius**2 - float(moved @ moved), 0.0))
        found[row], multipliers[row] = moved, curvatures[top] + least
    return BoundedPerturbation(_in_space(model, found, space), multipliers)


def ascend_within(model: LinearModel, points: Array, space: Space, radius: float) -> Array:
    """The same by projected gradient steps, for positive covariances: Δ becomes the gradient, cut to the radius.

    The objective is convex, so each step raises it. The start, the gradient at 0, has the optimum's signs, and
    they stay; so the limit is the global maximum.
    """
    move, precision = model.mover(space), _precision(model)
    hessian = move.T @ precision @ move
    slopes = (points - model.mean) @ precision @ move
    found = np.zeros_like(slopes)
    for _ in range(_MOST_STEPS):
        gradients = slopes + found @ hessian
        last = found
        found = np.asarray(radius * gradients / np.linalg.norm(gradients, axis=1, keepdims=True))
        if np.abs(found - last).max() <= _SETTLED * radius:
            return found
    raise InputError(
        "points: expected a slope in the most curved direction; the ascent does not settle."
    )


def multiplier_of_radius(model: LinearModel, space: Space, radius: float, source: Source) -> float:
    """The one L for all points with which the mean square of |Δ| is radius² (the constraint of eq. 8).

    Args:
        model: The model, which is attacked with its own mean and covariance.
        space: Where the perturbation is.
        radius: Root of the mean square length of the perturbations, above 0.
        source: Where the points come from.

    Returns:
        L; infinite where the covariance is singular in image space, as then the loss is.
    """
    _check_positive("radius", radius)
    curvatures = _curvatures(model, space)
    if np.isinf(curvatures.max()):
        return float("inf")
    slopes = _slopes(model, np.sqrt(source_eigenvalues(model, source)), space)
    return float(curvatures.max()) + _room(curvatures, slopes, radius)


def _room(curvatures: Array, slopes: Array, radius: float) -> float:
    """How far L is above the largest curvature where Σ (b / (L − a))² = radius²; 0 where there is no such L.

    Its logarithm is searched, so that it is exact to as many digits however near L comes to the curvature.
    """
    below = float(curvatures.max()) - curvatures
    top = float(np.linalg.norm(slopes[below == 0]))
    # Alone, the slopes in the most curved directions would give the lower bound; all slopes there the higher.
    low, high = top / radius, float(np.linalg.norm(slopes)) / radius
    if low == high:
        return high

    def excess(logarithm: float) -> float:
        length = np.linalg.norm(slopes / (np.exp(logarithm) + below))
        return float(np.log(length) - np.log(radius))

    if top == 0.0:
        others = below > 0
        if np.linalg.norm(slopes[others] / below[others]) <= radius:
            return 0.0
        low = high * 1e-12
        while excess(np.log(low)) < 0:
            low /= 10.0
    # Rounding may leave a root at a bound.
    edges = np.log(low) - 1e-9, np.log(high) + 1e-9
    return float(np.exp(brentq(excess, *edges, xtol=1e-15, rtol=1e-14)))


def _curvatures(model: LinearModel, space: Space) -> Array:
    """(d,) a = gain / λ, the loss's curvatures; infinite where a move leaves the data's plane."""
    gains = model.gains(space)
    curvatures = np.where(gains > 0, np.inf, 0.0)
    return np.asarray(
        np.divide(gains, model.eigenvalues, out=curvatures, where=model.eigenvalues > 0)
    )


def _slopes(model: LinearModel, coordinates: Array, space: Space) -> Array:
    """(..., d) b = √gain v / λ for v in the eigenvectors' coordinates; 0 where λ is 0."""
    lengths = np.sqrt(model.gains(space))
    weights = np.divide(
        lengths, model.eigenvalues, out=np.zeros_like(lengths), where=model.eigenvalues > 0
    )
    return np.asarray(coordinates * weights)


def _in_space(model: LinearModel, perturbations: Array, space: Space) -> Array:
    """From the eigenvectors' coordinates (n, d) to latents (n, q), which lie along them, or pixels (n, d)."""
    if space == "latent":
        return perturbations[:, : model.latent_size]
    return np.asarray(perturbations @ model.basis.T)


def _precision(model: LinearModel) -> Array:
    return np.asarray(np.linalg.pinv(model.covariance, rcond=1e-9, hermitian=True))


def _check_positive(name: str, value: float) -> None:
    if not (np.isfinite(value) and value > 0):
        raise InputError(f"{name}: expected a finite number above 0, found {value!r}.")
