"""VAE-GANs: reconstruction, divergence and discriminator (Disentangling eq. 7 to 9)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.registry import FITS
from onmanifold.manifolds.base import Manifold
from onmanifold.manifolds.coding import Posterior
from onmanifold.manifolds.vae_gan import VAEGAN
from onmanifold.training.fits.base import Fit, FitStep
from onmanifold.training.task import Turn

# Batch norm needs two images to normalise.
_FEWEST = 2


@FITS.register("vae_gan")
@dataclass(frozen=True)
class VAEGANFit(Fit):
    """Encoder, decoder and discriminator each follow their own loss, at once (Disentangling eq. 7 to 9).

    Encoder: weight · ‖x − x̂‖₁ + KL; decoder: weight · ‖x − x̂‖₁ − adversarial_weight · log D(x̂); discriminator:
    −log D(x) − log(1 − D(x̂)), with x̂ = decode(z) and one draw of z per image. Sums over pixels, means over images.

    With one network per class each class follows its own losses. A class with fewer than two images in
    a batch sits it out, since batch norm needs two; the paper's batches of 100 images of one class are
    batches of 1000 here, of ten.

    Weights for reconstruction that were used (the paper's; the released code's where it differs):

    - FONTS: 3, 10 epochs.
    - EMNIST: 2.5, but 2.75, 5.6 and 2.25 for the classes 0, 1 and 8 (code: 2.25, but 5 and 3 for 1 and 7); 3 for
      one network for all; 30 epochs.
    - Fashion-MNIST: 2.75 (code: 3 for one network for all); 60 epochs.
    - CelebA: 3; 30 epochs.

    Attributes:
        reconstruction_weight: One number, or one per class.
        adversarial_weight: 1 in paper and code.
        encoder_adversarial: Whether the encoder too follows −adversarial_weight · log D(x̂), as in the released
            code; not so in the paper.
    """

    defaults: ClassVar[Mapping[str, Any]] = {
        "epochs": 60,
        "batch_size": 100,
        "optimizer": "adam",
        "betas": (0.5, 0.9),
        "learning_rate": 0.005,
        "schedule": {"type": "exponential", "decay": 0.9},
        "weight_decay": 1e-4,
        # Losses are sums over pixels.
        "loss_limit": 1e6,
    }

    reconstruction_weight: float | tuple[float, ...] = 2.75
    adversarial_weight: float = 1.0
    encoder_adversarial: bool = False

    def __post_init__(self) -> None:
        for name in ("reconstruction_weight", "adversarial_weight"):
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple | list) else (value,)
            if not numbers or not all(0 <= number < math.inf for number in numbers):
                raise ConfigError(f"{name}: expected finite numbers >= 0, found {value!r}.")

    def players(self, manifold: Manifold) -> dict[str, nn.Module]:
        vae_gan = _vae_gan(manifold)
        self._weight(vae_gan, 0)
        return {
            "encoder": vae_gan.encoders,
            "decoder": vae_gan.decoders,
            "discriminator": vae_gan.discriminators(),
        }

    def turns(self, step: FitStep) -> Iterator[Turn]:
        manifold = _vae_gan(step.manifold)
        groups = list(_groups(manifold, step.labels))
        count, parts = sum(len(positions) for _, positions in groups), []
        for number, positions in groups:
            networks = [player[number] for player in step.players.values()]  # type: ignore[index]
            errors = _errors(networks, step.images[positions])
            parts.append(self._losses(errors, self._weight(manifold, number)))
            _log(step.metrics, errors, count)
        if parts:
            losses = [torch.cat(part).sum() / count for part in zip(*parts, strict=True)]
        else:
            # Another process, with enough images, has this turn too.
            losses = [0 * next(player.parameters()).sum() for player in step.players.values()]
        yield dict(zip(step.players, losses, strict=True))

    def _losses(self, errors: Errors, weight: float) -> tuple[Tensor, Tensor, Tensor]:
        """Of encoder, decoder and discriminator, (B,) each: equations 7, 8 and 9."""
        reconstruction = weight * errors.reconstruction
        # −log D and −log(1 − D), from the logits: no logarithm of 0.
        fooling = self.adversarial_weight * functional.softplus(-errors.made)
        encoder = reconstruction + errors.divergence
        if self.encoder_adversarial:
            encoder = encoder + fooling
        discriminator = functional.softplus(-errors.real) + functional.softplus(errors.made)
        return encoder, reconstruction + fooling, discriminator

    def _weight(self, manifold: VAEGAN, number: int) -> float:
        """The weight of the reconstruction for one of the networks."""
        weight = self.reconstruction_weight
        if isinstance(weight, int | float):
            return weight
        if len(weight) != len(manifold.decoders):
            raise ConfigError(
                f"reconstruction_weight: expected one number, or {len(manifold.decoders)}, one per network; "
                f"found {len(weight)}."
            )
        return weight[number]


class Errors(NamedTuple):
    """What the losses are made of, (B,) each.

    Attributes:
        reconstruction: ‖x − x̂‖₁, summed over pixels.
        divergence: KL of the posterior of the code, in nats.
        real: Logits of the discriminator for the images.
        made: Logits of the discriminator for their reconstructions.
    """

    reconstruction: Tensor
    divergence: Tensor
    real: Tensor
    made: Tensor


def _errors(networks: Sequence[nn.Module], images: Tensor) -> Errors:
    """What encoder, decoder and discriminator make of images that they are for."""
    encoder, decoder, discriminator = networks
    posterior: Posterior = encoder(images)
    rebuilt = decoder(posterior.sample()).to(images.dtype).sigmoid()
    real, made = (discriminator(batch).squeeze(1).to(images.dtype) for batch in (images, rebuilt))
    differences = (rebuilt - images).abs()
    return Errors(differences.flatten(1).sum(1), posterior.divergence(), real, made)


def _groups(manifold: VAEGAN, labels: Tensor) -> Iterator[tuple[int, Tensor]]:
    """For each network that has enough images in the batch: its number, and where they are."""
    numbers = labels if manifold.conditional else torch.zeros_like(labels)
    counts = torch.bincount(numbers).tolist()
    positions = torch.split(numbers.argsort(stable=True), counts)
    for number, count in enumerate(counts):
        if count >= _FEWEST:
            yield number, positions[number]


def _log(metrics: dict[str, Tensor], errors: Errors, count: int) -> None:
    """Add a group's part of the means over the ``count`` images of all groups."""
    values = errors._replace(real=errors.real.sigmoid(), made=errors.made.sigmoid())
    for name, value in values._asdict().items():
        metrics[name] = metrics.get(name, 0) + value.detach().sum() / count


def _vae_gan(manifold: Manifold) -> VAEGAN:
    if not isinstance(manifold, VAEGAN):
        raise ConfigError(f"fit 'vae_gan': expected a VAEGAN, found {type(manifold).__name__}.")
    return manifold
