"""Layers of StyleGAN2: equalised learning rates, the mapping network, modulated convolutions.

Karras et al. 2018 (progressive growing: pixel norm, equalised learning rates), 2019 (StyleGAN: mapping, styles,
noise), 2020 (StyleGAN2: modulation and demodulation, skip outputs). Only plain operations, differentiable twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onmanifold.manifolds.resampling import down_conv, up_conv, up_kernel

SLOPE = 0.2
GAIN = math.sqrt(2)
_EPSILON = 1e-8


def current(parameter: nn.Parameter) -> Tensor:
    """The parameter, or where no gradient is wanted, its values: what a frozen network is made of."""
    return parameter if torch.is_grad_enabled() else parameter.detach()


def activate(features: Tensor) -> Tensor:
    """Leaky ReLU that keeps the second moment of normal features."""
    return F.leaky_relu(features, SLOPE) * GAIN


class EqualLinear(nn.Module):
    """A linear layer whose weights have unit variance and are scaled when used, so that all learn equally fast.

    Args:
        before: Columns in.
        after: Columns out.
        bias: Initial bias.
        rate: Factor on the learning rate.
    """

    def __init__(self, before: int, after: int, bias: float = 0.0, rate: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(after, before) / rate)
        self.bias = nn.Parameter(torch.full((after,), bias / rate))
        self.gain, self.rate = rate / math.sqrt(before), rate

    def scaled(self) -> tuple[Tensor, Tensor]:
        """Weight and bias as they are used."""
        return self.weight * self.gain, self.bias * self.rate

    def forward(self, rows: Tensor) -> Tensor:
        """Rows (..., after) of (..., before)."""
        return F.linear(rows, *self.scaled())


class EqualConv(nn.Module):
    """A convolution with equalised learning rate, an optional bias and activation.

    Args:
        before: Channels in.
        after: Channels out.
        side: Of the kernel.
        halves: Whether means of 2x2 pixels follow the convolution; a side of 3 is needed.
        linear: Whether bias and activation are left out.
    """

    def __init__(
        self, before: int, after: int, side: int, halves: bool = False, linear: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(after, before, side, side))
        self.bias = None if linear else nn.Parameter(torch.zeros(after))
        self.gain = 1 / math.sqrt(before * side * side)
        self.halves, self.padding = halves, side // 2

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, after, H, W), or (B, after, H/2, W/2)."""
        if self.bias is None:
            return F.conv2d(features, self.weight * self.gain, padding=self.padding)
        # The gain of the activation, which is homogeneous, is in the weights; that saves a pass.
        weight, bias = self.weight * (self.gain * GAIN), self.bias * GAIN
        if self.halves:
            return F.leaky_relu(down_conv(features, weight, bias), SLOPE)
        return F.leaky_relu(F.conv2d(features, weight, bias, padding=self.padding), SLOPE)


@dataclass(frozen=True)
class ReadyMapping:
    """The mapping network with its weights as they are used."""

    layers: tuple[tuple[Tensor, Tensor], ...]

    def __call__(self, z: Tensor) -> Tensor:
        """w (..., after) of z (..., before)."""
        rows = z * (z.square().mean(-1, keepdim=True) + _EPSILON).rsqrt()
        for weight, bias in self.layers:
            rows = activate(F.linear(rows, weight, bias))
        return rows


class Mapping(nn.Module):
    """From normal z to w, whose distribution is learned: pixel norm, then layers at a hundredth of the rate.

    Args:
        before: Columns of z.
        after: Columns of w.
        depth: Layers.
    """

    def __init__(self, before: int, after: int, depth: int) -> None:
        super().__init__()
        sizes = [before] + [after] * (depth - 1)
        self.layers = nn.ModuleList([EqualLinear(size, after, rate=0.01) for size in sizes])

    def ready(self) -> ReadyMapping:
        """The network, prepared."""
        return ReadyMapping(tuple(layer.scaled() for layer in self.layers))  # type: ignore[operator]

    def forward(self, z: Tensor) -> Tensor:
        """w (..., after) of z (..., before)."""
        return self.ready()(z)


@dataclass(frozen=True)
class ReadyConv:
    """A modulated convolution whose weights are prepared: what does not change with the style is computed once."""

    style: tuple[Tensor, Tensor]
    kernel: Tensor
    squares: Tensor
    bias: Tensor
    noise: Tensor
    strength: Tensor
    up: bool

    def __call__(self, features: Tensor, w: Tensor, random: bool = False) -> Tensor:
        """Features (B, O, H, W) in the style w (B, W), under fixed or random noise."""
        style = F.linear(w, *self.style)
        # rsqrt of the sum of squares of the weights that the style makes: outputs of unit variance (eq. 3).
        norm = (F.linear(style.square(), self.squares) + _EPSILON).rsqrt() * GAIN
        features = self._convolved(features * _as_image(style))
        if random:
            noise = torch.randn_like(features[:, :1]) * self.strength
            features = torch.addcmul(noise, features, _as_image(norm)) + self.bias
        else:
            features = torch.addcmul(self.offset, features, _as_image(norm))
        return F.leaky_relu(features, SLOPE)

    def _convolved(self, features: Tensor) -> Tensor:
        if self.up:
            return up_conv(features, self.kernel)
        return F.conv2d(features, self.kernel, padding=1)

    @cached_property
    def offset(self) -> Tensor:
        """Bias and fixed noise (1, O, H, W)."""
        return self.bias + self.noise * self.strength


class ModulatedConv(nn.Module):
    """A 3x3 convolution whose input channels are scaled by a style, with demodulation, noise and activation.

    Args:
        w_size: Columns of w.
        before: Channels in.
        after: Channels out.
        side: Of the image that comes out.
        up: Whether the sides double.
    """

    noise: Tensor

    def __init__(self, w_size: int, before: int, after: int, side: int, up: bool = False) -> None:
        super().__init__()
        self.style = EqualLinear(w_size, before, bias=1.0)
        self.weight = nn.Parameter(torch.randn(after, before, 3, 3))
        self.bias = nn.Parameter(torch.zeros(after))
        self.strength = nn.Parameter(torch.zeros(()))
        self.register_buffer("noise", torch.randn(1, 1, side, side))
        self.up = up

    def ready(self) -> ReadyConv:
        """The layer, prepared."""
        weight = self.weight / math.sqrt(self.weight[0].numel())
        squares = weight.square().sum((2, 3))
        # The activation is homogeneous: its gain is in what it is given, which saves a pass.
        bias = _as_image(self.bias.unsqueeze(0)) * GAIN
        return ReadyConv(
            self.style.scaled(),
            up_kernel(weight) if self.up else weight,
            squares,
            bias,
            self.noise,
            self.strength * GAIN,
            self.up,
        )


@dataclass(frozen=True)
class ReadyOutput:
    """An output layer whose weights are prepared."""

    style: tuple[Tensor, Tensor]
    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor, w: Tensor) -> Tensor:
        """Images (B, C, H, W), unbounded, of features (B, I, H, W) in the style w (B, W)."""
        style = F.linear(w, *self.style)
        # A 1x1 convolution with weights per sample is a product of matrices, and needs no scaled features.
        weights = self.weight * style.unsqueeze(1)
        pixels = features.permute(0, 2, 3, 1).flatten(1, 2)
        images = torch.baddbmm(self.bias, pixels, weights.transpose(1, 2))
        pictures: Tensor = images.transpose(1, 2).unflatten(2, features.shape[2:])  # type: ignore[no-untyped-call]
        return pictures


class ModulatedOutput(nn.Module):
    """From features to an image by a modulated 1x1 convolution, not demodulated.

    Args:
        w_size: Columns of w.
        before: Channels in.
        channels: Of the image.
    """

    def __init__(self, w_size: int, before: int, channels: int) -> None:
        super().__init__()
        self.style = EqualLinear(w_size, before, bias=1.0)
        self.weight = nn.Parameter(torch.randn(channels, before))
        self.bias = nn.Parameter(torch.zeros(channels))

    def ready(self) -> ReadyOutput:
        """The layer, prepared."""
        weight = self.weight / math.sqrt(self.weight.shape[1])
        return ReadyOutput(self.style.scaled(), weight, current(self.bias))


@dataclass(frozen=True)
class ReadySynthesis:
    """The synthesis network, prepared: images of styles, one for each layer."""

    constant: Tensor
    layers: tuple[ReadyConv, ...]
    outputs: tuple[ReadyOutput, ...]

    def __call__(self, ws: Tensor, random: bool = False) -> Tensor:
        """Images (B, C, R, R), around 0 and unbounded, of styles (B, L, W)."""
        features = self.constant.expand(len(ws), -1, -1, -1)
        features = self.layers[0](features, ws[:, 0], random)
        image = self.outputs[0](features, ws[:, 1])
        for number, output in enumerate(self.outputs[1:], start=1):
            for layer in (2 * number - 1, 2 * number):
                features = self.layers[layer](features, ws[:, layer], random)
            # The output's style is that of the layer that follows it, or the last.
            larger = F.interpolate(image, scale_factor=2.0, mode="bilinear", align_corners=False)
            image = larger + output(features, ws[:, 2 * number + 1])
        return image


class Synthesis(nn.Module):
    """The synthesis network of StyleGAN2: a constant, then two styled convolutions for each resolution.

    An image is the sum of the outputs of all resolutions, each enlarged.

    Args:
        resolution: R, a power of two from 4.
        channels: Of the images.
        w_size: Columns of w.
        widths: Channels at each resolution.
    """

    def __init__(self, resolution: int, channels: int, w_size: int, widths: dict[int, int]) -> None:
        super().__init__()
        before = widths[4]
        self.constant = nn.Parameter(torch.randn(1, before, 4, 4))
        layers, outputs = [ModulatedConv(w_size, before, before, 4)], []
        outputs.append(ModulatedOutput(w_size, before, channels))
        for side in sides_to(resolution)[1:]:
            width = widths[side]
            layers.append(ModulatedConv(w_size, before, width, side, up=True))
            layers.append(ModulatedConv(w_size, width, width, side))
            outputs.append(ModulatedOutput(w_size, width, channels))
            before = width
        self.layers, self.outputs = nn.ModuleList(layers), nn.ModuleList(outputs)

    def ready(self) -> ReadySynthesis:
        """The network with all that depends on the weights alone computed."""
        return ReadySynthesis(
            current(self.constant).contiguous(memory_format=torch.channels_last),
            tuple(layer.ready() for layer in self.layers),  # type: ignore[operator]
            tuple(output.ready() for output in self.outputs),  # type: ignore[operator]
        )


def sides_to(resolution: int) -> list[int]:
    """4, 8, ... up to the resolution."""
    return [2**power for power in range(2, resolution.bit_length())]


def widths_to(resolution: int, base: int, largest: int) -> dict[int, int]:
    """Channels at each resolution up to the given one: ``base`` divided by it, and at most ``largest``."""
    return {side: max(1, min(base // side, largest)) for side in sides_to(resolution)}


def _as_image(rows: Tensor) -> Tensor:
    return rows.unsqueeze(2).unsqueeze(3)
