"""Glow as an attack sees it: weights folded once, both ways without a log-determinant, the way back fast.

Between two couplings lies one affine map of a pixel's channels: actnorm, the 1×1 convolution, and in the finest
step the scaling of pixels too. Its inverse is computed in float64, from the forward map as it was rounded, so that
the two undo each other as far as the precision allows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from onmanifold.manifolds.glow.layers import (
    HIGHEST,
    LOWEST,
    Level,
    Scaling,
    Step,
    mask_,
    squeeze,
    unsqueeze,
)

# Pixels v of an image are modelled as u = (255 v + 0.5) / 256 − 0.5: the middle of their bin, around 0.
PIXEL_SCALE, PIXEL_OFFSET = 255 / 256, -0.5 * 255 / 256

Tape = list[tuple[Tensor, ...]]


@dataclass(frozen=True)
class FrozenCoupling:
    """The three convolutions of a coupling, and their transposes.

    The last one's first half is the negated shift, so that going back adds it; its second half is what the sigmoid
    takes. The transposes hold the signs and factors that the gradient needs.
    """

    weights: tuple[Tensor, Tensor, Tensor]
    biases: tuple[Tensor, Tensor, Tensor]
    transposed: tuple[Tensor, Tensor, Tensor]
    scaling: Scaling

    def hidden(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """The activations after the first and after the second convolution."""
        first = functional.conv2d(kept, self.weights[0], self.biases[0], padding=1).relu_()
        return first, functional.conv2d(first, self.weights[1], self.biases[1]).relu_()

    def change(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The negated shift, the scale, and the sigmoid in it."""
        change = functional.conv2d(hidden, self.weights[2], self.biases[2], padding=1)
        half = change.shape[1] // 2
        # Of all channels, since half of them lie scattered in memory.
        sigmoid = change.sigmoid()[:, half:]
        return change[:, :half], self.scaling.of_sigmoid(sigmoid), sigmoid


@dataclass(frozen=True)
class FrozenStep:
    """One step of flow: ``pixels → coupling(matrix · pixels + offset)`` and back.

    Attributes:
        forward: The matrix (C, C, 1, 1) and offset of the way to the code.
        backward: Those of its inverse.
        transposed: The inverse's matrix, transposed.
        coupling: The coupling.
    """

    forward: tuple[Tensor, Tensor]
    backward: tuple[Tensor, Tensor]
    transposed: Tensor
    coupling: FrozenCoupling

    def encode(self, pixels: Tensor) -> Tensor:
        """One step towards the code."""
        mixed = functional.conv2d(pixels, *self.forward)
        kept, moved = mixed.chunk(2, dim=1)
        negated, scale, _ = self.coupling.change(self.coupling.hidden(kept)[1])
        return torch.cat([kept, (moved - negated) * scale], dim=1)

    def decode(self, pixels: Tensor) -> Tensor:
        """One step back towards the image, by operations that can be differentiated in any way."""
        kept, moved = pixels.chunk(2, dim=1)
        negated, scale, _ = self.coupling.change(self.coupling.hidden(kept)[1])
        return functional.conv2d(torch.cat([kept, moved / scale + negated], dim=1), *self.backward)

    def decode_on(self, pixels: Tensor, tape: Tape | None) -> Tensor:
        """The same on ``pixels`` itself, which is lost; what the gradient needs goes onto the tape."""
        half = pixels.shape[1] // 2
        moved = pixels[:, half:]
        first, second = self.coupling.hidden(pixels[:, :half])
        negated, scale, sigmoid = self.coupling.change(second)
        scaled = moved / scale
        torch.add(scaled, negated, out=moved)
        if tape is not None:
            tape.append((first, second, sigmoid, scale, scaled))
        return functional.conv2d(pixels, *self.backward)

    def retrace(self, mixed: Tensor, tape: Tape) -> Tensor:
        """From what `decode_on` gave back to what it was given, the tape written anew."""
        pixels = functional.conv2d(mixed, *self.forward)
        half = pixels.shape[1] // 2
        moved = pixels[:, half:]
        first, second = self.coupling.hidden(pixels[:, :half])
        negated, scale, sigmoid = self.coupling.change(second)
        scaled = moved - negated
        tape.append((first, second, sigmoid, scale, scaled))
        torch.mul(scaled, scale, out=moved)
        return pixels

    def gradient(self, gradient: Tensor, taped: tuple[Tensor, ...]) -> Tensor:
        """The gradient to the input of `decode_on` from that to its output."""
        first, second, sigmoid, scale, scaled = taped
        gradient = functional.conv2d(gradient, self.transposed)
        half = gradient.shape[1] // 2
        kept, moved = gradient[:, :half], gradient[:, half:]
        change = torch.empty_like(gradient)
        change[:, :half] = moved
        # Of moved / scale; the factor −span is in the transposed weights.
        bounded = self.coupling.scaling.bounds is not None
        to_log_scale = moved * scaled if bounded else None
        moved.div_(scale)
        to_sigmoid = moved * scaled if to_log_scale is None else to_log_scale
        torch.ops.aten.sigmoid_backward.grad_input(to_sigmoid, sigmoid, grad_input=change[:, half:])
        inner = functional.conv2d(change, self.coupling.transposed[2], padding=1)
        mask_(inner, second)
        inner = functional.conv2d(inner, self.coupling.transposed[1])
        mask_(inner, first)
        kept.add_(functional.conv2d(inner, self.coupling.transposed[0], padding=1))
        return gradient


@dataclass(frozen=True)
class FrozenPrior:
    """Mean and log scale of a level's latents: those of each channel, or a convolution of what is kept."""

    weight: Tensor | None
    transposed: Tensor | None
    bias: Tensor

    def moments(self, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and log scale, the latter not yet bounded."""
        both = self.bias.view(1, -1, 1, 1)
        if self.weight is not None and kept is not None:
            both = functional.conv2d(kept, self.weight, self.bias, padding=1)
        mean, log_scale = both.chunk(2, dim=1)
        return mean, log_scale


@dataclass(frozen=True)
class FrozenLevel:
    """A level: its steps from the image to the code, its prior, and how many channels go on to the next."""

    steps: tuple[FrozenStep, ...]
    prior: FrozenPrior
    kept: int

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """What stays, and the whitened latents."""
        pixels = squeeze(pixels)
        for step in self.steps:
            pixels = step.encode(pixels)
        kept, latents = pixels[:, : self.kept], pixels[:, self.kept :]
        mean, log_scale = self.prior.moments(kept if self.kept else None)
        return kept, (latents - mean) * (-log_scale.clamp(LOWEST, HIGHEST)).exp()

    def join(self, kept: Tensor | None, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All channels of the level's end, the latents' log scale and its exponential."""
        mean, log_scale = self.prior.moments(kept)
        scale = log_scale.clamp(LOWEST, HIGHEST).exp()
        moved = torch.addcmul(mean, latents, scale)
        return moved if kept is None else torch.cat([kept, moved], dim=1), log_scale, scale

    def decode(self, kept: Tensor | None, latents: Tensor) -> Tensor:
        """The level's input again; can be differentiated in any way."""
        pixels = self.join(kept, latents)[0]
        for step in reversed(self.steps):
            pixels = step.decode(pixels)
        return unsqueeze(pixels)

    def decode_taped(self, kept: Tensor | None, latents: Tensor, tape: Tape | None) -> Tensor:
        """The same, fast; what the gradient needs goes onto the tape."""
        pixels, log_scale, scale = self.join(kept, latents)
        if tape is not None:
            tape.append((log_scale, scale))
        for step in reversed(self.steps):
            pixels = step.decode_on(pixels, tape)
        return unsqueeze(pixels)

    def retrace(self, pixels: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradient and state at the level's end from those at its input, activations computed anew.

        Returns:
            The gradient, the pixels, the latents' log scale and its exponential.
        """
        pixels, gradient = squeeze(pixels), squeeze(gradient)
        for step in self.steps:
            tape: Tape = []
            pixels = step.retrace(pixels, tape)
            gradient = step.gradient(gradient, tape.pop())
        _, log_scale = self.prior.moments(pixels[:, : self.kept] if self.kept else None)
        return gradient, pixels, log_scale, log_scale.clamp(LOWEST, HIGHEST).exp()

    def split_gradient(
        self, gradient: Tensor, latents: Tensor, log_scale: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients to what was kept and to the latents, from that to the level's end."""
        kept, moved = gradient[:, : self.kept], gradient[:, self.kept :]
        to_latents = moved * scale
        if self.prior.transposed is not None:
            inside = (log_scale >= LOWEST) & (log_scale <= HIGHEST)
            change = torch.cat([moved, to_latents * latents * inside], dim=1)
            kept = kept + functional.conv2d(change, self.prior.transposed, padding=1)
        return kept, to_latents


def split_levels(codes: Tensor, shapes: Sequence[tuple[int, int, int]]) -> list[Tensor]:
    """The latents (B, C, H, W) of each level of codes (B, D): views, in channels_last."""
    sizes = [channels * height * width for channels, height, width in shapes]
    parts = zip(torch.split(codes, sizes, dim=1), shapes, strict=True)
    return [part.view(-1, h, w, c).permute(0, 3, 1, 2) for part, (c, h, w) in parts]


def join_levels(latents: Sequence[Tensor]) -> Tensor:
    """Codes (B, D) of the latents of each level."""
    return torch.cat([part.permute(0, 2, 3, 1).flatten(1) for part in latents], dim=1)


@dataclass(frozen=True)
class FrozenGlow:
    """All levels, the finest first; images in [0, 1] of the canvas's size to latents (B, D) and back."""

    levels: tuple[FrozenLevel, ...]
    shapes: tuple[tuple[int, int, int], ...]

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents (B, D) of canvases (B, C, H, W)."""
        parts = []
        for level in self.levels:
            pixels, latents = level.encode(pixels)
            parts.append(latents)
        return join_levels(parts)

    def decode(self, latents: Tensor) -> Tensor:
        """Canvases, not yet clipped; can be differentiated in any way."""
        pixels = None
        for level, part in self._upwards(latents):
            pixels = level.decode(pixels, part)
        assert pixels is not None
        return pixels

    def decode_taped(self, latents: Tensor, tape: Tape | None) -> Tensor:
        """The same, fast; what the gradient needs goes onto the tape."""
        pixels = None
        for level, part in self._upwards(latents):
            pixels = level.decode_taped(pixels, part, tape)
        assert pixels is not None
        return pixels

    def gradient(self, gradient: Tensor, latents: Tensor, tape: Tape) -> Tensor:
        """The gradient to the latents from that to the canvases, along the tape, which is used up."""
        found = []
        for level, part in zip(self.levels, split_levels(latents, self.shapes), strict=True):
            gradient = squeeze(gradient)
            for step in level.steps:
                gradient = step.gradient(gradient, tape.pop())
            gradient, moved = level.split_gradient(gradient, part, *tape.pop())
            found.append(moved)
        return join_levels(found)

    def gradient_retraced(self, gradient: Tensor, latents: Tensor, canvases: Tensor) -> Tensor:
        """The same without a tape: each step's activations are computed again from its output."""
        found, pixels = [], canvases
        for level, part in zip(self.levels, split_levels(latents, self.shapes), strict=True):
            gradient, pixels, log_scale, scale = level.retrace(pixels, gradient)
            pixels = pixels[:, : level.kept]
            gradient, moved = level.split_gradient(gradient, part, log_scale, scale)
            found.append(moved)
        return join_levels(found)

    def _upwards(self, latents: Tensor) -> Iterator[tuple[FrozenLevel, Tensor]]:
        return zip(reversed(self.levels), reversed(split_levels(latents, self.shapes)), strict=True)


@torch.no_grad()
def freeze(
    levels: list[Level], shapes: tuple[tuple[int, int, int], ...], dtype: torch.dtype
) -> FrozenGlow:
    """The levels as they are now, in the given precision.

    Args:
        levels: The finest first.
        shapes: (C, H, W) of each level's latents.
        dtype: float32 or float64.
    """
    frozen = []
    for place, level in enumerate(levels):
        steps = []
        for number, step in enumerate(level.steps):
            assert isinstance(step, Step)
            steps.append(_freeze_step(step, dtype, pixels=place == number == 0))
        frozen.append(FrozenLevel(tuple(steps), _freeze_prior(level, dtype), level.kept))
    return FrozenGlow(tuple(frozen), shapes)


def _freeze_step(step: Step, dtype: torch.dtype, pixels: bool) -> FrozenStep:
    matrix, offset = step.mixing.affine(torch.float64)
    if pixels:
        matrix, offset = matrix * PIXEL_SCALE, offset + PIXEL_OFFSET * matrix.sum(1)
    matrix, offset = matrix.to(dtype), offset.to(dtype)
    inverse = torch.linalg.inv(matrix.double())
    back, back_offset = inverse.to(dtype), (-inverse @ offset.double()).to(dtype)
    return FrozenStep(
        (_kernel(matrix), offset),
        (_kernel(back), back_offset),
        _kernel(back.T),
        _freeze_coupling(step, dtype),
    )


def _freeze_coupling(step: Step, dtype: torch.dtype) -> FrozenCoupling:
    coupling = step.coupling
    half, scaling = coupling.first.in_channels, coupling.scaling
    convolutions = (coupling.first, coupling.middle, coupling.last)
    weights = [layer.weight.detach().to(dtype) for layer in convolutions]
    biases = [_bias(layer).to(dtype) for layer in convolutions]
    inside = torch.full_like(biases[2], scaling.steepness)
    inside[:half] = -1
    weights[2], biases[2] = weights[2] * inside.view(-1, 1, 1, 1), biases[2] * inside
    biases[2][half:] += scaling.offset
    factors = torch.full_like(inside, -scaling.span)
    factors[:half] = 1
    transposed = [
        _transposed(weight) for weight in (*weights[:2], weights[2] * factors.view(-1, 1, 1, 1))
    ]
    return FrozenCoupling(
        (_packed(weights[0]), _packed(weights[1]), _packed(weights[2])),
        (biases[0], biases[1], biases[2]),
        (transposed[0], transposed[1], transposed[2]),
        scaling,
    )


def _freeze_prior(level: Level, dtype: torch.dtype) -> FrozenPrior:
    layer = level.prior.convolution
    if layer is None:
        return FrozenPrior(
            None, None, torch.cat([level.prior.mean, level.prior.log_scale]).to(dtype)
        )
    weight = layer.weight.detach().to(dtype)
    return FrozenPrior(_packed(weight), _transposed(weight), _bias(layer).to(dtype))


def _bias(layer: torch.nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias.detach()


def _kernel(matrix: Tensor) -> Tensor:
    return _packed(matrix[:, :, None, None])


def _packed(weight: Tensor) -> Tensor:
    return weight.contiguous(memory_format=torch.channels_last)


def _transposed(weight: Tensor) -> Tensor:
    """The kernel by which the gradient to a convolution's input is itself a convolution."""
    return _packed(weight.flip(2, 3).transpose(0, 1))
