"""Images with labels, and codes where they are known: what everything above reads its batches from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from onmanifold.foundation import randomness
from onmanifold.foundation.errors import InputError

Transform = Callable[[Tensor, Tensor], Tensor]
"""What is done to the images (B, C, H, W) of a batch, given the identities (B,) of its samples."""


class Batch(NamedTuple):
    """Some samples of a dataset.

    Attributes:
        images: (B, C, H, W) float32 in [0, 1].
        labels: (B,) int64.
        codes: (B, code_size) float32, or None.
        indices: (B,) int64, which samples these are.
    """

    images: Tensor
    labels: Tensor
    codes: Tensor | None
    indices: Tensor


@dataclass(frozen=True, eq=False)
class Dataset:
    """A labelled set of images.

    Attributes:
        name: Short name for tables.
        images: (N, C, H, W), uint8, or float32 in [0, 1]; may be memory-mapped. As they are stored: `batch`
            gives them as they are meant to be seen.
        labels: (N,) int64.
        classes: The names of the classes.
        fingerprint: A digest of what made the set; runs are keyed by it.
        codes: (N, code_size) float32 codes of the images on their manifold, or None.
        indices: (N,) int64 identities of the samples. They survive `subset` and `split` and seed what is
            random per sample. None: 0 to N − 1.
        transforms: What `batch` does to the images, one after the other. The size of the images stays; whoever
            adds a transform makes the fingerprint another one.
    """

    name: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    fingerprint: str
    codes: Tensor | None = None
    indices: Tensor = None  # type: ignore[assignment]
    transforms: tuple[Transform, ...] = ()

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype not in (torch.uint8, torch.float32):
            raise InputError(
                f"images: expected (N, C, H, W) uint8 or float32, found {tuple(self.images.shape)} "
                f"{self.images.dtype}."
            )
        count = len(self.images)
        if self.indices is None:
            object.__setattr__(self, "indices", torch.arange(count, device=self.labels.device))
        for name in ("labels", "indices", "codes"):
            tensor = getattr(self, name)
            if tensor is not None and len(tensor) != count:
                raise InputError(
                    f"{name}: expected {count} rows, one per image, found {len(tensor)}."
                )
        if self.labels.dtype != torch.int64:
            raise InputError(f"labels: expected int64, found {self.labels.dtype}.")
        if count and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            raise InputError(
                f"labels: found {int(self.labels.min())} to {int(self.labels.max())}, expected 0 to "
                f"{len(self.classes) - 1}."
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        """K, the number of classes."""
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def batch(self, positions: Tensor, device: torch.device | str | None = None) -> Batch:
        """The samples at ``positions`` ((B,) int64, from 0 to N − 1), on ``device``."""
        positions = positions.to(self.images.device)
        chosen = (self.images[positions], self.labels[positions], self.indices[positions])
        images, labels, indices = (tensor.to(device or tensor.device) for tensor in chosen)
        codes = None if self.codes is None else self.codes[positions].to(images.device)
        images = as_floats(images)
        for transform in self.transforms:
            images = transform(images, indices)
        return Batch(images, labels, codes, indices)

    def subset(self, positions: Tensor) -> Dataset:
        """The samples at ``positions``, with their identities."""
        digest = hashlib.sha256(self.fingerprint.encode() + positions.cpu().numpy().tobytes())
        return replace(
            self,
            images=self.images[positions],
            labels=self.labels[positions],
            codes=None if self.codes is None else self.codes[positions],
            indices=self.indices[positions],
            fingerprint=digest.hexdigest()[:16],
        )

    def take(self, count: int) -> Dataset:
        """The first ``count`` samples; all where there are fewer."""
        return self if count >= len(self) else self.subset(torch.arange(count))

    def split(self, fraction: float, seed: int = 0) -> tuple[Dataset, Dataset]:
        """A random split, the same for the same seed.

        Args:
            fraction: Share of the samples that is held out, in (0, 1).
            seed: Which split.

        Returns:
            The rest, and the held-out part.

        Raises:
            InputError: ``fraction`` outside (0, 1).
        """
        if not 0 < fraction < 1:
            raise InputError(f"fraction: expected a number in (0, 1), found {fraction}.")
        order = randomness.permutation(seed, len(self), stream="split")
        count = round(fraction * len(self))
        held_out, rest = order[:count].sort().values, order[count:].sort().values
        return self.subset(rest), self.subset(held_out)

    def to(self, device: torch.device | str) -> Dataset:
        """The dataset on a device: images travel once, as they are stored, and are indexed there."""
        return replace(
            self,
            images=self.images.to(device),
            labels=self.labels.to(device),
            codes=None if self.codes is None else self.codes.to(device),
            indices=self.indices.to(device),
        )


def as_floats(images: Tensor) -> Tensor:
    """Images as float32 in [0, 1]; uint8 is divided by 255."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images
