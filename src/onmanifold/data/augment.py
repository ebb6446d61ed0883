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
    """Random horizontal flips and crops of the zero-padded image.

    Attributes:
        flip: Whether to mirror each image with probability one half.
        crop_padding: Pixels of zeros on each side before a crop of the original size; 0: no crop.
    """

    flip: bool = False
    crop_padding: int = 0

    def __post_init__(self) -> None:
        if self.crop_padding < 0:
            raise InputError(f"crop_padding: expected at least 0, found {self.crop_padding}.")

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
