"""Probabilistic PCA in closed form: maximum likelihood from the covariance of the images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import scipy.linalg
import torch
from torch import Tensor

from onmanifold.data.dataset import Dataset
from onmanifold.foundation.errors import DataError, InputError
from onmanifold.foundation.registry import FITS
from onmanifold.manifolds.base import Manifold
from onmanifold.manifolds.ppca import PPCA
from onmanifold.training.fits.base import ClosedForm

# Images held as float64 at once.
_CHUNK = 2048
# Eigenvalues, as a share of their sum, that rounding makes of 0.
_ROUNDING = 1e-12


@FITS.register("ppca")
@dataclass(frozen=True)
class PPCAFit(ClosedForm):
    """The maximum-likelihood estimate of Tipping and Bishop 1999 (Directions section 4).

    The covariance is the mean of squares, over N and not N − 1, summed up in float64 a chunk of images at a
    time. An eigenvector's sign is free: its largest component is made positive.
    """

    def solve(self, manifold: Manifold, dataset: Dataset) -> None:
        """Give the manifold the mean and the leading eigenvectors of each class, or of all images.

        Raises:
            InputError: The manifold is no `PPCA`.
            DataError: The images of a class span no more dimensions than the manifold has latents.
        """
        if not isinstance(manifold, PPCA):
            raise InputError(f"manifold: expected a PPCA, found {type(manifold).__name__}.")
        for model in range(len(manifold.mean)):
            chosen = dataset.labels == model if manifold.conditional else dataset.labels >= 0
            name = f"class {model}" if manifold.conditional else dataset.name
            mean, covariance = _moments(dataset, chosen.nonzero().flatten(), name)
            values, vectors, noise = _principal(covariance, manifold.latent_size, name)
            manifold.mean[model] = mean
            manifold.basis[model] = vectors
            manifold.eigenvalues[model] = values
            manifold.noise_variance[model] = noise


def _moments(dataset: Dataset, positions: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D), float64."""
    if not len(positions):
        raise DataError(f"{name} has no images.")

    def chunks() -> Iterator[Tensor]:
        for part in torch.split(positions, _CHUNK):
            yield dataset.batch(part).images.flatten(1).double()

    # Twice through the images: what is centred first loses no digits to the mean.
    mean = torch.stack([chunk.sum(0) for chunk in chunks()]).sum(0) / len(positions)
    covariance = mean.new_zeros(len(mean), len(mean))
    for chunk in chunks():
        centred = chunk - mean
        covariance.addmm_(centred.T, centred)
    return mean, covariance / len(positions)


def _principal(covariance: Tensor, count: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """The leading eigenvalues (q,), falling, and eigenvectors (D, q), and the mean of the other eigenvalues."""
    size, total = len(covariance), covariance.trace()
    found, vectors = scipy.linalg.eigh(
        covariance.numpy(force=True), subset_by_index=[size - count, size - 1]
    )
    values = torch.from_numpy(found.copy()).flip(0).to(total)
    basis = torch.from_numpy(vectors.copy()).flip(1).to(total)
    rest = total - values.sum()
    if rest <= _ROUNDING * total:
        raise DataError(
            f"{name}: its images span no more than {count} dimensions, so that no noise is left; "
            "expected more images, or a smaller latent_size."
        )
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return values, basis * largest.sign(), rest / (size - count)
