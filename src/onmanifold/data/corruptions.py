"""The fifteen corruptions of CIFAR-10-C and ImageNet-C (Hendrycks and Dietterich, ICLR 2019), made on the fly."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from onmanifold.data.corruption_definitions import DEFINITIONS, SMALL, Draw
from onmanifold.data.dataset import Dataset
from onmanifold.foundation.checks import check_images
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.registry import nearest

SEVERITIES = (1, 2, 3, 4, 5)
"""From hardly visible to strong."""

SHORTEST = 16
"""Shortest side of an image that can be corrupted."""

# Values that are worked on at a time; larger batches are cut, which changes nothing but the memory needed.
_PORTION = 2**20
# Raise when a change of these modules changes what comes out: results computed before become old.
_VERSION = 1


CORRUPTIONS = tuple(DEFINITIONS)
"""The names of the corruptions, in the order of the paper: noise, blur, weather, digital."""


def check_corruption(name: str, severity: int) -> None:
    """Check the name and the severity of a corruption.

    Raises:
        InputError: Unknown name (the nearest valid one is shown), or a severity that is not 1, 2, 3, 4 or 5.
    """
    if not isinstance(name, str) or name not in DEFINITIONS:
        raise InputError(f"corruption: unknown name {name!r}.{nearest(str(name), CORRUPTIONS)}")
    check_severity(severity)


def check_severity(severity: int) -> None:
    """Check a severity.

    Raises:
        InputError: It is not 1, 2, 3, 4 or 5.
    """
    if isinstance(severity, bool) or not isinstance(severity, int) or severity not in SEVERITIES:
        raise InputError(f"severity: expected 1, 2, 3, 4 or 5, found {severity!r}.")


def corrupt(
    images: Tensor, name: str, severity: int, seed: int = 0, indices: Tensor | None = None
) -> Tensor:
    """Corrupt images as CIFAR-10-C and ImageNet-C do (Hendrycks and Dietterich, ICLR 2019).

    Images whose longer side has at most 64 pixels get the parameters of CIFAR-10-C, larger ones those of
    ImageNet-C. As with the official files, the images are rounded to 8 bits first and the corrupted ones are cut
    to 8 bits, towards black. What happens to a sample depends on ``seed``, its index, the name and the severity,
    and not on its batch. The frost is drawn, not photographed; everything else follows the official definitions.

    Args:
        images: (B, C, H, W) float32 or float64 in [0, 1], C 1 or 3, H and W at least 16, on any device.
        name: One of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: Of all that is random.
        indices: (B,) int64 identities of the samples; None: 0 to B − 1.

    Returns:
        (B, C, H, W) in [0, 1], multiples of 1/255, of the images' dtype and on their device. Computed on the CPU.

    Raises:
        InputError: Images of another type, shape or range, an unknown name or severity, or wrong indices.

    >>> import torch
    >>> grey = torch.full((1, 1, 28, 28), 0.4)
    >>> float(corrupt(grey, "brightness", 5).mean())  # 0.3 brighter, to 8 bits
    0.698...
    """
    check_corruption(name, severity)
    images = check_images(images)
    if images.shape[1] not in (1, 3) or min(images.shape[2:]) < SHORTEST:
        raise InputError(
            f"images: expected 1 or 3 channels and sides of at least {SHORTEST} pixels, found "
            f"{tuple(images.shape)}."
        )
    count = len(images)
    if indices is None:
        indices = torch.arange(count)
    elif indices.dtype != torch.int64 or tuple(indices.shape) != (count,):
        raise InputError(
            f"indices: expected int64 of shape ({count},), one per image, found {indices.dtype} "
            f"{tuple(indices.shape)}."
        )
    levels, identities = images.detach().cpu(), indices.cpu()
    result = torch.empty_like(levels)
    size = max(1, _PORTION // max(1, levels[:1].numel()))
    for start in range(0, count, size):
        part = slice(start, start + size)
        result[part] = _corrupt_portion(levels[part], name, severity, seed, identities[part])
    return result.to(images.device)


def _corrupt_portion(
    images: Tensor, name: str, severity: int, seed: int, indices: Tensor
) -> Tensor:
    function, small, large = DEFINITIONS[name]
    parameters = (small if max(images.shape[2:]) <= SMALL else large)[severity - 1]
    draw = Draw(seed, indices, f"corruption/{name}/{severity}")
    rounded = np.rint(255 * images.to(torch.float64).numpy()).astype(np.float32) / 255
    corrupted = np.clip(np.asarray(function(rounded, parameters, draw), dtype=np.float64), 0, 1)
    # A whole level that float32 has made a little too small stays what it is.
    levels = np.floor(255 * corrupted + 1e-3)
    return torch.from_numpy(levels).to(images.dtype) / 255


@dataclass(frozen=True)
class Corruption:
    """A corruption as a transform of a dataset's batches; arguments as for `corrupt`."""

    name: str
    severity: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_corruption(self.name, self.severity)

    def __call__(self, images: Tensor, indices: Tensor) -> Tensor:
        return corrupt(images, self.name, self.severity, self.seed, indices)


def corrupted(dataset: Dataset, name: str, severity: int, seed: int = 0) -> Dataset:
    """The dataset with its images corrupted, each time that a batch is read.

    Labels and identities stay. Codes do not: they are no longer those of the images. The fingerprint is another
    one, so that nothing that was computed on the clean images is taken for a result on the corrupted ones.

    Args:
        dataset: Images of 1 or 3 channels, of at least 16 pixels a side.
        name: One of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: Of all that is random; each sample's part depends on its identity too.

    Raises:
        InputError: An unknown name or severity; as `corrupt` for the images, when they are read.
    """
    transform = Corruption(name, severity, seed)
    text = f"{dataset.fingerprint}/corruption/{_VERSION}/{name}/{severity}/{seed}"
    return replace(
        dataset,
        name=f"{dataset.name} {name} {severity}",
        codes=None,
        fingerprint=hashlib.sha256(text.encode()).hexdigest()[:16],
        transforms=(*dataset.transforms, transform),
    )
