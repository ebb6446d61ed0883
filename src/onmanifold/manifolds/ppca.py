"""Probabilistic principal component analysis, the linear manifold of the theory (Tipping and Bishop 1999)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from onmanifold.foundation.errors import InputError
from onmanifold.foundation.registry import MANIFOLDS
from onmanifold.manifolds.coding import RoutedChart, Routing, check_batch, classes_of
from onmanifold.manifolds.learned import ImageShape, LearnedManifold


@MANIFOLDS.register("ppca")
class PPCA(LearnedManifold):
    """Images x ~ N(mean, W Wᵀ + s² I) with latents z ~ N(0, I): x = mean + W z + noise (Directions section 4).

    W = U (Λ − s² I)^½ has the leading eigenvectors U and eigenvalues Λ of the covariance, s² is the mean of
    the other eigenvalues. Until it is fitted U is random. ``decode`` gives mean + W z, cut to [0, 1].

    Args:
        image_shape: (C, H, W).
        num_classes: K.
        latent_size: q, columns of W, fewer than pixels.
        conditional: Whether each class has a model of its own; else one is the model of all.
        code: "posterior": the mean of z given x, Λ^-1 Wᵀ (x − mean), the paper's encoder. It shrinks towards 0:
            the reconstruction is short of the projection by the factor 1 − s² / λ in each direction.
            "least_squares": the z with the nearest image, (WᵀW)^-1 Wᵀ (x − mean), with which
            the reconstruction is the orthogonal projection, up to the cut to [0, 1].

    Attributes:
        mean: (G, D), of G models of D pixels; G is K or 1.
        basis: (G, D, q), U; the largest component of each column is positive.
        eigenvalues: (G, q), Λ, falling.
        noise_variance: (G,), s².
    """

    name = "ppca"
    mean: Tensor
    basis: Tensor
    eigenvalues: Tensor
    noise_variance: Tensor

    def __init__(
        self,
        image_shape: ImageShape,
        num_classes: int,
        latent_size: int = 10,
        conditional: bool = True,
        code: Literal["posterior", "least_squares"] = "posterior",
    ) -> None:
        super().__init__(image_shape, num_classes, latent_size, conditional)
        pixels, models = math.prod(self.image_shape), num_classes if conditional else 1
        if latent_size >= pixels:
            raise InputError(
                f"latent_size: expected less than {pixels} pixels, found {latent_size}."
            )
        if code not in ("posterior", "least_squares"):
            raise InputError(f"code: expected 'posterior' or 'least_squares', found {code!r}.")
        self.code = code
        basis = torch.linalg.qr(torch.randn(pixels, latent_size))[0]
        self.register_buffer("mean", torch.full((models, pixels), 0.5))
        self.register_buffer("basis", basis.expand(models, -1, -1).clone())
        self.register_buffer("eigenvalues", torch.full((models, latent_size), 0.5))
        self.register_buffer("noise_variance", torch.full((models,), 0.01))

    def encode(self, images: Tensor, labels: Tensor) -> Tensor:
        """Codes (B, code_size) of images (B, C, H, W); see ``code``."""
        check_batch(self, images, labels)

        def project(model: int, rows: Tensor) -> Tensor:
            mean, basis = self.mean[model].to(rows), self.basis[model].to(rows)
            return (rows - mean) @ basis * self._shrinkage(model).to(rows)

        return self.codes_of(self._by_model(project, images, labels), labels)

    def decode(self, codes: Tensor) -> Tensor:
        chart = self.chart(codes)
        return chart.decode(chart.latents)

    def chart(self, codes: Tensor) -> RoutedChart:
        self.check_codes(codes, len(codes))

        def make(model: int) -> functools.partial[Tensor]:
            weight = (self.basis[model] * self._deviations(model)).T.to(codes)
            return functools.partial(self._render, self.mean[model].to(codes), weight)

        return RoutedChart(self, codes, classes_of(self, codes), make)

    def log_likelihood(self, images: Tensor, labels: Tensor) -> Tensor:
        """Log-density (B,) of images (B, C, H, W) in nats, given their class where there is a model of each.

        It is that of N(mean, W Wᵀ + s² I), which knows nothing of the cut to [0, 1]. Sums are float64.
        """
        check_batch(self, images, labels)

        def density(model: int, rows: Tensor) -> Tensor:
            centred = rows - self.mean[model].double()
            eigenvalues, noise = (
                self.eigenvalues[model].double(),
                self.noise_variance[model].double(),
            )
            inside = (centred @ self.basis[model].double()).square()
            outside = (centred.square().sum(1) - inside.sum(1)).clamp(min=0)
            size, kept = rows.shape[1], len(eigenvalues)
            volume = eigenvalues.log().sum() + (size - kept) * noise.log()
            distance = (inside / eigenvalues).sum(1) + outside / noise
            return -(size * math.log(2 * math.pi) + volume + distance) / 2

        return self._by_model(density, images.double(), labels).to(images.dtype)

    def _by_model(
        self, function: Callable[[int, Tensor], Tensor], images: Tensor, labels: Tensor
    ) -> Tensor:
        """What the function makes of the model of each image and its pixels (B, D)."""
        routing = Routing(labels if self.conditional else torch.zeros_like(labels))
        networks = {model: functools.partial(function, model) for model in routing.present or [0]}
        return routing(networks, images.flatten(1))

    def _deviations(self, model: int) -> Tensor:
        """The lengths (q,) of the columns of W."""
        return (self.eigenvalues[model] - self.noise_variance[model]).clamp(min=0).sqrt()

    def _shrinkage(self, model: int) -> Tensor:
        """What turns coordinates in the basis into latents, (q,)."""
        deviations = self._deviations(model)
        if self.code == "posterior":
            return deviations / self.eigenvalues[model]
        # A direction of no more than noise has no latent.
        return torch.where(deviations > 0, deviations.reciprocal(), 0)

    def _render(self, mean: Tensor, weight: Tensor, latents: Tensor) -> Tensor:
        return torch.addmm(mean, latents, weight).view(-1, *self.image_shape).clamp(0, 1)
