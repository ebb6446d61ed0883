"""Finite samples: the linear model fitted to them, and data that it generates (Directions appendix C)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize

from onmanifold.analysis.theory.model import Array, LinearModel
from onmanifold.foundation.errors import InputError


class Fit(NamedTuple):
    """A Gaussian that a loss was minimised with.

    Attributes:
        mean: (d,).
        covariance: (d, d).
    """

    mean: Array
    covariance: Array


def fit_linear_model(points: Array, latent_size: int) -> LinearModel:
    """The maximum likelihood P-PCA of points (n, d): mean, eigenvectors and eigenvalues of the sample.

    The covariance is that of maximum likelihood, divided by n. The noise variance is the mean of the eigenvalues
    without latent (Tipping and Bishop 1999). Of n points at most n − 1 eigenvalues are above 0.

    Raises:
        InputError: Another shape, or q is larger than the sample's rank.
    """
    if points.ndim != 2 or len(points) < 2 or not np.isfinite(points).all():
        raise InputError(f"points: expected finite numbers (n, d), found shape {points.shape}.")
    mean = points.mean(0)
    centred = points - mean
    values, vectors = np.linalg.eigh(centred.T @ centred / len(points))
    values, vectors = values[::-1], vectors[:, ::-1]
    values = np.where(values > 1e-12 * values[0], values, 0.0)
    noise = float(values[latent_size:].mean()) if latent_size < len(values) else 0.0
    return LinearModel(values, latent_size, noise, np.ascontiguousarray(vectors), mean)


def augmented_eigenvalues(model: LinearModel, real: int, generated: int) -> Array:
    """(d,) eigenvalues after training with generated points beside the real ones (Theorem 8).

    λ where there is a latent, n λ / (n + m) + m s² / (n + m) elsewhere: the small ones move towards their mean.

    Args:
        model: Fitted to the real points.
        real: n.
        generated: m, of which the loss takes the expectation, as eq. 13 does.
    """
    if real < 1 or generated < 0:
        raise InputError(
            f"real, generated: expected at least 1 and 0, found {real} and {generated}."
        )
    mixed = (real * model.eigenvalues + generated * model.noise_variance) / (real + generated)
    return np.where(model.leading, model.eigenvalues, mixed)


def train_augmented(points: Array, model: LinearModel, generated: int) -> Fit:
    """Minimise the loss of eq. 13 over mean and covariance by descent on it, knowing nothing of its minimum.

    The precision is B Bᵀ, so that it stays positive; L-BFGS moves mean and B.

    Args:
        points: (n, d) the real ones.
        model: Generates; its distribution is N(mean, W Wᵀ + s² I), with s above 0.
        generated: m.
    """
    count, size = points.shape
    share = count / (count + generated)

    def moment(mean: Array) -> tuple[Array, Array]:
        """The second moment about a mean of what is trained with, and minus half its gradient in the mean."""
        real, made = points - mean, model.mean - mean
        second = share * (real.T @ real) / count
        second = second + (1 - share) * (model.generated_covariance + np.outer(made, made))
        return second, share * real.mean(0) + (1 - share) * made

    def loss(numbers: Array) -> tuple[float, Array]:
        mean, factor = numbers[:size], numbers[size:].reshape(size, size)
        second, pull = moment(mean)
        logarithm = np.linalg.slogdet(factor)[1]
        value = -logarithm + 0.5 * np.trace(factor.T @ second @ factor)
        slope = second @ factor - np.linalg.inv(factor).T
        return float(value), np.concatenate([-factor @ (factor.T @ pull), slope.ravel()])

    start = np.concatenate([np.zeros(size), np.eye(size).ravel()])
    options = {"maxiter": 20_000, "maxfun": 100_000, "ftol": 0.0, "gtol": 1e-10, "maxcor": 50}
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x
    factor = found[size:].reshape(size, size)
    return Fit(found[:size], np.linalg.inv(factor @ factor.T))
