"""In which directions an attack moves a class: spectra of covariances (Directions, section 5.1, figures 2 and 3).

The eigenvalues of a sample's covariance are biased. The sum of the k largest is a convex function of the
covariance, so that on average it is too large (Jensen); the trace is not biased, so that the rest is too small. Of
n images no more than n - 1 eigenvalues are above 0 at all. A bootstrap sample repeats the bias on top of that of
the sample, and holds only some 63 % of the images: eigenvalues computed anew from bootstrap samples give wrong
intervals where the pixels are not few against the images (El Karoui and Purdom 2019). Two things are done here:

- The bootstrap holds the eigenvectors fixed. A resampled variance along a fixed direction is a mean, of which the
  bootstrap is sound; and it is how an eigenvalue varies to first order.
- The bias itself is gone where the directions come from other images than those that are measured: the variance
  along directions that do not depend on the sample is unbiased, of clean and of attacked images alike. Take
  `class_directions` of clean images that are set apart, such as the training images of the class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from onmanifold.foundation import randomness
from onmanifold.foundation.checks import check_images, check_labels
from onmanifold.foundation.errors import InputError

# A variance below this share of the largest is the rounding of numbers that are 0.
_ROUNDING = 1e-24
# Groups of directions whose ratios are told apart, at most.
_GROUPS = 32


class ClassSpectra(NamedTuple):
    """The spectra of the covariances of classes.

    Attributes:
        labels: (K,) int64, the classes that occur, in order.
        counts: (K,) int64, images of each.
        eigenvalues: (K, D) float64, the largest first, in squared units of pixels; D = C · H · W. Of n images the
            eigenvalues beyond n - 1 are 0.
    """

    labels: Tensor
    counts: Tensor
    eigenvalues: Tensor


@dataclass(frozen=True)
class VarianceComparison:
    """The variance of attacked images, direction by direction, against that of the clean ones.

    An interval is a row (value, low, high). Those of classes are in order, and one for all of them is last: of the
    covariances' mean over the classes.

    Attributes:
        labels: (K,) int64, the classes.
        counts: (K,) int64, pairs of images of each.
        clean: (K, D) float64 variance of the clean images along each direction; along their own eigenvectors
            these are their eigenvalues.
        attacked: (K, D) that of the attacked ones.
        ratios: "leading", "rest" and "all": (K + 1, 3), the sum of the attacked variances along these directions
            over that of the clean ones. "contrast": the ratio of the rest over that of the leading.
        added: "leading" and "rest": (K + 1, 3), attacked less clean variance along these directions, as a share
            of the clean variance in all. "difference": that of the rest less that of the leading.
        groups: (G + 1,) int64, where groups of directions begin, ever larger ones: group g holds those from
            ``groups[g]`` (from 0) up to, and without, ``groups[g + 1]``; the last number is D.
        grouped: (G, 3), the ratio of the sums over each group, for all classes; not finite without clean variance.
    """

    labels: Tensor
    counts: Tensor
    clean: Tensor
    attacked: Tensor
    ratios: Mapping[str, Tensor]
    added: Mapping[str, Tensor]
    groups: Tensor
    grouped: Tensor


def class_spectra(images: Tensor, labels: Tensor) -> ClassSpectra:
    """The eigenvalues of the covariance of each class, computed in float64.

    Args:
        images: (B, C, H, W) in [0, 1].
        labels: (B,) int64; two images at least of each class that occurs.

    Raises:
        InputError: Something is of the wrong type, shape or range, or a class has one image.
    """
    found, rows = _by_class(check_images(images), labels)
    values = torch.stack([_eigenvalues(part) for part in rows])
    return ClassSpectra(found, torch.tensor([len(part) for part in rows]), values)


def class_directions(images: Tensor, labels: Tensor) -> Tensor:
    """The eigenvectors of the covariance of each class: (K, D, D) float64, a row each, largest eigenvalue first.

    Args:
        images: (B, C, H, W) in [0, 1].
        labels: (B,) int64; two images at least of each class that occurs.

    Returns:
        An orthonormal basis of each class that occurs, in order: K · D² numbers, for ten classes of CIFAR 755 MB.
        Beyond the rank of the covariance it is any.

    Raises:
        InputError: As for `class_spectra`.
    """
    return torch.stack([_directions(part) for part in _by_class(check_images(images), labels)[1]])


def compare_variances(
    clean: Tensor,
    attacked: Tensor,
    labels: Tensor,
    directions: Tensor | None = None,
    *,
    leading: int = 30,
    draws: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> VarianceComparison:
    """Compare the variances of clean and attacked images along directions, with bootstrap intervals.

    Pairs of images are resampled within their class; directions stay (see above).

    Args:
        clean: (B, C, H, W) in [0, 1].
        attacked: (B, C, H, W), row by row made from the clean ones.
        labels: (B,) int64; two images at least of each class that occurs.
        directions: (K, D, D) of the classes that occur, as `class_directions` gives them for other images. None:
            each set's own eigenvectors, so that eigenvalues are compared in order of their size.
        leading: How many directions count as leading, in [1, D).
        draws: Bootstrap samples; 0: no intervals, their ends are NaN.
        seed: Of the bootstrap.
        confidence: Of the intervals, which are percentiles.

    Raises:
        InputError: Something is of the wrong type, shape or range.
    """
    clean, attacked = check_images(clean, "clean"), check_images(attacked, "attacked")
    if clean.shape != attacked.shape:
        raise InputError(
            f"attacked: expected shape {tuple(clean.shape)}, found {tuple(attacked.shape)}."
        )
    found, before = _by_class(clean, labels)
    after = _by_class(attacked, labels)[1]
    size = before[0].shape[1]
    _check_numbers(size, leading, draws, confidence)
    if directions is not None and directions.shape != (len(found), size, size):
        raise InputError(
            f"directions: expected shape {(len(found), size, size)}, found {tuple(directions.shape)}."
        )
    variances = []
    for number, label in enumerate(found.tolist()):
        weights = _weights(len(before[number]), draws, seed, label)
        pair = []
        for rows in (before[number], after[number]):
            axes = _own_directions(rows) if directions is None else directions[number].double()
            pair.append(_variances(rows, axes, weights))
        variances.append(torch.stack(pair))
    counts = torch.tensor([len(rows) for rows in before])
    return _compared(found, counts, torch.stack(variances), leading, confidence)


def _check_numbers(size: int, leading: int, draws: int, confidence: float) -> None:
    if not 1 <= leading < size:
        raise InputError(
            f"leading: expected a number of directions in [1, {size}), found {leading}."
        )
    if draws < 0:
        raise InputError(f"draws: expected at least 0, found {draws}.")
    if not 0 < confidence < 1:
        raise InputError(f"confidence: expected a number in (0, 1), found {confidence}.")


def _by_class(images: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The classes that occur (K,), and the images of each, centred, (n, D) float64."""
    labels = check_labels(labels, len(images)).cpu()
    found, counts = torch.unique(labels, return_counts=True)
    if len(found) == 0 or int(counts.min()) < 2:
        raise InputError("labels: expected at least two images of each class, found fewer.")
    rows = images.detach().cpu().flatten(1).double()
    parts = [rows[labels == label] for label in found]
    return found, [part - part.mean(0) for part in parts]


def _eigenvalues(rows: Tensor) -> Tensor:
    """Of centred images (n, D): (D,), the largest first."""
    count, size = rows.shape
    values = rows.new_zeros(size)
    rank = min(count - 1, size)
    values[:rank] = torch.linalg.svdvals(rows)[:rank].square() / (count - 1)
    return values


def _directions(rows: Tensor) -> Tensor:
    """The eigenvectors of the covariance of centred images (n, D): (D, D), a row each."""
    vectors: Tensor = torch.linalg.eigh(rows.T @ rows)[1]
    return vectors.T.flip(0)


def _own_directions(rows: Tensor) -> Tensor:
    """The same without those along which the images do not vary, where that is faster: (at most D, D)."""
    if len(rows) > rows.shape[1]:
        return _directions(rows)
    vectors: Tensor = torch.linalg.svd(rows, full_matrices=False)[2]
    return vectors


def _weights(count: int, draws: int, seed: int, label: int) -> Tensor:
    """How often each image counts, (1 + draws, count): once in the sample itself, then in bootstrap samples."""
    chosen = randomness.integers(
        seed, torch.arange(draws), count, (count,), stream=f"spectra {label}"
    )
    weights = torch.zeros(1 + draws, count, dtype=torch.float64)
    weights[0] = 1
    weights[1:].scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.float64))
    return weights


def _variances(rows: Tensor, directions: Tensor, weights: Tensor) -> Tensor:
    """The variance of weighted images along each direction, (1 + draws, D); 0 along those that are not given."""
    count, size = rows.shape
    scores = rows @ directions.T
    squares, means = weights @ scores.square() / count, weights @ scores / count
    variances = (squares - means.square()) * (count / (count - 1))
    variances = variances.where(variances > _ROUNDING * variances.max(), 0.0)
    return functional.pad(variances, (0, size - len(directions)))


def _compared(
    labels: Tensor, counts: Tensor, variances: Tensor, leading: int, confidence: float
) -> VarianceComparison:
    """From the variances (K, 2, 1 + draws, D) of classes, clean and attacked, in the sample and the draws."""
    clean, attacked = variances[:, 0], variances[:, 1]
    # The mean covariance of the classes; the ratio of sums is that of means.
    whole = torch.cat([variances, variances.sum(0, keepdim=True)])
    sums = {
        "leading": whole[..., :leading].sum(-1),
        "rest": whole[..., leading:].sum(-1),
        "all": whole.sum(-1),
    }
    ratios = {name: part[:, 1] / part[:, 0] for name, part in sums.items()}
    ratios["contrast"] = ratios["rest"] / ratios["leading"]
    added = {
        name: (sums[name][:, 1] - sums[name][:, 0]) / sums["all"][:, 0]
        for name in ("leading", "rest")
    }
    added["difference"] = added["rest"] - added["leading"]
    groups = _groups(whole.shape[-1])
    widths = groups.diff().tolist()
    pooled = torch.stack([part.sum(-1) for part in torch.split(whole[-1], widths, dim=-1)])
    return VarianceComparison(
        labels,
        counts,
        clean[:, 0],
        attacked[:, 0],
        {name: _interval(values, confidence) for name, values in ratios.items()},
        {name: _interval(values, confidence) for name, values in added.items()},
        groups,
        _interval(pooled[:, 1] / pooled[:, 0], confidence),
    )


def _groups(size: int) -> Tensor:
    """Where groups of directions begin, evenly on a logarithmic axis of their numbers, and their end."""
    edges = torch.logspace(0, math.log10(size + 1), _GROUPS + 1, dtype=torch.float64)
    numbers: Tensor = torch.unique(edges.round().long().clamp(1, size + 1))
    return numbers - 1


def _interval(values: Tensor, confidence: float) -> Tensor:
    """(rows, 1 + draws), of which the first column is the sample's, to (rows, 3): value, low and high."""
    value, drawn = values[:, 0], values[:, 1:]
    if drawn.shape[1] == 0:
        low = high = torch.full_like(value, torch.nan)
    else:
        ends = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=values.dtype)
        low, high = torch.quantile(drawn, ends, dim=1)
    return torch.stack([value, low, high], dim=1)
