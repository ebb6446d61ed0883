"""Augmentation per sample: what happens to an image depends on (seed, epoch, index), not on its batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from onmanifold.foundation import randomness
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.registry import Component


@dataclass(frozen=True)
class Augmentation(Component):
    """Random horizontal flips, crops of the zero-padded image, and cutout.

    Attributes:
        flip: Whether to mirror each image with probability one half.
        crop_padding: Pixels of zeros on each side before a crop of the original size; 0: no crop.
        cutout: Side of a square that is set to zero, around a random pixel and cut at the border (DeVries and
            Taylor 2017); 0: none.
    """

    flip: bool = False
    crop_padding: int = 0
    cutout: int = 0

    def __post_init__(self) -> None:
        for name in ("crop_padding", "cutout"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}: expected at least 0, found {getattr(self, name)}.")

    def __call__(self, images: Tensor, indices: Tensor, seed: int, epoch: int = 0) -> Tensor:
        """Augmented images.

        Args:
            images: (B, C, H, W).
            indices: (B,) int64 identities of the samples.
            seed: Together with ``epoch`` and ``indices`` determines what is done.
            epoch: Another number, another augmentation.
        """
        if self.flip:
            chance = randomness.uniform(seed, indices, (), stream=f"flip/{epoch}")
            images = torch.where((chance < 0.5).view(-1, 1, 1, 1), images.flip(3), images)
        if self.crop_padding:
            images = self._crop(images, indices, seed, epoch)
        if self.cutout:
            images = self._cut_out(images, indices, seed, epoch)
        return images

    def _crop(self, images: Tensor, indices: Tensor, seed: int, epoch: int) -> Tensor:
        count, _, height, width = images.shape
        padding = self.crop_padding
        stream = f"crop/{epoch}"
        offsets = randomness.integers(seed, indices, 2 * padding + 1, (2,), stream=stream)
        padded = functional.pad(images, [padding] * 4)
        rows = offsets[:, 0, None] + torch.arange(height, device=images.device)
        columns = offsets[:, 1, None] + torch.arange(width, device=images.device)
        samples = torch.arange(count, device=images.device)
        chosen = padded[samples[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return chosen.permute(0, 3, 1, 2).contiguous()

    def _cut_out(self, images: Tensor, indices: Tensor, seed: int, epoch: int) -> Tensor:
        inside = []
        for name, side in (("rows", images.shape[2]), ("columns", images.shape[3])):
            centre = randomness.integers(seed, indices, side, stream=f"cutout/{name}/{epoch}")
            start = (centre - self.cutout // 2).unsqueeze(1)
            positions = torch.arange(side, device=images.device)
            inside.append((positions >= start) & (positions < start + self.cutout))
        square = inside[0][:, None, :, None] & inside[1][:, None, None, :]
        return images.masked_fill(square, 0.0)
