"""Classifiers of points of the plane: their values on a grid, and what perturbations do to a set of points.

A point (x, y) is an image (1, 1, 2) of two pixels, such as `onmanifold.load_dataset("two_moons")` gives (ATLD,
figures 1, 4, 6 and 7).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from onmanifold.attacks.engine import untouched
from onmanifold.foundation.checks import check_images, check_labels
from onmanifold.foundation.errors import InputError

# Points whose distances to the reference points are held at once.
_ROWS = 1024
# Differences themselves and no products of matrices, whose rounding is that of the largest distance.
_EXACT = "donot_use_mm_for_euclid_dist"


class Grid(NamedTuple):
    """What a classifier says on a grid of points.

    Attributes:
        across: (R,) the first coordinate of the points.
        up: (R,) the second.
        logits: (R, R, K) at [second, first].
    """

    across: Tensor
    up: Tensor
    logits: Tensor


class Perturbed(NamedTuple):
    """What a perturbation does to each point.

    Attributes:
        length: (B,) L2 length of the perturbation.
        cosine: (B,) of the angle between it and the gradient of the cross-entropy at the clean point; NaN where
            either is 0.
        crosses: (B,) bool, whether the classifier sees another class than before.
        strays: (B,) bool, whether the nearest of the reference points is of another class than the point's.
        distance: (B,) L2 distance to the nearest reference point of the point's class.
    """

    length: Tensor
    cosine: Tensor
    crosses: Tensor
    strays: Tensor
    distance: Tensor


def grid_logits(
    model: nn.Module,
    low: tuple[float, float] = (0.0, 0.0),
    high: tuple[float, float] = (1.0, 1.0),
    resolution: int = 200,
) -> Grid:
    """The logits of a classifier of points on a grid.

    Args:
        model: Images (B, 1, 1, 2) in [0, 1] to logits (B, K); it is left as it was.
        low: The lower left corner, in [0, 1].
        high: The upper right one.
        resolution: R, points along each axis, at least 2.

    Raises:
        InputError: The corners or the resolution make no grid.
    """
    if resolution < 2:
        raise InputError(f"resolution: expected at least 2, found {resolution}.")
    if not all(0 <= start < end <= 1 for start, end in zip(low, high, strict=True)):
        raise InputError(f"low, high: expected corners in [0, 1], found {low} and {high}.")
    parameter = next(model.parameters())
    across, up = (
        torch.linspace(start, end, resolution, dtype=parameter.dtype, device=parameter.device)
        for start, end in zip(low, high, strict=True)
    )
    points = torch.stack(torch.meshgrid(across, up, indexing="xy"), dim=-1)
    with untouched(model), torch.no_grad():
        logits = model(points.reshape(-1, 1, 1, 2))
    return Grid(across, up, logits.view(resolution, resolution, -1))


def margins(logits: Tensor) -> Tensor:
    """By how much each class's logit exceeds the largest of the others, (..., K); 0 on a class's boundary."""
    largest = logits.topk(2, dim=-1).values
    others = torch.where(logits == largest[..., :1], largest[..., 1:], largest[..., :1])
    return logits - others


def measure_perturbation(
    model: nn.Module,
    images: Tensor,
    perturbed: Tensor,
    labels: Tensor,
    reference: Tensor,
    reference_labels: Tensor,
) -> Perturbed:
    """Measure what a perturbation does to each point, against a classifier and against clean points.

    The nearest of many clean points that are neither trained on nor perturbed stands for the data's manifold: it
    knows no classifier.

    Args:
        model: Images (B, C, H, W) to logits (B, K); it is left as it was.
        images: (B, C, H, W) in [0, 1], clean.
        perturbed: (B, C, H, W) in [0, 1], row by row.
        labels: (B,) int64.
        reference: (N, C, H, W) in [0, 1], clean points of all classes that occur.
        reference_labels: (N,) int64.

    Raises:
        InputError: Something is of the wrong type, shape or range, or a class has no reference point.
    """
    images, perturbed = check_images(images), check_images(perturbed, "perturbed")
    reference = check_images(reference, "reference")
    check_labels(labels, len(images))
    check_labels(reference_labels, len(reference), name="reference_labels")
    if perturbed.shape != images.shape or reference.shape[1:] != images.shape[1:]:
        raise InputError(
            f"perturbed, reference: expected images {tuple(images.shape)} and (N, "
            f"{tuple(images.shape[1:])}), found {tuple(perturbed.shape)} and {tuple(reference.shape)}."
        )
    missing = set(labels.tolist()) - set(reference_labels.tolist())
    if missing:
        raise InputError(f"reference_labels: expected points of every class, none of {missing}.")
    moves = (perturbed - images).flatten(1)
    with untouched(model):
        with torch.no_grad():
            after = model(perturbed).argmax(1)
        with torch.enable_grad():
            leaf = images.detach().requires_grad_()
            logits = model(leaf)
            loss = functional.cross_entropy(logits, labels, reduction="sum")
            (gradients,) = torch.autograd.grad(loss, leaf)
    strays, distance = _beside(perturbed, labels, reference, reference_labels)
    return Perturbed(
        moves.norm(dim=1),
        _cosine(moves, gradients.flatten(1)),
        after != logits.argmax(1),
        strays,
        distance,
    )


def distribution_shift(first: Tensor, second: Tensor, labels: Tensor) -> float:
    """How far the classes of a set of points have moved as sets: the 2-Wasserstein distance, of their mean square.

    Each class is matched to where it has moved in the best way, so that points that only trade places have not
    moved at all. It is at most the root mean square of the lengths of the moves, and reaches it where the points
    move together.

    Args:
        first: (B, C, H, W).
        second: (B, C, H, W), of which the same labels hold.
        labels: (B,) int64.

    Raises:
        InputError: The shapes differ.
    """
    from scipy.optimize import linear_sum_assignment

    if first.shape != second.shape or len(labels) != len(first) or len(first) == 0:
        raise InputError(
            f"second, labels: expected {tuple(first.shape)} and ({len(first)},), found "
            f"{tuple(second.shape)} and {tuple(labels.shape)}."
        )
    total = 0.0
    for label in torch.unique(labels):
        rows = labels == label
        one, two = (part[rows].detach().cpu().flatten(1).double() for part in (first, second))
        costs = torch.cdist(one, two, compute_mode=_EXACT).square().numpy()
        total += float(costs[linear_sum_assignment(costs)].sum())
    return float((total / len(first)) ** 0.5)


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    """Of rows (B, D); NaN where one is 0. Each is scaled first: gradients of sure classifiers are tiny."""
    largest = [rows.abs().amax(1, keepdim=True) for rows in (first, second)]
    units = [
        functional.normalize(rows / top, dim=1)
        for rows, top in zip((first, second), largest, strict=True)
    ]
    return (units[0] * units[1]).sum(1)


def _beside(
    points: Tensor, labels: Tensor, reference: Tensor, reference_labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Whether the nearest reference point is of another class, and the distance to that of the own one, (B,)."""
    strays, distances = [], []
    for rows in torch.split(torch.arange(len(points), device=points.device), _ROWS):
        found = torch.cdist(
            points[rows].flatten(1),
            reference.flatten(1),
            compute_mode=_EXACT,
        )
        strays.append(reference_labels[found.argmin(1)] != labels[rows])
        own = labels[rows].unsqueeze(1) == reference_labels
        distances.append(found.masked_fill(~own, torch.inf).amin(1))
    return torch.cat(strays), torch.cat(distances)
