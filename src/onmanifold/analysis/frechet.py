"""The Fréchet distance between two sets of features, each taken for a Gaussian."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from onmanifold.foundation.errors import InputError


class Gaussian(NamedTuple):
    """A normal distribution, perhaps flat in some directions.

    Attributes:
        mean: (D,) float64.
        covariance: (D, D) float64, symmetric, without negative eigenvalues.
    """

    mean: Tensor
    covariance: Tensor


def gaussian_of(features: Tensor) -> Gaussian:
    """The Gaussian of the mean and the unbiased covariance of features (N, D), computed in float64.

    Raises:
        InputError: Fewer than two rows, another shape, or a NaN.
    """
    if features.ndim != 2 or len(features) < 2 or not features.is_floating_point():
        raise InputError(
            f"features: expected floats (N, D) with N at least 2, found {features.dtype} {tuple(features.shape)}."
        )
    if not bool(features.isfinite().all()):
        raise InputError("features: found NaN or infinite values.")
    rows = features.detach().double()
    mean = rows.mean(0)
    centred = rows - mean
    return Gaussian(mean, centred.T @ centred / (len(rows) - 1))


def gaussian_distance(first: Gaussian, second: Gaussian) -> float:
    """The squared Fréchet distance |m₁ − m₂|² + tr(S₁ + S₂ − 2 (S₁^½ S₂ S₁^½)^½) of two Gaussians.

    Dowson and Landau 1982; it is also the squared 2-Wasserstein distance. The trace of the root is the sum of the
    singular values of F₂ F₁ᵀ, for any F with FᵀF = S. With F from the eigenvectors of S no inverse is taken and no
    root of a product: covariances of any rank are safe.
    """
    shift = (first.mean - second.mean).square().sum()
    overlap = torch.linalg.svdvals(_factor(second.covariance) @ _factor(first.covariance).T).sum()
    spread = first.covariance.trace() + second.covariance.trace() - 2 * overlap
    # Negative by rounding alone.
    return float(shift + spread.clamp(min=0))


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """The squared Fréchet distance between the Gaussians of two sets of features (N, D) and (M, D).

    Estimated from samples it is too large, by about 1 / N times a number that depends on both sets (Chong and
    Forsyth 2020). Compare distances of equal N and M, beside that of two sets of real images.

    Returns:
        The distance, of the features' squared unit, at least 0.

    Raises:
        InputError: Fewer than two rows, a NaN, or D that differ.
    """
    if first.shape[1:] != second.shape[1:]:
        raise InputError(
            f"features: expected as many columns in both, found {tuple(first.shape)} and {tuple(second.shape)}."
        )
    return gaussian_distance(gaussian_of(first), gaussian_of(second))


def _factor(covariance: Tensor) -> Tensor:
    """F (D, D) with FᵀF = covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    factor: Tensor = values.clamp(min=0).sqrt().unsqueeze(1) * vectors.T
    return factor
