"""How a Glow is learned: by maximum likelihood of dequantised images (Kingma and Dhariwal 2018)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from onmanifold.foundation.errors import InputError
from onmanifold.foundation.registry import FITS
from onmanifold.manifolds.base import Manifold
from onmanifold.manifolds.glow import Glow
from onmanifold.training.fits.base import Fit, FitStep, Turn


@FITS.register("glow")
@dataclass(frozen=True)
class GlowFit(Fit):
    """The loss is the mean of bits per dimension; actnorm starts from the first images."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "optimizer": "adamax",
        "learning_rate": 1e-3,
        "schedule": {"type": "cosine", "warmup": 0.5},
        "weight_decay": 0.0,
        "gradient_clip": 10.0,
        "batch_size": 64,
    }
    score: ClassVar[str | None] = "bits_per_dimension"

    def start(self, manifold: Manifold, images: Tensor, labels: Tensor) -> None:
        """Actnorm's scales and shifts from the images; Glow's code takes 256 of them."""
        _glow(manifold).start(images)

    def turns(self, step: FitStep) -> Iterator[Turn]:
        """One turn: the mean bits per dimension of the step's images."""
        glow = _glow(step.manifold)
        bits = glow.bits_per_dimension(step.images, step.seed, step.indices).mean()
        step.metrics["bits_per_dimension"] = bits.detach()
        yield {"manifold": bits}

    def validate(
        self, manifold: Manifold, images: Tensor, labels: Tensor, indices: Tensor, seed: int
    ) -> dict[str, Tensor]:
        """Bits per dimension, and the largest error of a pixel after the way to the code and back."""
        glow = _glow(manifold)
        error = (glow.decode(glow.encode(images, labels)) - images).abs().flatten(1).amax(1)
        return {
            "bits_per_dimension": glow.bits_per_dimension(images, seed, indices),
            "round_trip_error": error,
        }


def _glow(manifold: Manifold) -> Glow:
    if not isinstance(manifold, Glow):
        raise InputError(f"manifold: expected a Glow, found {type(manifold).__name__}.")
    return manifold
