"""StyleGAN: a generator with a style for each of its layers (Karras et al. 2019, 2020), the manifold of DMAT."""

from __future__ import annotations

import copy
from collections.abc import Mapping as Dictionary
from typing import Literal

import torch
from torch import Tensor

from onmanifold.foundation.errors import InputError
from onmanifold.foundation.randomness import normal
from onmanifold.foundation.registry import MANIFOLDS
from onmanifold.manifolds.base import Chart
from onmanifold.manifolds.learned import ImageShape, LearnedManifold
from onmanifold.manifolds.perceptual import PyramidDistance
from onmanifold.manifolds.precision import in_precision
from onmanifold.manifolds.project import PROJECTIONS, project
from onmanifold.manifolds.stylegan_layers import Mapping, ReadyMapping, Synthesis, widths_to

Space = Literal["w+", "w", "z"]


class StyleGANChart(Chart):
    """The synthesis network with all computed that depends on the weights alone; these take no gradient."""

    manifold: StyleGAN

    def __init__(self, manifold: StyleGAN, codes: Tensor) -> None:
        super().__init__(manifold, codes)
        self.generator = in_precision(manifold, codes.dtype)
        with torch.no_grad():
            self.mapping = self.generator.mapping.ready()
            self.synthesis = self.generator.synthesis.ready()

    def decode(self, latents: Tensor) -> Tensor:
        images = self.synthesis(self.generator.styles_of(latents, self.mapping))
        return self.manifold.framed(images).clamp(0, 1).to(latents.dtype)

    def keep(self, mask: Tensor) -> Chart:
        narrowed = copy.copy(self)
        narrowed.latents, narrowed.fixed = self.latents[mask], self.fixed[mask]
        return narrowed


@MANIFOLDS.register("stylegan")
class StyleGAN(LearnedManifold):
    """StyleGAN2: z -> mapping -> w, a style for each layer -> synthesis -> image.

    The code is, by ``space``: "w+", a style for each layer (DMAT, section 3), whose levels are the layers;
    "w", one style for all of them; "z", the input of the mapping network. Noise is fixed, so that `decode` is a
    function of the code. There is no encoder: `encode` projects (DMAT eq. 7).

    Args:
        image_shape: (C, H, W); the sides are one power of two from 8 to 256, unless ``crop``.
        num_classes: K; images do not depend on the class.
        space: See above.
        w_size: Columns of one style.
        z_size: Columns of z.
        mapping_depth: Layers of the mapping network.
        channel_base: A resolution has ``channel_base`` divided by it as channels ...
        channel_max: ... and at most these.
        truncation: How far drawn codes go from the mean style to their own: 1 all the way, less for images of
            less variety and better looks.
        crop: Images are the middle of those of the next power of two, such as 28 x 28 of 32 x 32.

    Raises:
        InputError: Other sides, or a size or truncation out of range.
    """

    name = "stylegan"
    mean_w: Tensor

    def __init__(
        self,
        image_shape: ImageShape = (3, 32, 32),
        num_classes: int = 10,
        space: Space = "w+",
        w_size: int = 512,
        z_size: int = 512,
        mapping_depth: int = 8,
        channel_base: int = 16384,
        channel_max: int = 512,
        truncation: float = 1.0,
        crop: bool = False,
    ) -> None:
        resolution = resolution_of(image_shape, crop)
        self.layers = 2 * resolution.bit_length() - 4
        sizes = {"w+": self.layers * w_size, "w": w_size, "z": z_size}
        if space not in sizes:
            raise InputError(f"space: expected one of {', '.join(sizes)}, found {space!r}.")
        numbers = {
            "w_size": w_size,
            "z_size": z_size,
            "mapping_depth": mapping_depth,
            "channel_base": channel_base,
            "channel_max": channel_max,
        }
        for name, number in numbers.items():
            if number < 1:
                raise InputError(f"{name}: expected at least 1, found {number}.")
        if not 0 <= truncation <= 1:
            raise InputError(f"truncation: expected a number in [0, 1], found {truncation}.")
        super().__init__(image_shape, num_classes, sizes[space])
        self.resolution, self.space = resolution, space
        self.w_size, self.z_size, self.truncation = w_size, z_size, truncation
        self.widths = widths_to(resolution, channel_base, channel_max)
        self.mapping = Mapping(z_size, w_size, mapping_depth)
        self.synthesis = Synthesis(resolution, self.image_shape[0], w_size, self.widths)
        self.register_buffer("mean_w", torch.zeros(w_size))

    @property
    def levels(self) -> Dictionary[int, slice]:
        """In W+ the columns of each layer, 0 being the coarsest."""
        if self.space != "w+":
            return super().levels
        size = self.w_size
        return {layer: slice(layer * size, (layer + 1) * size) for layer in range(self.layers)}

    def truncated(self, w: Tensor) -> Tensor:
        """Styles (..., w_size), drawn towards the mean one as ``truncation`` says."""
        return w if self.truncation == 1 else self.mean_w + (w - self.mean_w) * self.truncation

    def styles_of(self, latents: Tensor, mapping: ReadyMapping | None = None) -> Tensor:
        """The style of each layer (B, layers, w_size) at latents (B, latent_size); ``mapping`` may be prepared."""
        if self.space == "w+":
            return latents.view(-1, self.layers, self.w_size)
        w = latents if self.space == "w" else self.truncated((mapping or self.mapping)(latents))
        return w.unsqueeze(1).expand(-1, self.layers, -1)

    def framed(self, images: Tensor) -> Tensor:
        """What the synthesis makes, (B, C, R, R) around 0, as images (B, C, H, W) around 1/2, not clamped."""
        height, width = self.image_shape[1:]
        top, left = (self.resolution - height) // 2, (self.resolution - width) // 2
        return images[:, :, top : top + height, left : left + width] / 2 + 0.5

    def generate(self, styles: Tensor) -> Tensor:
        """Images (B, C, H, W), not clamped to [0, 1], of styles (B, layers, w_size) under random noise.

        This is what learning uses: it is differentiable in the weights too.
        """
        return self.framed(self.synthesis.ready()(styles, random=True))

    def decode(self, codes: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] of codes (B, code_size), under the fixed noise."""
        chart = self.chart(codes)
        return chart.decode(chart.latents)

    def chart(self, codes: Tensor) -> StyleGANChart:
        """The synthesis network, prepared, around ``codes``."""
        return StyleGANChart(self, self.check_codes(codes, len(codes)))

    @torch.no_grad()
    def sample_codes(self, labels: Tensor, seed: int = 0, indices: Tensor | None = None) -> Tensor:
        """Codes of standard normal z, mapped and truncated; labels say only how many; see `Manifold`."""
        indices = torch.arange(len(labels), device=labels.device) if indices is None else indices
        z = normal(seed, indices, (self.z_size,), stream="codes")
        if self.space == "z":
            return z
        w = self.truncated(self.mapping(z.to(self.mean_w))).float()
        return w.repeat(1, self.layers) if self.space == "w+" else w

    def mean_code(self, labels: Tensor) -> Tensor:
        """The codes (B, code_size) of the mean style, or of z = 0, where projections start."""
        rows = self.mean_w.float().repeat(self.layers if self.space == "w+" else 1)
        mean = torch.zeros_like(rows[:1]).expand(self.z_size) if self.space == "z" else rows
        return mean.repeat(len(labels), 1).to(labels.device)

    def encode(self, images: Tensor, labels: Tensor) -> Tensor:
        """Codes of the nearest images found by the "quick" projection with `PyramidDistance`; many decodings."""
        config, measure = PROJECTIONS["quick"], PyramidDistance()
        return project(self, images, labels=labels, config=config, measure=measure).codes


def resolution_of(image_shape: ImageShape, crop: bool = False) -> int:
    """The side of the images that are made: the image's own, or with ``crop`` the next power of two.

    Raises:
        InputError: It is not a power of two from 8 to 256.
    """
    height, width = image_shape[1:]
    resolution = 1 << (max(height, width) - 1).bit_length()
    if not 8 <= resolution <= 256 or not (crop or height == width == resolution):
        hint = "" if crop else " Or let crop=True take the middle of larger images."
        raise InputError(
            "image_shape: expected sides that are one power of two from 8 to 256, "
            f"found {height} x {width}.{hint}"
        )
    return resolution
