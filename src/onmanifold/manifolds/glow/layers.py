"""The layers of Glow from images to codes, as they are trained (Kingma and Dhariwal 2018; IJSAT A.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

PriorKind = Literal["learned", "channel"]

# Far outside what training reaches; a prior between them keeps every code finite.
LOWEST, HIGHEST = -8.0, 8.0
# A channel that does not vary in the first images is not blown up beyond this.
_LEAST_SPREAD = 1e-3


def squeeze(images: Tensor) -> Tensor:
    """Each 2 × 2 block of (B, C, H, W) as one pixel of (B, 4C, H/2, W/2): place in the block, then channel.

    The order in which channels_last memory holds a block's rows, so that whole rows are copied.
    """
    count, channels, height, width = images.shape
    blocks = images.permute(0, 2, 3, 1).reshape(count, height // 2, 2, width // 2, 2, channels)
    pixels = blocks.transpose(2, 3).reshape(count, height // 2, width // 2, 4 * channels)
    return pixels.permute(0, 3, 1, 2)


def unsqueeze(images: Tensor) -> Tensor:
    """The inverse of `squeeze`: (B, 4C, H, W) to (B, C, 2H, 2W)."""
    count, channels, height, width = images.shape
    blocks = images.permute(0, 2, 3, 1).reshape(count, height, width, 2, 2, channels // 4)
    pixels = blocks.transpose(2, 3).reshape(count, 2 * height, 2 * width, channels // 4)
    return pixels.permute(0, 3, 1, 2)


class Mixing(nn.Module):
    """Actnorm and the invertible 1×1 convolution after it: one affine map of a pixel's channels.

    y = P L U · exp(log_scale) · (x + shift), with a fixed permutation P, L unit lower and U upper triangular; its
    diagonal has fixed signs and a learned logarithm, so that it is invertible whatever training does.

    Args:
        channels: C.
    """

    permutation: Tensor
    sign: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        rotation = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))[0]
        rows, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.lower = nn.Parameter(lower.tril(-1).float())
        self.upper = nn.Parameter(upper.triu(1).float())
        self.log_diagonal = nn.Parameter(diagonal.abs().log().float())
        self.register_buffer("permutation", rows.argmax(1))
        self.register_buffer("sign", diagonal.sign().float())

    def affine(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The map as matrix (C, C) and offset (C,), computed in the given precision."""
        lower, upper, sign = self.lower.to(dtype), self.upper.to(dtype), self.sign.to(dtype)
        diagonal, scale = self.log_diagonal.to(dtype).exp() * sign, self.log_scale.to(dtype).exp()
        product = lower.tril(-1) @ (above := upper.triu(1) + diagonal.diag()) + above
        matrix = product[self.permutation] * scale
        return matrix, matrix @ self.shift.to(dtype)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The mapped (B, C, H, W), and the logarithm of the determinant () for one pixel."""
        matrix, offset = self.affine(pixels.dtype)
        mixed = functional.conv2d(pixels, matrix[:, :, None, None], offset)
        return mixed, self.log_scale.sum() + self.log_diagonal.sum()

    @torch.no_grad()
    def start(self, pixels: Tensor) -> None:
        """Actnorm's start: each channel of (B, C, H, W) leaves it with mean 0 and standard deviation 1."""
        values = pixels.double().transpose(0, 1).flatten(1)
        self.shift.copy_(-values.mean(1))
        self.log_scale.copy_(-values.std(1, correction=0).clamp(min=_LEAST_SPREAD).log())


@dataclass(frozen=True)
class Scaling:
    """How a coupling's third convolution becomes a scale.

    Bounded, log scale = log low + log(high / low) · sigmoid(steepness · raw + offset): between the bounds, and at
    raw = 0 the scale is 1 and grows like exp(raw). Without bounds, scale = sigmoid(raw), raw starting at 2: the
    form of the released code.

    Attributes:
        bounds: (low, high) with 0 < low < 1 < high; None: the sigmoid.
    """

    bounds: tuple[float, float] | None

    @property
    def start(self) -> float:
        """Where the bias of raw starts."""
        return 2.0 if self.bounds is None else 0.0

    @property
    def lowest(self) -> float:
        """log low; 0 for the sigmoid."""
        return 0.0 if self.bounds is None else math.log(self.bounds[0])

    @property
    def span(self) -> float:
        """log(high / low); 1 for the sigmoid."""
        return 1.0 if self.bounds is None else math.log(self.bounds[1] / self.bounds[0])

    @property
    def steepness(self) -> float:
        """What raw is multiplied by inside the sigmoid."""
        if self.bounds is None:
            return 1.0
        share = -self.lowest / self.span
        return 1 / (self.span * share * (1 - share))

    @property
    def offset(self) -> float:
        """What is added to it."""
        if self.bounds is None:
            return 0.0
        return math.log(-self.lowest / (self.span + self.lowest))

    def of_sigmoid(self, sigmoid: Tensor) -> Tensor:
        """The scale, given the sigmoid in it."""
        return sigmoid if self.bounds is None else (sigmoid * self.span + self.lowest).exp_()

    def sigmoid_gradient(self, gradient: Tensor, sigmoid: Tensor, out: Tensor) -> None:
        """The gradient to raw from that to the log scale, in ``out``."""
        if self.bounds is None:
            torch.addcmul(gradient, gradient, sigmoid, value=-1, out=out)
            return
        torch.ops.aten.sigmoid_backward.grad_input(gradient, sigmoid, grad_input=out)
        out.mul_(self.span * self.steepness)

    def __call__(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and log scale, each of the shape of ``raw``."""
        if self.bounds is None:
            return raw.sigmoid(), functional.logsigmoid(raw)
        log_scale = self.lowest + self.span * (self.offset + self.steepness * raw).sigmoid()
        return log_scale.exp(), log_scale


class Coupling(nn.Module):
    """The affine coupling: the first half of the channels says how the second is shifted and scaled.

    y2 = (x2 + shift) · scale(raw), where three convolutions make of the first half first all shifts, then all raw.
    (Released code interleaves them: the same functions.)

    Args:
        channels: C, even.
        width: Channels between the convolutions.
        scaling: From raw to scale.
    """

    def __init__(self, channels: int, width: int, scaling: Scaling) -> None:
        super().__init__()
        half = channels // 2
        self.first = nn.Conv2d(half, width, 3, padding=1)
        self.middle = nn.Conv2d(width, width, 1)
        self.last = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        with torch.no_grad():
            assert self.last.bias is not None
            self.last.bias.copy_(torch.cat([torch.zeros(half), torch.full((half,), scaling.start)]))
        self.scaling = scaling

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The coupled (B, C, H, W), and the logarithm of the determinant (B,)."""
        if torch.is_grad_enabled() and not torch.is_autocast_enabled(pixels.device.type):
            layers = (self.first, self.middle, self.last)
            weights = [part for layer in layers for part in (layer.weight, layer.bias)]
            coupled, determinant = _Coupled.apply(pixels, self.scaling, *weights)  # type: ignore[no-untyped-call]
            return coupled, determinant
        kept, moved = pixels.chunk(2, dim=1)
        hidden = self.middle(self.first(kept).relu_()).relu_()
        shift, raw = self.last(hidden).chunk(2, dim=1)
        scale, log_scale = self.scaling(raw)
        return torch.cat([kept, (moved + shift) * scale], dim=1), log_scale.sum((1, 2, 3))


class _Coupled(torch.autograd.Function):
    """What `Coupling` computes, with its gradient written out: it masks in place, and splits and joins nothing.

    The convolutions are three quarters of a training step; what autograd adds to them is halved here.
    """

    @staticmethod
    def forward(
        ctx: Any, pixels: Tensor, scaling: Scaling, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        half = pixels.shape[1] // 2
        kept, moved = pixels[:, :half], pixels[:, half:]
        first = functional.conv2d(kept, weights[0], weights[1], padding=1).relu_()
        second = functional.conv2d(first, weights[2], weights[3]).relu_()
        change = functional.conv2d(second, weights[4], weights[5], padding=1)
        inside = change[:, half:]
        if scaling.bounds is not None:
            inside = inside.mul(scaling.steepness).add_(scaling.offset)
        sigmoid = inside.sigmoid()
        scale = scaling.of_sigmoid(sigmoid)
        coupled = torch.cat([kept, change[:, :half].add_(moved).mul_(scale)], dim=1)
        ctx.scaling = scaling
        ctx.save_for_backward(pixels, first, second, sigmoid, scale, coupled, *weights[::2])
        log_scale = functional.logsigmoid(inside)
        if scaling.bounds is not None:
            log_scale = sigmoid * scaling.span + scaling.lowest
        return coupled, log_scale.sum((1, 2, 3))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, to_determinant: Tensor) -> tuple[Tensor | None, ...]:
        pixels, first, second, sigmoid, scale, coupled, *weights = ctx.saved_tensors
        half = pixels.shape[1] // 2
        change = torch.empty_like(coupled)
        torch.mul(gradient[:, half:], scale, out=change[:, :half])
        to_log_scale = torch.addcmul(
            to_determinant.view(-1, 1, 1, 1), gradient[:, half:], coupled[:, half:]
        )
        ctx.scaling.sigmoid_gradient(to_log_scale, sigmoid, out=change[:, half:])
        inner, *to_last = _convolution_gradients(change, second, weights[2])
        mask_(inner, second)
        inner, *to_middle = _convolution_gradients(inner, first, weights[1])
        mask_(inner, first)
        inner, *to_first = _convolution_gradients(inner, pixels[:, :half], weights[0])
        to_pixels = torch.cat([gradient[:, :half] + inner, change[:, :half]], dim=1)
        return to_pixels, None, *to_first, *to_middle, *to_last


def _convolution_gradients(
    gradient: Tensor, given: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients to a convolution's input, weight and bias, of odd kernel and with as much padding."""
    padding = [weight.shape[2] // 2] * 2
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        gradient,
        given,
        weight,
        [len(weight)],
        [1, 1],
        padding,
        [1, 1],
        False,
        [0, 0],
        1,
        [True] * 3,
    )
    return found


def mask_(gradient: Tensor, activations: Tensor) -> None:
    """The gradient before a ReLU in place of that after it: another large tensor would take twice the time."""
    torch.ops.aten.threshold_backward.grad_input(gradient, activations, 0, grad_input=gradient)


class Step(nn.Module):
    """One step of flow: actnorm, invertible 1×1 convolution, affine coupling."""

    def __init__(self, channels: int, width: int, scaling: Scaling) -> None:
        super().__init__()
        self.mixing = Mixing(channels)
        self.coupling = Coupling(channels, width, scaling)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) to the same shape, and the logarithm of the determinant (B,)."""
        mixed, per_pixel = self.mixing(pixels)
        coupled, determinant = self.coupling(mixed)
        return coupled, determinant + per_pixel * pixels[0, 0].numel()


class Prior(nn.Module):
    """The normal distribution of a level's latents, with mean and log scale per pixel or per channel.

    Args:
        channels: C of the latents.
        given: Channels of what is known when they are drawn, which a convolution, zero at first, reads; None:
            nothing is, and each channel has its mean and log scale.
    """

    def __init__(self, channels: int, given: int | None) -> None:
        super().__init__()
        self.convolution: nn.Conv2d | None = None
        if given is None:
            self.mean = nn.Parameter(torch.zeros(channels))
            self.log_scale = nn.Parameter(torch.zeros(channels))
        else:
            self.convolution = nn.Conv2d(given, 2 * channels, 3, padding=1)
            nn.init.zeros_(self.convolution.weight)
            if self.convolution.bias is not None:
                nn.init.zeros_(self.convolution.bias)

    def forward(self, given: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and log scale, to be broadcast to (B, C, H, W)."""
        if self.convolution is None or given is None:
            mean, log_scale = self.mean.view(1, -1, 1, 1), self.log_scale.view(1, -1, 1, 1)
        else:
            mean, log_scale = self.convolution(given).chunk(2, dim=1)
        return mean, log_scale.clamp(LOWEST, HIGHEST)


class Level(nn.Module):
    """Squeeze, the steps of flow, and the split: half of the channels leave as this level's latents.

    Args:
        channels: C of its input.
        steps: Steps of flow.
        width: Of the couplings.
        scaling: Of the couplings.
        prior: "learned", from the half that stays, or "channel".
        last: Whether it is the coarsest, all of whose channels are latents.
    """

    def __init__(
        self,
        channels: int,
        steps: int,
        width: int,
        scaling: Scaling,
        prior: PriorKind,
        last: bool,
    ) -> None:
        super().__init__()
        inside = 4 * channels
        self.steps = nn.ModuleList(Step(inside, width, scaling) for _ in range(steps))
        self.kept = 0 if last else inside // 2
        self.prior = Prior(
            inside - self.kept, self.kept if prior == "learned" and not last else None
        )

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What stays, the whitened latents of this level, and the logarithm of the determinant (B,)."""
        pixels = squeeze(pixels)
        determinant = pixels.new_zeros(len(pixels))
        for step in self.steps:
            pixels, more = step(pixels)
            determinant = determinant + more
        kept, latents = pixels[:, : self.kept], pixels[:, self.kept :]
        mean, log_scale = self.prior(kept if self.kept else None)
        spread = log_scale.expand_as(latents).sum((1, 2, 3))
        return kept, (latents - mean) * (-log_scale).exp(), determinant - spread

    @torch.no_grad()
    def start(self, pixels: Tensor) -> Tensor:
        """Start the actnorms, one after the other; returns what stays."""
        pixels = squeeze(pixels)
        for step in self.steps:
            assert isinstance(step, Step)
            step.mixing.start(pixels)
            pixels = step(pixels)[0]
        return pixels[:, : self.kept]
