"""The images and codes that a manifold's quality is measured on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onmanifold.analysis.nearest import nearest_images
from onmanifold.data.dataset import Dataset
from onmanifold.foundation.modules import device_of, dtype_of
from onmanifold.foundation.randomness import permutation
from onmanifold.manifolds.base import Manifold

BATCH = 250
"""Images that pass a network at once."""


class Distances(NamedTuple):
    """L2 distances (N,) to the nearest training image, of samples and of test images."""

    samples: npt.NDArray[np.float64]
    tests: npt.NDArray[np.float64]


class Moments(NamedTuple):
    """Mean and standard deviation (latent_size,) float64 of each latent."""

    mean: Tensor
    deviation: Tensor


@dataclass(frozen=True)
class Seen:
    """The images that all figures are taken on, each made once.

    Attributes:
        chosen: Test images.
        part: Those of them that are reconstructed.
    """

    manifold: Manifold
    train: Dataset
    test: Dataset
    chosen: Dataset
    part: Dataset
    stored_codes: bool
    seed: int
    progress: bool

    @cached_property
    def dtype(self) -> torch.dtype:
        return dtype_of(self.manifold)

    @cached_property
    def originals(self) -> Tensor:
        """The chosen test images."""
        return self.images_of(self.chosen)

    @cached_property
    def codes(self) -> Tensor:
        """Codes of the part."""
        device = device_of(self.manifold)
        if self.stored_codes:
            assert self.part.codes is not None
            return self.part.codes.to(device, self.dtype)
        batches = (self.part.batch(rows, device) for rows in self.batches(len(self.part), "encode"))
        return torch.cat(
            [self.manifold.encode(batch.images.to(self.dtype), batch.labels) for batch in batches]
        )

    @cached_property
    def reconstructions(self) -> Tensor:
        """Images of these codes."""
        return self.decode(self.codes, "reconstruct")

    @cached_property
    def drawn(self) -> Tensor:
        """As many codes as there are chosen images, of the same classes, from the manifold's own distribution."""
        labels = self.chosen.labels.to(device_of(self.manifold))
        return self.manifold.sample_codes(labels, self.seed).to(self.dtype)

    @cached_property
    def samples(self) -> Tensor:
        """Images of the codes that were drawn."""
        return self.decode(self.drawn, "sample")

    @cached_property
    def distances(self) -> Distances:
        """How near samples and test images come to training images."""
        found = (nearest_images(images, self.train) for images in (self.samples, self.originals))
        return Distances(*(item.distances.numpy(force=True) for item in found))

    @cached_property
    def moments(self) -> Moments:
        """Of the codes of test images."""
        return _moments(self.codes[:, : self.manifold.latent_size])

    @cached_property
    def drawn_moments(self) -> Moments:
        """Of the codes that were drawn."""
        return _moments(self.drawn[:, : self.manifold.latent_size])

    def decode(self, codes: Tensor, title: str) -> Tensor:
        """Images (N, C, H, W) of codes (N, code_size)."""
        rows = self.batches(len(codes), title)
        return torch.cat([self.manifold.decode(codes[part.to(codes.device)]) for part in rows])

    def images_of(self, dataset: Dataset) -> Tensor:
        """All images of a small dataset on the manifold's device, in its precision."""
        rows = torch.arange(len(dataset))
        return dataset.batch(rows, device_of(self.manifold)).images.to(self.dtype)

    def batches(self, total: int, title: str) -> Iterator[Tensor]:
        """Positions from 0 to ``total`` − 1, some at a time, with a progress bar."""
        from rich.console import Console
        from rich.progress import track

        parts = torch.split(torch.arange(total), BATCH)
        console = Console(stderr=True)
        yield from track(parts, title, console=console, disable=not self.progress)


def chosen_images(dataset: Dataset, count: int, seed: int) -> Dataset:
    """A random choice of ``count`` samples in random order, the same for the same seed; at most all of them."""
    return dataset.subset(permutation(seed, len(dataset), stream="quality")[:count])


def knows_classes(manifold: Manifold, num_classes: int) -> bool:
    """Whether the codes that a manifold draws depend on the class asked for."""
    labels = torch.arange(num_classes, device=device_of(manifold))
    others = (labels + 1) % num_classes
    return not torch.equal(manifold.sample_codes(labels), manifold.sample_codes(others))


def _moments(latents: Tensor) -> Moments:
    wide = latents.double()
    return Moments(wide.mean(0), wide.std(0))
