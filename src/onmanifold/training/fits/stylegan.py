"""How StyleGAN is learned: logistic loss, R1 now and then, mixed styles (Karras et al. 2019, 2020)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onmanifold.foundation.errors import ConfigError, InputError
from onmanifold.foundation.registry import FITS
from onmanifold.manifolds.base import Manifold
from onmanifold.manifolds.stylegan import StyleGAN
from onmanifold.manifolds.stylegan_layers import EqualConv, EqualLinear, activate, sides_to
from onmanifold.training.fits.base import Fit, FitStep
from onmanifold.training.schedules import Constant
from onmanifold.training.task import Turn

_GROUP = 4


class DiscriminatorBlock(nn.Module):
    """Two convolutions, the second of which halves the sides, plus a shortcut.

    Args:
        before: Channels in.
        after: Channels out.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.enter = EqualConv(before, before, 3)
        self.leave = EqualConv(before, after, 3, halves=True)
        self.shortcut = EqualConv(before, after, 1, linear=True)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, after, H/2, W/2) of (B, before, H, W)."""
        branch: Tensor = self.leave(self.enter(features))
        result: Tensor = (branch + self.shortcut(F.avg_pool2d(features, 2))) * math.sqrt(0.5)
        return result


class Discriminator(nn.Module):
    """Logits (B,) of whether images are real: the residual discriminator of StyleGAN2.

    Args:
        resolution: R, a power of two; smaller images are given a black border.
        channels: Of the images.
        widths: Channels at each resolution.
    """

    def __init__(self, resolution: int, channels: int, widths: Mapping[int, int]) -> None:
        super().__init__()
        self.resolution = resolution
        self.enter = EqualConv(channels, widths[resolution], 1)
        sides = sides_to(resolution)[::-1]
        self.blocks = nn.Sequential(
            *(
                DiscriminatorBlock(widths[side], widths[smaller])
                for side, smaller in itertools.pairwise(sides)
            )
        )
        width = widths[4]
        self.last = EqualConv(width + 1, width, 3)
        self.hidden = EqualLinear(16 * width, width)
        self.head = EqualLinear(width, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B,) of images (B, C, H, W) around [0, 1]."""
        height, width = images.shape[2:]
        top, left = (self.resolution - height) // 2, (self.resolution - width) // 2
        bottom, right = self.resolution - height - top, self.resolution - width - left
        padded = F.pad(2 * images - 1, (left, right, top, bottom), value=-1.0)
        features = with_deviation(self.blocks(self.enter(padded)))
        features = activate(self.hidden(self.last(features).flatten(1)))
        logits: Tensor = self.head(features).squeeze(1)
        return logits


def with_deviation(features: Tensor) -> Tensor:
    """Features (B, C, H, W) with a channel more: how far the images of a group differ (Karras et al. 2018, 3).

    A group has 4 images, or as many as divide B.
    """
    count, channels, height, width = features.shape
    group = math.gcd(count, _GROUP)
    groups = features.view(group, count // group, channels, height, width)
    # torch.var is far slower over this axis.
    variance = (groups - groups.mean(0)).square().mean(0)
    deviation = (variance + 1e-8).sqrt().mean((1, 2, 3))
    channel = deviation.repeat(group).view(count, 1, 1, 1).expand(-1, -1, height, width)
    return torch.cat([features, channel], dim=1)


@FITS.register("stylegan")
@dataclass(frozen=True)
class StyleGANFit(Fit):
    """Non-saturating logistic loss with R1 (Karras et al. 2020, section 2 and B).

    Attributes:
        r1: Weight of R1, half of which multiplies the squared gradient; None: 0.0002 R² / batch size, the rule
            of StyleGAN2-ADA (Karras et al. 2020b, C).
        r1_every: Steps of which R1 is taken once, with that many times its weight.
        mixing: Probability that a sample has two styles, the second from a random layer on.
        mean_decay: Share of the mean style that a step keeps.
        channel_base: Of the discriminator, as for `StyleGAN`; None: as the generator.
        channel_max: Likewise.
    """

    defaults: ClassVar[Mapping[str, Any]] = {
        "epochs": 100,
        "batch_size": 32,
        "learning_rate": 0.0025,
        "betas": (0.0, 0.99),
        "weight_decay": 0.0,
        "schedule": Constant(),
        "ema": 0.998,
        "validation_fraction": 0.0,
    }

    r1: float | None = None
    r1_every: int = 16
    mixing: float = 0.9
    mean_decay: float = 0.998

    def __post_init__(self) -> None:
        checks = {
            "r1": (self.r1 is None or self.r1 >= 0, "a number >= 0"),
            "r1_every": (self.r1_every >= 1, "an integer >= 1"),
            "mixing": (0 <= self.mixing <= 1, "a number in [0, 1]"),
            "mean_decay": (0 <= self.mean_decay < 1, "a number in [0, 1)"),
        }
        for name, (right, expected) in checks.items():
            if not right:
                raise ConfigError(f"{name}: expected {expected}, found {getattr(self, name)}.")

    def players(self, manifold: Manifold) -> dict[str, nn.Module]:
        """The generator, which is the whole manifold, and its discriminator.

        Raises:
            InputError: The manifold is no `StyleGAN`.
        """
        if not isinstance(manifold, StyleGAN):
            raise InputError(f"manifold: expected a StyleGAN, found {type(manifold).__name__}.")
        channels = manifold.image_shape[0]
        discriminator = Discriminator(manifold.resolution, channels, manifold.widths)
        return {"generator": manifold, "discriminator": discriminator}

    def turns(self, step: FitStep) -> Iterator[Turn]:
        """The generator's loss, the discriminator's, and R1 in every ``r1_every``-th step."""
        discriminator, real = step.players["discriminator"], step.images
        fake = self._generated(step)
        yield {"generator": F.softplus(-discriminator(fake)).mean()}
        # The same images again: a forward pass less, and the generator has hardly moved.
        for_real, for_fake = discriminator(real), discriminator(fake.detach())
        step.metrics["logit_real"] = for_real.detach().mean()
        step.metrics["logit_fake"] = for_fake.detach().mean()
        yield {"discriminator": F.softplus(-for_real).mean() + F.softplus(for_fake).mean()}
        weight = self._r1_weight(step)
        if weight > 0 and step.number % self.r1_every == 0:
            penalty = squared_gradient(discriminator, real).mean()
            step.metrics["r1"] = penalty.detach()
            yield {"discriminator": penalty * (weight / 2 * self.r1_every)}

    def validate(
        self, manifold: Manifold, images: Tensor, labels: Tensor, indices: Tensor, seed: int
    ) -> dict[str, Tensor]:
        """Nothing: a reconstruction is a projection, which is too dear to make after each epoch."""
        return {}

    def _r1_weight(self, step: FitStep) -> float:
        if self.r1 is not None:
            return self.r1
        manifold = step.manifold
        assert isinstance(manifold, StyleGAN)
        return 2e-4 * manifold.resolution**2 / len(step.images)

    def _generated(self, step: FitStep) -> Tensor:
        """Fresh images (B, C, H, W), as many as real ones; the mean style follows theirs."""
        manifold, like = step.manifold, step.images
        assert isinstance(manifold, StyleGAN)
        shape = (2, len(like), manifold.z_size)
        first, second = manifold.mapping(torch.randn(shape, dtype=like.dtype, device=like.device))
        with torch.no_grad():
            manifold.mean_w.lerp_(first.mean(0).to(manifold.mean_w), 1 - self.mean_decay)
        return manifold.generate(mixed(first, second, manifold.layers, self.mixing))


def mixed(first: Tensor, second: Tensor, layers: int, probability: float) -> Tensor:
    """Styles (B, layers, W): the first (B, W), and with a probability the second from a random layer on.

    The layer is uniform over 1 to layers - 1 (Karras et al. 2019, 3.1); draws are global random numbers.
    """
    count, device = len(first), first.device
    cut = torch.randint(1, layers, (count, 1, 1), device=device)
    cut[torch.rand(count, device=device) >= probability] = layers
    takes_second = torch.arange(layers, device=device).view(1, -1, 1) >= cut
    return torch.where(takes_second, second.unsqueeze(1), first.unsqueeze(1))


def squared_gradient(discriminator: nn.Module, images: Tensor) -> Tensor:
    """R1 (Mescheder et al. 2018): of each image (B,), the squared gradient of the logits, differentiable.

    In units of the discriminator's own range [-1, 1], for which the usual weights are meant.
    """
    images = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(images).sum(), images, create_graph=True)
    # Pixels in [0, 1] are half as far apart.
    return gradient.square().sum((1, 2, 3)) / 4
