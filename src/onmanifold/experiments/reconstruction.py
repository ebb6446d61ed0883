"""How near the images of an on-manifold dataset are to the originals: over all samples, and in each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onmanifold.data.dataset import Dataset
from onmanifold.data.on_manifold_files import MEASURES, Shard

# Images that the mean image is summed over at once.
_PORTION = 512


@dataclass(frozen=True)
class Reconstruction:
    """How near generated images are to the originals, over some samples; in units of [0, 1] pixels.

    Attributes:
        samples: How many.
        l1: Mean absolute difference of the pixels.
        l2: Root mean square difference of the pixels.
        perceptual: Mean perceptual distance, in its own units.
        mean_image_l1: As ``l1``, with the mean of all originals in place of the generated images.
        rounding: Mean absolute difference between the generated images and their 8-bit pictures.
    """

    samples: int
    l1: float
    l2: float
    perceptual: float
    mean_image_l1: float
    rounding: float


def reconstructions(
    shards: Sequence[Shard], dataset: Dataset
) -> tuple[Reconstruction, dict[str, Reconstruction]]:
    """The reconstruction of all samples, and that of each class by name.

    Args:
        shards: All of a split.
        dataset: The originals, in the same order.
    """
    columns = {
        name: torch.cat([shard.measures[name] for shard in shards]).double() for name in MEASURES
    }
    columns["mean_image_l1"] = mean_image_l1(dataset)
    labels = torch.cat([shard.labels for shard in shards])
    classes = {
        name: _summary(columns, labels == number)
        for number, name in enumerate(dataset.classes)
        if bool((labels == number).any())
    }
    return _summary(columns, torch.ones_like(labels, dtype=torch.bool)), classes


def mean_image_l1(dataset: Dataset) -> Tensor:
    """(N,) float64 mean absolute differences of the images from the mean of them all."""
    portions = torch.split(torch.arange(len(dataset)), _PORTION)
    mean = torch.zeros(dataset.image_shape, dtype=torch.float64)
    for positions in portions:
        mean += dataset.batch(positions, device="cpu").images.double().sum(0)
    mean = (mean / len(dataset)).float()
    distances = [
        (dataset.batch(positions, device="cpu").images - mean).abs().flatten(1).mean(1)
        for positions in portions
    ]
    return torch.cat(distances).double()


def _summary(columns: Mapping[str, Tensor], chosen: Tensor) -> Reconstruction:
    means = {name: float(column[chosen].mean()) for name, column in columns.items()}
    means["l2"] = float(columns["l2"][chosen].square().mean().sqrt())
    return Reconstruction(samples=int(chosen.sum()), **means)
