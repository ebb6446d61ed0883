"""Whether an image keeps its label: the class whose manifold is nearest (Disentangling, definition 1)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from onmanifold.foundation.checks import check_images, check_labels
from onmanifold.foundation.errors import InputError
from onmanifold.manifolds.base import Manifold
from onmanifold.manifolds.fonts import FontsManifold
from onmanifold.manifolds.project import ProjectionConfig, project

# A descent from the code that the manifold itself finds.
_REFINEMENT = ProjectionConfig(steps=100, restarts=0)


class NearestClass(NamedTuple):
    """Which class manifold is nearest.

    Attributes:
        classes: (B,) int64, the nearest one.
        distances: (B, K) L2 distance to the manifold of each class; upper bounds, as near as the search comes.
    """

    classes: Tensor
    distances: Tensor


def nearest_class(
    manifold: Manifold,
    images: Tensor,
    *,
    config: ProjectionConfig = _REFINEMENT,
    batch_size: int = 64,
    seed: int = 0,
    indices: Tensor | None = None,
) -> NearestClass:
    """Project images onto the manifold of every class; the nearest one wins.

    On FONTS the search goes over all fonts, and takes some tenths of a second for an image and class.

    Args:
        manifold: One whose codes hold the class, such as FONTS or a class-specific VAE-GAN.
        images: (B, C, H, W) in [0, 1].
        config: The descent from the codes that ``manifold.encode`` finds.
        batch_size: Images that are projected at once.
        seed: Of the search.
        indices: (B,) int64 sample indices on which the search depends; None: 0 to B - 1.

    Raises:
        InputError: The manifold knows no classes, or the images do not fit it.
    """
    images = check_images(images)
    classes = getattr(manifold, "num_classes", 0)
    if not (isinstance(manifold, FontsManifold) or getattr(manifold, "conditional", False)):
        raise InputError(f"manifold: the codes of {manifold.name} hold no class.")
    indices = torch.arange(len(images), device=images.device) if indices is None else indices
    distances = images.new_empty(len(images), classes)
    for rows in torch.split(torch.arange(len(images), device=images.device), batch_size):
        for label in range(classes):
            labels = torch.full_like(rows, label)
            with torch.no_grad():
                codes = manifold.encode(images[rows], labels)
            found = project(
                manifold,
                images[rows],
                codes,
                labels=labels,
                config=config,
                seed=seed,
                indices=indices[rows],
            )
            distances[rows, label] = found.distance
    return NearestClass(distances.argmin(1), distances)


def keeps_label(manifold: Manifold, images: Tensor, labels: Tensor, **options: object) -> Tensor:
    """Whether each image (B, C, H, W) is nearest to the manifold of its own label: (B,) bool.

    Args:
        manifold: As for `nearest_class`.
        images: (B, C, H, W) in [0, 1].
        labels: (B,) int64.
        options: As for `nearest_class`.
    """
    labels = check_labels(labels, len(images), getattr(manifold, "num_classes", None))
    found = nearest_class(manifold, images, **options)  # type: ignore[arg-type]
    return found.classes == labels
