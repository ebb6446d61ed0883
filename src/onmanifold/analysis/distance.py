"""How far images are from a manifold (Disentangling, section 3.2 and appendix C)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from onmanifold.foundation.checks import check_images, check_labels
from onmanifold.foundation.errors import InputError
from onmanifold.manifolds.base import Manifold
from onmanifold.manifolds.project import Encoder, ProjectionConfig, project

# Neighbours chosen in the images' precision and then compared in float64: so many more than wanted.
_SPARE = 16
# Numbers that are held at once: of directions, and of distances to training images.
_NUMBERS = 2**24


class ManifoldDistance(NamedTuple):
    """How far images are from a manifold.

    Attributes:
        distance: (B,) L2 distance of each image to its nearest point.
        points: (B, C, H, W) these points. Those of an affine approximation may leave [0, 1].
    """

    distance: Tensor
    points: Tensor


def distance_by_projection(
    manifold: Manifold,
    images: Tensor,
    labels: Tensor,
    codes: Tensor | None = None,
    *,
    config: ProjectionConfig | None = None,
    encoder: Encoder | None = None,
    batch_size: int = 256,
    seed: int = 0,
    indices: Tensor | None = None,
) -> ManifoldDistance:
    """The L2 distance to a manifold with a generator, by projection (Disentangling eq. 10).

    It is an upper bound, as near as the search comes. The part of the codes that is fixed stays: on FONTS font
    and class of the clean image, as in the paper.

    Args:
        manifold: The generator.
        images: (B, C, H, W) in [0, 1].
        labels: (B,) int64.
        codes: (B, code_size) where the search starts, such as those of the clean images; None: at the mean code.
        config: How to search; None: 100 steps of Adam and 4 restarts, as for FONTS. Its L1 weight must be 0.
        encoder: Another start; see `project`.
        batch_size: Images that are projected at once.
        seed: Of the restarts.
        indices: (B,) int64 sample indices on which the restarts depend; None: 0 to B - 1.

    Raises:
        InputError: Something is of the wrong shape or range, or there is no start.
    """
    images = check_images(images)
    labels = check_labels(labels, len(images))
    if batch_size < 1:
        raise InputError(f"batch_size: expected at least 1, found {batch_size}.")
    indices = torch.arange(len(images), device=images.device) if indices is None else indices
    distances, points = torch.empty_like(images[:, 0, 0, 0]), torch.empty_like(images)
    for rows in torch.split(torch.arange(len(images), device=images.device), batch_size):
        found = project(
            manifold,
            images[rows],
            None if codes is None else codes[rows],
            labels=labels[rows],
            config=config or ProjectionConfig(),
            encoder=encoder,
            seed=seed,
            indices=indices[rows],
        )
        distances[rows], points[rows] = found.distance, found.images
    return ManifoldDistance(distances, points)


def distance_by_neighbours(
    train_images: Tensor,
    images: Tensor,
    k: int = 50,
    centre: Literal["mean", "sample"] = "mean",
    *,
    originals: Tensor | None = None,
    train_labels: Tensor | None = None,
    labels: Tensor | None = None,
) -> ManifoldDistance:
    """The L2 distance to the affine span of the nearest training images (Disentangling eq. 11).

    An image x̃ has neighbours x_1 to x_k in the training set, nearest in L2. With ``centre="sample"`` the
    approximated manifold goes through the clean image x that x̃ was made from, in the directions x_i - x (the
    paper's section 3.2). With ``centre="mean"`` the directions are x_i - x̄, x̄ the mean neighbour; the manifold
    goes through x̄. If ``originals`` are given then too, it goes through x, which makes the distance that of the
    perturbation x̃ - x to the directions (appendix C, eq. 11, for adversarial examples).

    The paper leaves two things open. Which vector stands for a clean image in eq. 11: its perturbation is zero,
    so here the distance of the image itself to the span through x̄ is what ``centre="mean"`` without originals
    gives, to clean and attacked images alike. And whether neighbours share the class: with labels they do.

    Args:
        train_images: (N, C, H, W) in [0, 1].
        images: (B, C, H, W) in [0, 1], of which none is a training image: that would be at distance 0.
        k: Neighbours.
        centre: "mean" or "sample", which needs ``originals``: through the image itself the distance is 0.
        originals: (B, C, H, W) the clean images that ``images`` were made from.
        train_labels: (N,) int64; with ``labels`` neighbours are of the image's class.
        labels: (B,) int64.

    Returns:
        Distances and nearest points, of the images' dtype; the least squares are solved in float64.

    Raises:
        InputError: Wrong shapes or ranges, fewer than k training images (of the class), or no originals.
    """
    images, originals = _checked(train_images, images, originals, k, centre)
    distances, points = torch.empty_like(images[:, 0, 0, 0]), torch.empty_like(images)
    for rows, train in _groups(train_images, len(images), train_labels, labels, k):
        clean = None if originals is None else originals[rows]
        found = _distances(train.to(images), images[rows], clean, k, centre)
        distances[rows], points[rows] = found.distance, found.points
    return ManifoldDistance(distances, points)


def _checked(
    train_images: Tensor, images: Tensor, originals: Tensor | None, k: int, centre: str
) -> tuple[Tensor, Tensor | None]:
    images = check_images(images)
    check_images(train_images, "train_images")
    if train_images.shape[1:] != images.shape[1:]:
        raise InputError(
            f"train_images: expected shape (N, {tuple(images.shape[1:])}), found {tuple(train_images.shape)}."
        )
    if k < 1:
        raise InputError(f"k: expected at least 1, found {k}.")
    if centre not in ("mean", "sample"):
        raise InputError(f"centre: expected 'mean' or 'sample', found {centre!r}.")
    if originals is None and centre == "sample":
        raise InputError(
            "originals: needed with centre='sample', found None; a span through the image itself has distance 0."
        )
    if originals is not None:
        originals = check_images(originals, "originals").to(images)
        if originals.shape != images.shape:
            raise InputError(
                f"originals: expected shape {tuple(images.shape)}, found {tuple(originals.shape)}."
            )
    return images, originals


def _groups(
    train_images: Tensor, count: int, train_labels: Tensor | None, labels: Tensor | None, k: int
) -> list[tuple[Tensor, Tensor]]:
    """Rows of the images with the training images that are candidates: all, or those of the class."""
    if (train_labels is None) != (labels is None):
        raise InputError("labels: expected both train_labels and labels, or neither.")
    if train_labels is None or labels is None:
        groups = [(torch.arange(count), train_images)]
    else:
        check_labels(train_labels, len(train_images), name="train_labels")
        check_labels(labels, count)
        groups = [
            ((labels == label).nonzero().squeeze(1), train_images[train_labels == label])
            for label in torch.unique(labels)
        ]
    fewest = min((len(train) for _, train in groups), default=k)
    if fewest < k:
        raise InputError(f"k: found {k} with only {fewest} training images (of a class).")
    return groups


@torch.no_grad()
def _distances(
    train: Tensor, images: Tensor, originals: Tensor | None, k: int, centre: str
) -> ManifoldDistance:
    flat = train.flatten(1)
    # Half the squared length, less the inner product, orders the training images by distance.
    half_squares = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64).square() / 2
    chunk = max(1, _NUMBERS // max(len(flat), 4 * (k + _SPARE) * flat.shape[1]))
    distances, points = torch.empty_like(images[:, 0, 0, 0]), torch.empty_like(images)
    for rows in torch.split(torch.arange(len(images), device=images.device), chunk):
        wide = images[rows].flatten(1).double()
        neighbours = _neighbours(flat, half_squares, images[rows].flatten(1), k)
        mean = neighbours.mean(1)
        origin = mean if originals is None else originals[rows].flatten(1).double()
        if centre == "mean":
            # The directions add up to zero, so that the last one is in the span of the others.
            directions = neighbours[:, :-1] - mean.unsqueeze(1)
        else:
            directions = neighbours - origin.unsqueeze(1)
        # What is no larger than the rounding of pixels up to 1 is no direction.
        least = torch.finfo(images.dtype).eps * max(flat.shape[1], k)
        residual = _residual(directions, wide - origin, least)
        distances[rows] = residual.norm(dim=1).to(distances)
        points[rows] = (wide - residual).view_as(images[rows]).to(points)
    return ManifoldDistance(distances, points)


def _neighbours(train: Tensor, half_squares: Tensor, images: Tensor, k: int) -> Tensor:
    """The k nearest training images (B, k, D) in float64, nearest first; of equal ones that of lower number."""
    wanted = min(k + _SPARE, len(train))
    order = torch.addmm(half_squares.to(images), images, train.T, alpha=-1)
    rows = order.topk(wanted, dim=1, largest=False).indices.sort(dim=1).values
    inner = (train[rows].double() @ images.double().unsqueeze(2)).squeeze(2)
    nearest = (half_squares[rows] - inner).sort(dim=1, stable=True).indices[:, :k]
    return train[rows.gather(1, nearest)].double()


def _residual(directions: Tensor, vectors: Tensor, least: float) -> Tensor:
    """What is left of vectors (B, D) beside their least squares fit by directions (B, k, D).

    Directions whose part beside the others is below ``least``, or that share of the largest, are dependent.
    """
    columns = directions.mT
    if columns.shape[2] == 0:
        return vectors
    if columns.shape[2] >= columns.shape[1]:
        return _residual_of_any_rank(columns, vectors, least)
    factors, scales = torch.geqrf(columns)
    inside = torch.ormqr(factors, scales, vectors.unsqueeze(2), transpose=True)
    inside[:, : columns.shape[2]] = 0
    residual: Tensor = torch.ormqr(factors, scales, inside).squeeze(2)
    sizes = factors.diagonal(dim1=1, dim2=2).abs()
    longest = directions.norm(dim=2).amax(1, keepdim=True)
    singular = (sizes <= least * longest.clamp(min=1)).any(1)
    if bool(singular.any()):
        residual[singular] = _residual_of_any_rank(columns[singular], vectors[singular], least)
    return residual


def _residual_of_any_rank(columns: Tensor, vectors: Tensor, least: float) -> Tensor:
    basis, sizes, _ = torch.linalg.svd(columns, full_matrices=False)
    used = sizes > least * sizes[:, :1].clamp(min=1)
    basis = basis * used.unsqueeze(1)
    fit = basis @ (basis.mT @ vectors.unsqueeze(2))
    rest: Tensor = vectors - fit.squeeze(2)
    return rest
