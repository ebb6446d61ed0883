"""Glow, a normalising flow: every image has exactly one code, and the code gives the image back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from onmanifold.foundation.errors import InputError
from onmanifold.foundation.randomness import uniform
from onmanifold.foundation.registry import MANIFOLDS
from onmanifold.manifolds.base import Chart
from onmanifold.manifolds.glow.frozen import (
    PIXEL_OFFSET,
    PIXEL_SCALE,
    FrozenGlow,
    freeze,
    join_levels,
    split_levels,
)
from onmanifold.manifolds.glow.layers import Level, PriorKind, Scaling
from onmanifold.manifolds.learned import LearnedManifold

# A pixel this far outside [0, 1] is there by rounding.
_ROUNDING = 1e-5


class GlowChart(Chart):
    """Glow around a batch of codes: all weights folded, all inverses taken, once."""

    manifold: Glow

    def __init__(self, manifold: Glow, codes: Tensor, frozen: FrozenGlow) -> None:
        super().__init__(manifold, codes)
        self.frozen = frozen

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] at ``latents`` (B, latent_size); differentiable once, and in them alone.

        A pixel that rounding puts outside [0, 1] has the gradient of one at the bound.
        """
        with torch.autocast(latents.device.type, enabled=False):
            if torch.is_grad_enabled() and latents.requires_grad:
                images: Tensor = _Decode.apply(latents, self.frozen, self.manifold)  # type: ignore[no-untyped-call]
                return images
            with torch.no_grad():
                canvases = self.frozen.decode_taped(latents, None)
                return self.manifold.crop(canvases).clamp(0, 1)

    def push(self, latents: Tensor, directions: Tensor) -> Tensor:
        """See `Chart.push`; pixels that are cut off do not move, by the rule of the gradient."""

        def decode(moving: Tensor) -> Tensor:
            return self.manifold.crop(self.frozen.decode(moving))

        with torch.autocast(latents.device.type, enabled=False):
            pushed = torch.func.jvp(decode, (latents,), (directions,))
        moved: Tensor = pushed[1] * _uncut(pushed[0])
        return moved.detach()

    def keep(self, mask: Tensor) -> Chart:
        """The chart of the selected samples."""
        return GlowChart(self.manifold, self.latents[mask], self.frozen)


def _uncut(images: Tensor) -> Tensor:
    """Which pixels are in [0, 1], or outside by rounding alone."""
    return (images >= -_ROUNDING) & (images <= 1 + _ROUNDING)


class _Decode(torch.autograd.Function):
    """The way from latents to images, with a gradient to the latents alone."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor, frozen: FrozenGlow, manifold: Glow) -> Tensor:
        tape: list[tuple[Tensor, ...]] | None = None if manifold.recompute else []
        canvases = frozen.decode_taped(latents, tape)
        ctx.frozen, ctx.manifold = frozen, manifold
        ctx.lengths = None if tape is None else [len(taped) for taped in tape]
        ctx.save_for_backward(
            latents, canvases, *(tensor for taped in tape or () for tensor in taped)
        )
        return manifold.crop(canvases).clamp(0, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        latents, canvases, *taped = ctx.saved_tensors
        images = ctx.manifold.crop(canvases)
        gradient = ctx.manifold.pad(gradient * _uncut(images))
        if ctx.lengths is None:
            return ctx.frozen.gradient_retraced(gradient, latents, canvases), None, None
        places = iter(taped)
        tape = [tuple(next(places) for _ in range(length)) for length in ctx.lengths]
        return ctx.frozen.gradient(gradient, latents, tape), None, None


@MANIFOLDS.register("glow")
class Glow(LearnedManifold):
    """Glow (Kingma and Dhariwal 2018) as IJSAT A.1 has it: levels of squeeze, steps of flow, split.

    A code holds the latents of every level, the finest first, in units of the learned prior: the codes of data are
    standard normal in the model's eyes, ``sample_codes`` draws from the model, and ``0.7 * codes`` has temperature
    0.7. Nothing is dropped, so ``decode(encode(images))`` is the image, up to rounding. The flow models a pixel v
    as (255 v + 0.5) / 256, the middle of its bin.

    Images whose sides are not divisible by 2**levels are padded with black to the next size that is: the flow
    lives on this canvas, codes have as many columns as the canvas has values, and `decode` cuts the image out. The
    round trip stays exact. Bits are those of the whole canvas, its padding dequantised like any pixel, per value
    of the image: an upper bound of what the image takes, as dequantisation itself is.

    Args:
        image_shape: (C, H, W).
        num_classes: K; it knows no classes.
        levels: Number of levels.
        steps: Steps of flow in each.
        width: Channels inside the couplings.
        scale_range: (low, high), the bounds of the couplings' scales, with 0 < low < 1 < high. The way back
            divides by them: where they may come near 0, some images far from the others come back with errors that
            are thousands of times those of rounding. None: sigmoid(raw + 2) as in the released code, no bound.
        prior: "learned": a level's latents have mean and scale predicted from what goes on to the next level;
            "channel": mean and scale per channel.

    Attributes:
        recompute: Whether a chart's gradient computes activations again from outputs, in place of keeping them:
            memory that does not grow with the number of steps, for about half as much time again.
        canvas_shape: (C, H, W) of the padded images.
        level_shapes: (C, H, W) of each level's latents, the finest first.
    """

    name = "glow"
    exact = True
    recompute: bool = False

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (3, 32, 32),
        num_classes: int = 10,
        levels: int = 4,
        steps: int = 8,
        width: int = 512,
        scale_range: tuple[float, float] | None = (0.7, 2.0),
        prior: PriorKind = "learned",
    ) -> None:
        for name, value in (("levels", levels), ("steps", steps), ("width", width)):
            if value < 1:
                raise InputError(f"{name}: expected at least 1, found {value}.")
        if prior not in get_args(PriorKind):
            raise InputError(f"prior: expected 'learned' or 'channel', found {prior!r}.")
        if scale_range is not None and not 0 < scale_range[0] < 1 < scale_range[1] < math.inf:
            raise InputError(
                f"scale_range: expected (low, high) with 0 < low < 1 < high, or None, found {scale_range}."
            )
        channels, unit = image_shape[0], 2**levels
        canvas = (channels, *(-(-side // unit) * unit for side in image_shape[1:]))
        super().__init__(image_shape, num_classes, latent_size=math.prod(canvas))
        self.canvas_shape = canvas
        self.flow = nn.ModuleList()
        scaling = Scaling(scale_range)
        shapes = []
        for number in range(1, levels + 1):
            level = Level(channels, steps, width, scaling, prior, last=number == levels)
            self.flow.append(level)
            side = 2**number
            shapes.append((4 * channels - level.kept, canvas[1] // side, canvas[2] // side))
            channels = level.kept
        self.level_shapes = tuple(shapes)

    @property
    def levels(self) -> Mapping[int, slice]:
        """Columns of the latents of each level: 1 the finest, the last the coarsest (IJSAT eq. 13)."""
        columns, start = {}, 0
        for number, shape in enumerate(self.level_shapes, 1):
            columns[number] = slice(start, start + math.prod(shape))
            start += math.prod(shape)
        return columns

    def split(self, codes: Tensor) -> dict[int, Tensor]:
        """The latents of each level (B, C, H, W) of codes (B, latent_size); views of them."""
        return dict(enumerate(split_levels(codes, self.level_shapes), 1))

    def join(self, latents: Mapping[int, Tensor]) -> Tensor:
        """Codes (B, latent_size) of the latents of each level: the inverse of `split`."""
        return join_levels([latents[number] for number in self.levels])

    def encode(self, images: Tensor, labels: Tensor) -> Tensor:
        """Codes (B, latent_size) of images (B, C, H, W), in the images' precision; labels have no influence.

        Raises:
            InputError: Images of another shape.
        """
        return self.chart_of(images, labels).latents

    def decode(self, codes: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] of codes; differentiable in any way. A chart's `decode` is faster."""
        return self.crop(self.frozen(codes.dtype).decode(codes)).clamp(0, 1)

    def chart(self, codes: Tensor) -> Chart:
        """The chart around ``codes``, for attacks; it holds while the weights stay as they are."""
        return GlowChart(self, codes, self.frozen(codes.dtype))

    def chart_of(self, images: Tensor, labels: Tensor) -> Chart:
        """The chart around the codes of images, the weights folded once for both ways."""
        if tuple(images.shape[1:]) != self.image_shape:
            raise InputError(
                f"images: expected (B, {self.image_shape}), found {tuple(images.shape)}."
            )
        frozen = self.frozen(images.dtype)
        codes = self.check_codes(frozen.encode(self.pad(images)), len(images))
        return GlowChart(self, codes, frozen)

    def frozen(self, dtype: torch.dtype) -> FrozenGlow:
        """The flow as it is now with all that attacks need computed, in the given precision."""
        return freeze(self._levels(), self.level_shapes, dtype)

    def log_likelihood(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """The logarithm (B,), in nats, of the density of images (B, C, H, W); differentiable.

        The density is that of pixels in [0, 1]; of a padded image that of its canvas.
        """
        canvases = self.pad(images) * PIXEL_SCALE + PIXEL_OFFSET
        return self.log_density(canvases) + self.latent_size * math.log(PIXEL_SCALE)

    def bits_per_dimension(
        self, images: Tensor, seed: int = 0, indices: Tensor | None = None
    ) -> Tensor:
        """Bits (B,) that an 8-bit image takes per value, an upper bound by uniform dequantisation; differentiable.

        Args:
            images: (B, C, H, W) in [0, 1], rounded to 255ths.
            seed: Of the noise.
            indices: (B,) sample indices, on which the noise depends; None: 0 to B − 1.
        """
        density = self.log_density(self.dequantise(images, seed, indices))
        bins = self.latent_size * math.log(256)
        return (bins - density) / (math.prod(self.image_shape) * math.log(2))

    def dequantise(self, images: Tensor, seed: int = 0, indices: Tensor | None = None) -> Tensor:
        """Canvases: 8-bit images plus uniform noise of one 256th, in [-0.5, 0.5); arguments as above."""
        indices = torch.arange(len(images), device=images.device) if indices is None else indices
        noise = uniform(seed, indices, self.canvas_shape, stream="dequantise", dtype=images.dtype)
        return ((self.pad(images) * 255).round() + noise) / 256 - 0.5

    def log_density(self, canvases: Tensor) -> Tensor:
        """The logarithm (B,) of the model's density at canvases (B, C, H, W) in [-0.5, 0.5]; differentiable."""
        pixels = canvases.contiguous(memory_format=torch.channels_last)
        total = pixels.new_zeros(len(pixels))
        for level in self._levels():
            pixels, latents, determinant = level(pixels)
            total = total + determinant - 0.5 * latents.square().sum((1, 2, 3))
        return total - 0.5 * self.latent_size * math.log(2 * math.pi)

    @torch.no_grad()
    def start(self, images: Tensor, seed: int = 0, indices: Tensor | None = None) -> None:
        """Actnorm's data-dependent start, on dequantised images (B, C, H, W)."""
        pixels = self.dequantise(images, seed, indices)
        for level in self._levels():
            pixels = level.start(pixels)

    def pad(self, images: Tensor) -> Tensor:
        """The canvases of images."""
        _, height, width = self.canvas_shape
        missing = height - images.shape[2], width - images.shape[3]
        if any(missing):
            top, left = missing[0] // 2, missing[1] // 2
            images = functional.pad(images, (left, missing[1] - left, top, missing[0] - top))
        return images.contiguous(memory_format=torch.channels_last)

    def crop(self, canvases: Tensor) -> Tensor:
        """The images on canvases."""
        _, height, width = self.image_shape
        top, left = (canvases.shape[2] - height) // 2, (canvases.shape[3] - width) // 2
        return canvases[:, :, top : top + height, left : left + width]

    def _levels(self) -> list[Level]:
        return [level for level in self.flow if isinstance(level, Level)]
