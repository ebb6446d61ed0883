"""How SNGAN is learned: hinge loss, and a discriminator of spectral norm 1 (Miyato et al. 2018)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from onmanifold.foundation.errors import ConfigError, InputError
from onmanifold.foundation.registry import FITS
from onmanifold.manifolds.base import Manifold
from onmanifold.manifolds.resampling import down_conv
from onmanifold.manifolds.sngan import SNGAN
from onmanifold.training.fits.base import Fit, FitStep
from onmanifold.training.schedules import Cyclic
from onmanifold.training.task import Turn


class DiscriminatorBlock(nn.Module):
    """ReLU, convolution, ReLU, convolution, plus a shortcut; ``halves`` halves the sides.

    Args:
        before: Channels in.
        width: Channels out.
        halves: Whether means of 2 x 2 pixels end the block.
        first: Whether the block sees images: without the first ReLU.
    """

    def __init__(self, before: int, width: int, halves: bool, first: bool = False) -> None:
        super().__init__()
        self.halves, self.first = halves, first
        self.enter = _normalised(nn.Conv2d(before, width, 3, padding=1))
        self.leave = _normalised(nn.Conv2d(width, width, 3, padding=1))
        self.shortcut: nn.Module = nn.Identity()
        if halves or before != width:
            self.shortcut = _normalised(nn.Conv2d(before, width, 1), gain=1.0)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, width, H, W), or (B, width, H/2, W/2)."""
        branch = F.relu(self.enter(features if self.first else F.relu(features)))
        if not self.halves:
            result: Tensor = self.leave(branch) + self.shortcut(features)
            return result
        weight, bias = self.leave.weight, self.leave.bias
        assert isinstance(weight, Tensor)
        assert isinstance(bias, Tensor)
        # A 1x1 convolution and means of pixels commute; after the means there are four times fewer pixels.
        result = down_conv(branch, weight, bias) + self.shortcut(F.avg_pool2d(features, 2))
        return result


class Discriminator(nn.Module):
    """Scores (B,) of images, high for real ones; all weights have spectral norm 1 (Miyato et al., table 4).

    Blocks halve the sides to 8 or less, at least twice; two more leave them.

    Args:
        image_shape: (C, H, W).
        width: Channels of all blocks; the paper has 128.
        num_classes: K of a projection discriminator (Miyato and Koyama 2018), which judges whether an image
            belongs to its class too; None: classes are ignored.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], width: int = 128, num_classes: int | None = None
    ) -> None:
        super().__init__()
        channels, *sides = image_shape
        halvings = max(2, math.ceil(math.log2(max(sides) / 8)))
        blocks = [DiscriminatorBlock(channels, width, halves=True, first=True)]
        blocks += [DiscriminatorBlock(width, width, halves=True) for _ in range(halvings - 1)]
        blocks += [DiscriminatorBlock(width, width, halves=False) for _ in range(2)]
        self.blocks = nn.Sequential(*blocks)
        self.head = _normalised(nn.Linear(width, 1), gain=1.0)
        self.classes: nn.Module | None = None
        if num_classes is not None:
            self.classes = _normalised(nn.Embedding(num_classes, width), gain=1.0)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Scores (B,) of images (B, C, H, W) in [0, 1] of the classes ``labels`` (B,)."""
        features = F.relu(self.blocks(2 * images - 1)).sum((2, 3))
        scores: Tensor = self.head(features).squeeze(1)
        if self.classes is not None:
            scores = scores + (self.classes(labels) * features).sum(1)
        return scores


@FITS.register("sngan")
@dataclass(frozen=True)
class SNGANFit(Fit):
    """Spectral normalisation for generative adversarial networks (Miyato et al. 2018), section 4 and C.

    The discriminator moves in each step, the generator in every ``critic_steps``-th.

    Attributes:
        critic_steps: Steps of the discriminator for each of the generator.
        width: Channels of the discriminator; the paper has 128 where the generator has 256.
        generator_batch: Images the generator makes for its own step, as a multiple of the batch.
    """

    defaults: ClassVar[Mapping[str, Any]] = {
        "epochs": 320,
        "batch_size": 64,
        "learning_rate": 2e-4,
        "betas": (0.0, 0.9),
        "weight_decay": 0.0,
        "schedule": Cyclic(epochs=(0, 1), factors=(1, 0)),
        "ema": 0.999,
        "validation_fraction": 0.0,
    }

    critic_steps: int = 5
    width: int = 128
    generator_batch: int = 2

    def __post_init__(self) -> None:
        for name in ("critic_steps", "width", "generator_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, found {getattr(self, name)}.")

    def players(self, manifold: Manifold) -> dict[str, nn.Module]:
        """The generator, which is the whole manifold, and its discriminator.

        Raises:
            InputError: The manifold is no `SNGAN`.
        """
        if not isinstance(manifold, SNGAN):
            raise InputError(f"manifold: expected an SNGAN, found {type(manifold).__name__}.")
        classes = manifold.num_classes if manifold.conditional else None
        discriminator = Discriminator(manifold.image_shape, self.width, classes)
        return {"generator": manifold, "discriminator": discriminator}

    def turns(self, step: FitStep) -> Iterator[Turn]:
        """The discriminator's hinge loss; in every ``critic_steps``-th step then the generator's."""
        discriminator, real = step.players["discriminator"], step.images
        with torch.no_grad():
            fake, labels = _generated(step, len(real))
        scores = discriminator(torch.cat([real, fake]), torch.cat([step.labels, labels]))
        for_real, for_fake = scores.split(len(real))
        step.metrics["score_real"] = for_real.detach().mean()
        step.metrics["score_fake"] = for_fake.detach().mean()
        yield {"discriminator": hinge(for_real, for_fake)}
        if (step.number + 1) % self.critic_steps == 0:
            fake, labels = _generated(step, self.generator_batch * len(real))
            yield {"generator": -discriminator(fake, labels).mean()}

    def validate(
        self, manifold: Manifold, images: Tensor, labels: Tensor, indices: Tensor, seed: int
    ) -> dict[str, Tensor]:
        """Nothing: a reconstruction is a projection, which is too dear to make after each epoch."""
        return {}


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss () of scores (B,): real ones shall exceed 1, fake ones fall below -1 (eq. 16)."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def _generated(step: FitStep, count: int) -> tuple[Tensor, Tensor]:
    """Fresh images (count, C, H, W) of random classes, and these (count,)."""
    manifold, like = step.manifold, step.images
    assert isinstance(manifold, SNGAN)
    latents = torch.randn(count, manifold.latent_size, dtype=like.dtype, device=like.device)
    labels = torch.randint(manifold.num_classes, (count,), device=like.device)
    return manifold(manifold.codes_of(latents, labels)), labels


def _normalised(layer: nn.Module, gain: float = math.sqrt(2)) -> nn.Module:
    """A layer with spectral norm 1."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    nn.init.xavier_uniform_(weight, gain)
    bias = getattr(layer, "bias", None)
    if isinstance(bias, Tensor):
        nn.init.zeros_(bias)
    return spectral_norm(layer)
