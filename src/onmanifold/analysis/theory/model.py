"""The linear Gaussian model of Directions section 4: data, generator, loss and the three sampling strategies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from onmanifold.foundation.errors import InputError
from onmanifold.foundation.randomness import normal, uniform

Array = NDArray[np.float64]
Space = Literal["latent", "image"]
Strategy = Literal["encode", "posterior", "prior"]
Source = Literal["encode", "posterior", "prior", "data"]
"""Where points come from before they are perturbed: one of the strategies, or the data themselves."""

STRATEGIES: tuple[Strategy, ...] = ("encode", "posterior", "prior")
"""Strategies 1, 2 and 3 of Directions section 4.2."""

# What rounding leaves of a zero, beside the largest number of its kind.
_ROUNDING = 1e-9


class Estimate(NamedTuple):
    """A mean over samples.

    Attributes:
        value: The mean; infinite where a sample is.
        standard_error: Of the mean; NaN where a sample is infinite.
    """

    value: float
    standard_error: float


@dataclass(frozen=True, eq=False)
class LinearModel:
    """Data x ~ N(mean, U Λ Uᵀ) and their P-PCA x = W z + mean + noise, with z ~ N(0, I) (Directions section 4.1).

    W = U_q (Λ_q − s² I)^½ has the q leading eigenvectors, the noise has variance s². Where all other eigenvalues
    are s², the generator's distribution is that of the data: Σ = W Wᵀ + s² I.

    Args:
        eigenvalues: (d,) Λ, falling, at least 0.
        latent_size: q, from 1 to d.
        noise_variance: s², at least 0, at most the q-th eigenvalue.
        basis: (d, d) U, orthogonal, an eigenvector in each column.
        mean: (d,).

    Raises:
        InputError: Something is of another shape or range, or the basis is not orthogonal.
    """

    eigenvalues: Array
    latent_size: int
    noise_variance: float
    basis: Array
    mean: Array

    def __post_init__(self) -> None:
        _check_spectrum(self.eigenvalues, self.latent_size)
        least = float(self.eigenvalues[self.latent_size - 1])
        if not 0 <= self.noise_variance <= least * (1 + _ROUNDING):
            raise InputError(
                f"noise_variance: expected from 0 to {least:.4g}, the smallest eigenvalue that has a latent, "
                f"found {self.noise_variance:.4g}."
            )
        size = self.dimensions
        for name, array, shape in (
            ("basis", self.basis, (size, size)),
            ("mean", self.mean, (size,)),
        ):
            if array.shape != shape or not np.isfinite(array).all():
                raise InputError(
                    f"{name}: expected finite numbers {shape}, found shape {array.shape}."
                )
        if not np.allclose(self.basis.T @ self.basis, np.eye(size), atol=1e-8):
            raise InputError("basis: expected orthogonal columns of length 1.")

    @property
    def dimensions(self) -> int:
        """d."""
        return len(self.eigenvalues)

    @property
    def rank(self) -> int:
        """Eigenvalues above 0."""
        return int((self.eigenvalues > 0).sum())

    @property
    def leading(self) -> NDArray[np.bool_]:
        """(d,) whether an eigen-direction has a latent."""
        return np.arange(self.dimensions) < self.latent_size

    @property
    def covariance(self) -> Array:
        """(d, d) U Λ Uᵀ, of the data."""
        return self._matrix(self.eigenvalues)

    @property
    def generator(self) -> Array:
        """(d, q) W."""
        lengths = np.sqrt(np.clip(self.eigenvalues - self.noise_variance, 0, None))
        return np.asarray((self.basis * lengths)[:, : self.latent_size])

    @property
    def generated_covariance(self) -> Array:
        """(d, d) W Wᵀ + s² I."""
        return np.asarray(
            self.generator @ self.generator.T + self.noise_variance * np.eye(self.dimensions)
        )

    def gains(self, space: Space) -> Array:
        """(d,) squared length of the move along each eigenvector that a perturbation of length 1 makes.

        In latent space λ − s² in the leading directions and 0 in the others, in image space 1.
        """
        if space == "image":
            return np.ones(self.dimensions)
        return np.where(self.leading, np.clip(self.eigenvalues - self.noise_variance, 0, None), 0.0)

    def mover(self, space: Space) -> Array:
        """The matrix that turns a perturbation into a move of x: W (d, q), or the identity (d, d)."""
        return self.generator if space == "latent" else np.eye(self.dimensions)

    def coordinates(self, points: Array) -> Array:
        """Points (n, d) in the eigenvectors' coordinates about the mean, (n, d)."""
        return np.asarray((points - self.mean) @ self.basis)

    def sample(self, count: int, seed: int = 0, stream: str = "data") -> Array:
        """Data (count, d); a sample depends on seed, stream and its number alone."""
        if count < 1:
            raise InputError(f"count: expected at least 1, found {count}.")
        spread = np.sqrt(self.eigenvalues)
        numbers = _normals(seed, count, self.dimensions, stream)
        return np.asarray(self.mean + (numbers * spread) @ self.basis.T)

    def flattened(self) -> LinearModel:
        """The same with data of rank q and without noise: data in the manifold's plane."""
        return LinearModel(
            np.where(self.leading, self.eigenvalues, 0.0),
            self.latent_size,
            0.0,
            self.basis,
            self.mean,
        )

    def regenerated(self) -> LinearModel:
        """The same with the generator's distribution for data: each other eigenvalue is the noise variance."""
        return LinearModel(
            np.where(self.leading, self.eigenvalues, self.noise_variance),
            self.latent_size,
            self.noise_variance,
            self.basis,
            self.mean,
        )

    def _matrix(self, eigenvalues: Array) -> Array:
        return np.asarray((self.basis * eigenvalues) @ self.basis.T)


def linear_model(
    spectrum: Sequence[float],
    latent_size: int,
    sigma: float | None = None,
    seed: int | None = 0,
) -> LinearModel:
    """A model of a spectrum, with random eigenvectors and a random mean.

    Args:
        spectrum: The data's eigenvalues, in any order.
        latent_size: q.
        sigma: Standard deviation of the generator's noise; None: that of maximum likelihood, whose square is the
            mean of the other eigenvalues (Tipping and Bishop 1999).
        seed: Of eigenvectors and mean; None: the axes, and mean 0.

    Raises:
        InputError: No such model.

    >>> model = linear_model([4.0, 2.0, 0.3, 0.1], latent_size=2)
    >>> round(model.noise_variance, 12)
    0.2
    """
    eigenvalues = np.sort(np.asarray(spectrum, dtype=np.float64))[::-1].copy()
    _check_spectrum(eigenvalues, latent_size)
    size = len(eigenvalues)
    others = eigenvalues[latent_size:]
    noise = float(others.mean()) if len(others) else 0.0
    if seed is None:
        basis, mean = np.eye(size), np.zeros(size)
    else:
        basis = np.linalg.qr(_normals(seed, size, size, "basis"))[0]
        mean = _normals(seed, size, 1, "mean")[:, 0]
    return LinearModel(eigenvalues, latent_size, noise if sigma is None else sigma**2, basis, mean)


def random_spectrum(
    seed: int, dimensions: int = 10, low: float = 0.05, high: float = 5.0
) -> tuple[float, ...]:
    """Eigenvalues whose logarithms are uniform between those of ``low`` and ``high``, falling."""
    numbers = uniform(seed, torch.arange(dimensions), stream="spectrum", dtype=torch.float64)
    values = low * (high / low) ** numbers.numpy()
    return tuple(sorted((float(value) for value in values), reverse=True))


def source_eigenvalues(model: LinearModel, source: Source) -> Array:
    """(d,) variances, along the eigenvectors, of the points that are perturbed (Lemma 1; "data": Λ).

    The printed Λ⁽²⁾, (Λ − s²)² Λ⁻¹ + (Λ − s²) Λ⁻¹ s² + s², is Λ itself: a posterior sample that is decoded with
    noise is distributed as a prior sample that is.
    """
    eigenvalues, noise = model.eigenvalues, model.noise_variance
    if source == "data":
        return eigenvalues
    if source == "encode":
        inside = np.divide(
            model.gains("latent") ** 2,
            eigenvalues,
            out=np.zeros_like(eigenvalues),
            where=eigenvalues > 0,
        )
        return np.where(model.leading, inside, 0.0)
    return np.where(model.leading, eigenvalues, noise)


def posterior_eigenvalues_as_printed(model: LinearModel) -> Array:
    """(d,) Λ⁽²⁾ in the form of Lemma 1, for positive leading eigenvalues."""
    top = model.eigenvalues[: model.latent_size]
    excess, noise = top - model.noise_variance, model.noise_variance
    others = np.full(model.dimensions - model.latent_size, noise)
    return np.concatenate([excess**2 / top + excess / top * noise + noise, others])


def source_covariance(model: LinearModel, source: Source, data: Array | None = None) -> Array:
    """(d, d) covariance of the points that are perturbed, from the matrices of encoder and decoder.

    Args:
        model: Data and generator.
        source: A strategy, or the data.
        data: (d, d) covariance of what is encoded, about the model's mean; None: the model's own.
    """
    data = model.covariance if data is None else data
    weights, noise = model.generator, model.noise_variance * np.eye(model.dimensions)
    if source == "data":
        return data
    if source == "prior":
        return np.asarray(weights @ weights.T + noise)
    encoder, spread = _encoder(model)
    there = weights @ encoder
    encoded = there @ data @ there.T
    return np.asarray(
        encoded if source == "encode" else encoded + weights @ spread @ weights.T + noise
    )


def sample_source(model: LinearModel, source: Source, count: int, seed: int = 0) -> Array:
    """Points (count, d) before they are perturbed: encoded and decoded, sample by sample (section 4.2).

    "encode": the most probable code of a data point, decoded to the most probable image. "posterior": a code
    drawn given the data point, and an image drawn given the code. "prior": a code from N(0, I), and an image
    drawn. "data": the data point. The same number is the same data point in each.
    """
    data = model.sample(count, seed)
    if source == "data":
        return data
    weights, sigma = model.generator, np.sqrt(model.noise_variance)
    latents = _normals(seed, count, model.latent_size, "latents")
    if source != "prior":
        encoder, spread = _encoder(model)
        means = (data - model.mean) @ encoder.T
        latents = means if source == "encode" else means + latents @ _root(spread)
    images = model.mean + latents @ weights.T
    if source == "encode":
        return np.asarray(images)
    return np.asarray(images + sigma * _normals(seed, count, model.dimensions, "noise"))


def gaussian_losses(points: Array, mean: Array, covariance: Array, in_plane: bool = False) -> Array:
    """(n,) negative log-likelihood, in nats, of points (n, d) under N(mean, covariance).

    Of a singular covariance it is the density within its plane. Off the plane the loss is infinite, or with
    ``in_plane`` that of the point's projection.
    """
    values, vectors = np.linalg.eigh(covariance)
    flat = values <= _ROUNDING * values[-1]
    across = (points - mean) @ vectors
    squares = (across[:, ~flat] ** 2 / values[~flat]).sum(1)
    losses = 0.5 * (np.log(2 * np.pi * values[~flat]).sum() + squares)
    off = np.abs(across[:, flat]).max(axis=1, initial=0.0)
    beside = off > _ROUNDING * max(1.0, float(np.sqrt(values[-1])))
    return np.asarray(np.where(beside & (not in_plane), np.inf, losses))


def expected_loss(second_moment: Array, covariance: Array) -> float:
    """The mean of `gaussian_losses` over points with this second moment (d, d) about the mean."""
    values, vectors = np.linalg.eigh(covariance)
    flat = values <= _ROUNDING * values[-1]
    moments = np.diag(vectors.T @ second_moment @ vectors)
    if moments[flat].max(initial=0.0) > _ROUNDING * values[-1]:
        return float("inf")
    inside = values[~flat]
    return float(0.5 * (np.log(2 * np.pi * inside).sum() + (moments[~flat] / inside).sum()))


def estimate(values: Array) -> Estimate:
    """The mean of independent values (n,), with its standard error."""
    mean = float(values.mean())
    if not np.isfinite(mean):
        return Estimate(mean, float("nan"))
    return Estimate(mean, float(values.std(ddof=1) / np.sqrt(len(values))))


def _encoder(model: LinearModel) -> tuple[Array, Array]:
    """P⁻¹Wᵀ (q, d) and s² P⁻¹ (q, q), with P = WᵀW + s² I: mean and covariance of the posterior of z."""
    weights, noise = model.generator, model.noise_variance
    inner = weights.T @ weights + noise * np.eye(model.latent_size)
    # A direction without spread and noise has no code: its latent is left at 0.
    inverse = np.linalg.pinv(inner, rcond=_ROUNDING, hermitian=True)
    return np.asarray(inverse @ weights.T), np.asarray(noise * inverse)


def _root(covariance: Array) -> Array:
    """The symmetric root of a covariance of any rank."""
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray((vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T)


def _normals(seed: int, rows: int, columns: int, stream: str) -> Array:
    numbers = normal(
        seed, torch.arange(rows), (columns,), stream=f"theory {stream}", dtype=torch.float64
    )
    return np.asarray(numbers.numpy(), dtype=np.float64)


def _check_spectrum(eigenvalues: Array, latent_size: int) -> None:
    if eigenvalues.ndim != 1 or len(eigenvalues) < 1 or not np.isfinite(eigenvalues).all():
        raise InputError(f"eigenvalues: expected finite numbers (d,), found {eigenvalues}.")
    if eigenvalues.min() < 0 or (np.diff(eigenvalues) > 0).any() or eigenvalues[0] == 0:
        raise InputError(
            f"eigenvalues: expected falling numbers of at least 0, the first above 0, found {eigenvalues}."
        )
    if not 1 <= latent_size <= len(eigenvalues):
        raise InputError(
            f"latent_size: expected from 1 to {len(eigenvalues)}, found {latent_size}."
        )
