"""The nearest training image: how near a generator's samples come to what it has seen."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from onmanifold.data.dataset import Dataset
from onmanifold.foundation.checks import check_images
from onmanifold.foundation.errors import InputError

# Images of the dataset, and images to compare with them, that are taken at once.
_PORTION, _ROWS = 2048, 2048


class Nearest(NamedTuple):
    """The nearest images of a dataset.

    Attributes:
        distances: (B,) float64 L2 distances.
        positions: (B,) int64 positions in the dataset; of equally near ones any.
    """

    distances: Tensor
    positions: Tensor


@torch.no_grad()
def nearest_images(images: Tensor, dataset: Dataset) -> Nearest:
    """For each image the nearest of a dataset, by L2 over pixels; exact, by comparison with all.

    Args:
        images: (B, C, H, W) in [0, 1].
        dataset: At least one image, of the same shape; as it is stored, portion by portion.

    Returns:
        Distances and positions, on the images' device.

    Raises:
        InputError: Another shape or range, or an empty dataset.
    """
    images = check_images(images)
    if tuple(images.shape[1:]) != dataset.image_shape or not len(dataset):
        raise InputError(
            f"dataset: expected images {tuple(images.shape[1:])}, at least one, "
            f"found {len(dataset)} of {dataset.image_shape}."
        )
    rows = images.flatten(1).double()
    best = torch.full_like(rows[:, 0], torch.inf)
    positions = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    parts = torch.split(torch.arange(len(rows), device=rows.device), _ROWS)
    for portion in torch.split(torch.arange(len(dataset)), _PORTION):
        candidates = dataset.batch(portion, rows.device).images.flatten(1).double()
        squares = candidates.square().sum(1)
        for part in parts:
            # Squared distances but for the row's own square, which changes no order.
            found = torch.addmm(squares, rows[part], candidates.T, alpha=-2).min(1)
            nearer = found.values < best[part]
            best[part] = torch.where(nearer, found.values, best[part])
            positions[part] = torch.where(nearer, found.indices + portion[0], positions[part])
    return Nearest(_distances(rows, dataset, positions), positions)


def _distances(rows: Tensor, dataset: Dataset, positions: Tensor) -> Tensor:
    """From the differences themselves, so that a copy is at distance 0."""
    distances = torch.zeros_like(rows[:, 0])
    for part in torch.split(torch.arange(len(rows), device=rows.device), _ROWS):
        found = dataset.batch(positions[part], rows.device).images.flatten(1)
        distances[part] = (rows[part] - found).norm(dim=1)
    return distances
