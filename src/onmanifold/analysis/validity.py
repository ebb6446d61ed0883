"""Whether an image keeps its label: the class whose manifold is nearest (Disentangling, definition 1)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from onmanifold.analysis.distance import ManifoldDistance
from onmanifold.foundation.checks import check_images, check_labels
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.modules import frozen
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
    _check_classes(manifold)
    classes = int(getattr(manifold, "num_classes", 0))
    distances = images.new_empty(len(images), classes)
    for label in range(classes):
        labels = torch.full_like(distances[:, 0], label, dtype=torch.int64)
        found = nearest_of_class(
            manifold,
            images,
            labels,
            config=config,
            batch_size=batch_size,
            seed=seed,
            indices=indices,
        )
        distances[:, label] = found.distance
    return NearestClass(distances.argmin(1), distances)


def nearest_of_class(
    manifold: Manifold,
    images: Tensor,
    labels: Tensor,
    *,
    config: ProjectionConfig = _REFINEMENT,
    batch_size: int = 64,
    seed: int = 0,
    indices: Tensor | None = None,
) -> ManifoldDistance:
    """Project each image onto the manifold of one class, whichever it is of; see `nearest_class`.

    Args:
        manifold: As for `nearest_class`.
        images: (B, C, H, W) in [0, 1].
        labels: (B,) int64, onto whose manifold each is projected.
        config: As for `nearest_class`.
        batch_size: As for `nearest_class`.
        seed: As for `nearest_class`.
        indices: As for `nearest_class`.
    """
    images = check_images(images)
    _check_classes(manifold)
    indices = torch.arange(len(images), device=images.device) if indices is None else indices
    distances, points = torch.empty_like(images[:, 0, 0, 0]), torch.empty_like(images)
    for rows in torch.split(torch.arange(len(images), device=images.device), batch_size):
        with torch.no_grad():
            codes = manifold.encode(images[rows], labels[rows])
        found = project(
            manifold,
            images[rows],
            codes,
            labels=labels[rows],
            config=config,
            seed=seed,
            indices=indices[rows],
        )
        distances[rows], points[rows] = found.distance, found.images
    return ManifoldDistance(distances, points)


def _check_classes(manifold: Manifold) -> None:
    if not (isinstance(manifold, FontsManifold) or getattr(manifold, "conditional", False)):
        raise InputError(f"manifold: the codes of {manifold.name} hold no class.")


class LabelCheck(NamedTuple):
    """Whether images keep their label, and by how much.

    Attributes:
        kept: (B,) bool, whether the manifold of the own class is the nearest one.
        kept_by_search: (B,) bool, the same without known codes: of images that are known to be of their class,
            such as clean ones, those that fail count the search's errors.
        own: (B,) L2 distance to the manifold of the own class.
        other: (B,) L2 distance to the nearest manifold of another class.
        other_class: (B,) int64, which that is.
    """

    kept: Tensor
    kept_by_search: Tensor
    own: Tensor
    other: Tensor
    other_class: Tensor


def check_label(
    manifold: Manifold,
    images: Tensor,
    labels: Tensor,
    codes: Tensor | None = None,
    *,
    config: ProjectionConfig = _REFINEMENT,
    batch_size: int = 64,
    seed: int = 0,
    indices: Tensor | None = None,
) -> LabelCheck:
    """Whether images keep their label (Disentangling, definition 1), as far as projections tell.

    Definition 1 asks for the class of largest posterior. Where noise around the class manifolds is small, that is
    the class whose manifold is nearest. An on-manifold attack on the very manifold knows a point of the own class
    at distance 0, its own image; with these codes it is taken into account, and such an image fails only where
    another class has it too. How far the other classes are, ``other``, says how near it comes to that. Without
    codes the search over the own class errs as that over the others does.

    Args:
        manifold: As for `nearest_class`.
        images: (B, C, H, W) in [0, 1].
        labels: (B,) int64.
        codes: (B, code_size) codes of near images of the own class, such as those that an attack on this manifold
            ended with; None: none are known.
        config: As for `nearest_class`.
        batch_size: As for `nearest_class`.
        seed: As for `nearest_class`.
        indices: As for `nearest_class`.

    Raises:
        InputError: As for `nearest_class`, or codes of another class than the labels.
    """
    labels = check_labels(labels, len(images), getattr(manifold, "num_classes", None))
    found = nearest_class(
        manifold, images, config=config, batch_size=batch_size, seed=seed, indices=indices
    )
    own = found.distances.gather(1, labels.unsqueeze(1)).squeeze(1)
    others = found.distances.scatter(1, labels.unsqueeze(1), torch.inf)
    other, other_class = others.min(1)
    by_search = own < other
    if codes is not None:
        manifold.check_codes(codes, len(images))
        if not torch.equal(codes[:, -1].long(), labels):
            raise InputError("codes: expected those of the labels' classes.")
        with torch.no_grad(), frozen(manifold):
            known = (manifold.decode(codes.to(images)) - images).flatten(1).norm(dim=1)
        own = torch.minimum(own, known)
    return LabelCheck(own < other, by_search, own, other, other_class)


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
