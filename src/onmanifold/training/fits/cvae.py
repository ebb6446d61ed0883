"""The conditional VAE: the evidence lower bound (Directions B; Kingma and Welling 2014)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.nn import functional

from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.randomness import normal
from onmanifold.foundation.registry import FITS
from onmanifold.manifolds.base import Manifold
from onmanifold.manifolds.coding import Posterior
from onmanifold.manifolds.cvae import CVAE
from onmanifold.training.fits.base import Fit, FitStep, reconstruction_errors
from onmanifold.training.task import Turn


@FITS.register("cvae")
@dataclass(frozen=True)
class CVAEFit(Fit):
    """Minimises E[−log p(x | z, y)] + kl_weight · KL(q(z | x, y) ‖ N(0, I)), one draw of z per image.

    Directions has learning rate 0.001 and batches of 64, for 20 epochs on MNIST and 100 on CIFAR-10. It does
    not say which p(x | z, y) it takes.

    Attributes:
        reconstruction: p(x | z, y): "bernoulli", the cross-entropy of the pixels; or "l2", a Gaussian of variance
            ½ around the image, the squared difference up to a constant that is left out. Summed over pixels.
        kl_weight: 1 is the evidence lower bound.
    """

    defaults: ClassVar[Mapping[str, Any]] = {
        "epochs": 20,
        "batch_size": 64,
        "optimizer": "adam",
        "learning_rate": 1e-3,
        "schedule": {"type": "constant"},
        "weight_decay": 0.0,
        # Losses are sums over pixels.
        "loss_limit": 1e6,
    }
    score: ClassVar[str | None] = "negative_elbo"

    reconstruction: Literal["bernoulli", "l2"] = "bernoulli"
    kl_weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.kl_weight < math.inf:
            raise ConfigError(f"kl_weight: expected a finite number >= 0, found {self.kl_weight}.")

    def turns(self, step: FitStep) -> Iterator[Turn]:
        manifold = _cvae(step.manifold)
        posterior = manifold.posterior(step.images, step.labels)
        parts = self._parts(manifold, posterior, None, step.images, step.labels)
        reconstruction, divergence = (part.mean() for part in parts)
        step.metrics |= {
            "reconstruction": reconstruction.detach(),
            "divergence": divergence.detach(),
        }
        yield {"manifold": reconstruction + self.kl_weight * divergence}

    def validate(
        self, manifold: Manifold, images: Tensor, labels: Tensor, indices: Tensor, seed: int
    ) -> dict[str, Tensor]:
        """Of each image (B,): the loss with a draw of its own, its divergence, and reconstruction errors."""
        cvae = _cvae(manifold)
        posterior = cvae.posterior(images, labels)
        size, dtype = (cvae.latent_size,), posterior.mean.dtype
        noise = normal(seed, indices, size, stream="elbo", dtype=dtype)
        reconstruction, divergence = self._parts(cvae, posterior, noise, images, labels)
        return {
            "negative_elbo": reconstruction + self.kl_weight * divergence,
            "divergence": divergence,
            **reconstruction_errors(cvae, images, labels),
        }

    def _parts(
        self,
        manifold: CVAE,
        posterior: Posterior,
        noise: Tensor | None,
        images: Tensor,
        labels: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """−log p(x | z, y) and the divergence of each image, (B,) each."""
        logits = manifold.logits(posterior.sample(noise), labels).to(images.dtype)
        if self.reconstruction == "bernoulli":
            errors = functional.binary_cross_entropy_with_logits(logits, images, reduction="none")
        else:
            errors = (logits.sigmoid() - images).square()
        return errors.flatten(1).sum(1), posterior.divergence()


def _cvae(manifold: Manifold) -> CVAE:
    if not isinstance(manifold, CVAE):
        raise ConfigError(f"fit 'cvae': expected a CVAE, found {type(manifold).__name__}.")
    return manifold
