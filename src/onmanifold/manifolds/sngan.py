"""SNGAN: a residual generator, learned against a spectrally normalised discriminator (Miyato et al. 2018)."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onmanifold.foundation.errors import InputError
from onmanifold.foundation.registry import MANIFOLDS
from onmanifold.manifolds.base import Chart
from onmanifold.manifolds.learned import ImageShape, LearnedManifold
from onmanifold.manifolds.perceptual import PyramidDistance
from onmanifold.manifolds.precision import in_precision
from onmanifold.manifolds.project import PROJECTIONS, project
from onmanifold.manifolds.resampling import up_conv, up_kernel

Affine = tuple[Tensor, Tensor]
"""Scale and shift, or weight and bias."""


class ClassNorm(nn.Module):
    """Batch normalisation whose scale and shift may depend on the class (de Vries et al. 2017).

    Args:
        width: Channels.
        num_classes: K; None: the same scale and shift for all.
    """

    def __init__(self, width: int, num_classes: int | None = None) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width, affine=False)
        rows = 1 if num_classes is None else num_classes
        self.scale = nn.Parameter(torch.ones(rows, width))
        self.shift = nn.Parameter(torch.zeros(rows, width))

    def forward(self, features: Tensor, rows: Tensor) -> Tensor:
        """Features (B, width, H, W) of samples whose scale and shift are those of ``rows`` (B,)."""
        if len(self.scale) == 1:
            norm = self.norm
            return F.batch_norm(
                features,
                norm.running_mean,
                norm.running_var,
                self.scale[0],
                self.shift[0],
                norm.training,
                norm.momentum or 0.0,
                norm.eps,
            )
        normalised = self.norm(features)
        return torch.addcmul(_as_image(self.shift[rows]), normalised, _as_image(self.scale[rows]))

    def affine(self) -> Affine:
        """Scales and shifts (1 or K, width, 1, 1): what this does in eval mode."""
        norm = self.norm
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None
        assert variance is not None
        scale = self.scale * (variance + norm.eps).rsqrt()
        return _as_image(scale), _as_image(self.shift - mean * scale)


class UpBlock(nn.Module):
    """Doubles the sides: norm, ReLU, up-sampling, convolution, norm, ReLU, convolution, plus a shortcut."""

    def __init__(self, width: int, num_classes: int | None) -> None:
        super().__init__()
        self.norms = nn.ModuleList([ClassNorm(width, num_classes) for _ in range(2)])
        self.first = _conv(width, width)
        self.second = _conv(width, width)
        self.shortcut = nn.Conv2d(width, width, 1)
        nn.init.xavier_uniform_(self.shortcut.weight)

    def forward(self, features: Tensor, rows: Tensor) -> Tensor:
        """Features (B, width, 2 H, 2 W) of (B, width, H, W)."""
        before, between = self.norms
        branch = F.relu(before(features, rows))
        branch = up_conv(branch, up_kernel(self.first.weight), self.first.bias)
        branch = self.second(F.relu(between(branch, rows)))
        # A 1x1 convolution and repeated pixels commute; first convolved there are four times fewer.
        result: Tensor = branch + F.interpolate(self.shortcut(features), scale_factor=2.0)
        return result


@dataclass(frozen=True)
class _Frozen:
    """A block whose norms are numbers; the second is part of the first convolution unless the class matters."""

    before: Affine
    first: Affine
    between: Affine | None
    second: Affine
    shortcut: Affine

    @classmethod
    def of(cls, block: UpBlock) -> _Frozen:
        before, between = (norm.affine() for norm in block.norms)  # type: ignore[operator]
        weight, bias = _weights(block.first)
        second, shortcut = _weights(block.second), _weights(block.shortcut)
        if len(between[0]) > 1:
            return cls(before, (up_kernel(weight), bias), between, second, shortcut)
        scale, shift = (part.flatten() for part in between)
        first = up_kernel(weight * scale.view(-1, 1, 1, 1)), bias * scale + shift
        return cls(before, first, None, second, shortcut)

    def __call__(self, features: Tensor, rows: Tensor) -> Tensor:
        branch = up_conv(_activated(features, self.before, rows), *self.first)
        branch = branch.relu_() if self.between is None else _activated(branch, self.between, rows)
        branch = F.conv2d(branch, *self.second, padding=1)
        return branch + F.interpolate(F.conv2d(features, *self.shortcut), scale_factor=2.0)


class SNGANChart(Chart):
    """The generator in eval mode: its batch norms are numbers, its weights take no gradient."""

    manifold: SNGAN

    def __init__(self, manifold: SNGAN, codes: Tensor) -> None:
        super().__init__(manifold, codes)
        self.rows = manifold.rows_of(codes)
        generator = in_precision(manifold, codes.dtype)
        with torch.no_grad():
            self.plant = _weights(generator.plant)
            self.blocks = [_Frozen.of(block) for block in generator.blocks]  # type: ignore[arg-type]
            self.norm, self.last = generator.norm.affine(), _weights(generator.last)

    def decode(self, latents: Tensor) -> Tensor:
        features = self.manifold.planted(F.linear(latents, *self.plant))
        for block in self.blocks:
            features = block(features, self.rows)
        features = _activated(features, self.norm, self.rows)
        return _as_images(F.conv2d(features, *self.last, padding=1)).to(latents.dtype)

    def keep(self, mask: Tensor) -> Chart:
        narrowed = copy.copy(self)
        for name in ("latents", "fixed", "rows"):
            setattr(narrowed, name, getattr(self, name)[mask])
        return narrowed


@MANIFOLDS.register("sngan")
class SNGAN(LearnedManifold):
    """The residual generator of SNGAN (Miyato et al. 2018, table 4), with its standard normal latents.

    A linear layer makes the smallest image (4 x 4 for 32 x 32, 7 x 7 for 28 x 28); each residual block doubles
    its sides. There is no encoder: `encode` projects, as IJSAT does for OM-CIFAR10 (eq. 12).

    Args:
        image_shape: (C, H, W); the sides are 4 to 8 times the same power of two.
        num_classes: K.
        latent_size: Columns of a code that may move; the paper has 128.
        width: Channels of all blocks; the paper has 256.
        conditional: Whether the batch norms, and with them the images, depend on the class.

    Raises:
        InputError: Sides that no number of doublings makes, or a size below 1.
    """

    name = "sngan"

    def __init__(
        self,
        image_shape: ImageShape = (3, 32, 32),
        num_classes: int = 10,
        latent_size: int = 128,
        width: int = 256,
        conditional: bool = False,
    ) -> None:
        super().__init__(image_shape, num_classes, latent_size, conditional)
        if width < 1:
            raise InputError(f"width: expected at least 1, found {width}.")
        self.width = width
        *self.start, doublings = start_of(self.image_shape)
        classes = num_classes if conditional else None
        self.plant = nn.Linear(latent_size, width * math.prod(self.start))
        nn.init.xavier_uniform_(self.plant.weight)
        self.blocks = nn.ModuleList([UpBlock(width, classes) for _ in range(doublings)])
        # What follows the blocks knows no class.
        self.norm = ClassNorm(width)
        self.last = _conv(width, self.image_shape[0], gain=1.0)

    def rows_of(self, codes: Tensor) -> Tensor:
        """Which scales and shifts the samples of codes (B, code_size) have: (B,) int64."""
        if self.conditional:
            return self.labels_of(codes)
        return torch.zeros(len(codes), dtype=torch.int64, device=codes.device)

    def planted(self, rows: Tensor) -> Tensor:
        """Features (B, width, h, w) of the smallest image, of what the first layer gives for it."""
        # Channels last, in which convolutions are fastest.
        return rows.view(-1, *self.start, self.width).permute(0, 3, 1, 2)

    def forward(self, codes: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] of codes, for learning: in train mode normalised by the batch."""
        rows = self.rows_of(codes)
        features = self.planted(self.plant(codes[:, : self.latent_size]))
        for block in self.blocks:
            features = block(features, rows)
        features = F.relu(self.norm(features, torch.zeros_like(rows)))
        return _as_images(self.last(features))

    def decode(self, codes: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] of codes (B, code_size), by the running statistics of batch norm."""
        chart = self.chart(codes)
        return chart.decode(chart.latents)

    def chart(self, codes: Tensor) -> SNGANChart:
        """The generator with batch norm folded into numbers and convolutions, around ``codes``."""
        return SNGANChart(self, self.check_codes(codes, len(codes)))

    def mean_code(self, labels: Tensor) -> Tensor:
        """The codes (B, code_size) in the middle of the latents' distribution, where projections start."""
        zeros = torch.zeros(len(labels), self.latent_size, device=labels.device)
        return self.codes_of(zeros, labels)

    def encode(self, images: Tensor, labels: Tensor) -> Tensor:
        """Codes of the nearest images found by the "quick" projection with `PyramidDistance`; many decodings."""
        config, measure = PROJECTIONS["quick"], PyramidDistance()
        return project(self, images, labels=labels, config=config, measure=measure).codes


def start_of(image_shape: ImageShape) -> tuple[int, int, int]:
    """The sides (h, w) of the smallest image, and how often they double.

    Raises:
        InputError: The sides are not 4 to 8 times the same power of two.
    """
    height, width = image_shape[1:]
    doublings = 0
    while min(height, width) >= 8 and height % 2 == width % 2 == 0:
        height, width, doublings = height // 2, width // 2, doublings + 1
    if not doublings or min(height, width) < 4 or max(height, width) > 8:
        raise InputError(
            "image_shape: expected sides that are 4 to 8 times the same power of two, such as 28, 32 or 64, "
            f"found {image_shape}."
        )
    return height, width, doublings


def _conv(before: int, after: int, gain: float = math.sqrt(2)) -> nn.Conv2d:
    conv = nn.Conv2d(before, after, 3, padding=1)
    nn.init.xavier_uniform_(conv.weight, gain)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def _weights(layer: nn.Conv2d | nn.Linear) -> Affine:
    assert layer.bias is not None
    return layer.weight.detach(), layer.bias.detach()


def _activated(features: Tensor, affine: Affine, rows: Tensor) -> Tensor:
    """ReLU of features times scale plus shift."""
    scale, shift = affine if len(affine[0]) == 1 else (affine[0][rows], affine[1][rows])
    return torch.addcmul(shift, features, scale).relu_()


def _as_image(rows: Tensor) -> Tensor:
    return rows.unsqueeze(2).unsqueeze(3)


def _as_images(features: Tensor) -> Tensor:
    """[0, 1] of what tanh would have in [−1, 1]."""
    # (1 + tanh(x)) / 2 in one pass.
    return torch.sigmoid(2 * features)
