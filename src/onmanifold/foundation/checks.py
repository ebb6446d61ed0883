"""Checks at the public entry: each error names the argument, what was found and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

from onmanifold.foundation.errors import InputError

# Float rounding may leave an image a few units in the last place outside [0, 1].
TOLERANCE = 1e-6


def check_images(images: Tensor, name: str = "images") -> Tensor:
    """Check for a float tensor (B, C, H, W) in [0, 1] without NaN; returns it, rounding clamped away.

    Raises:
        InputError: Wrong type, dtype, number of dimensions, range, or a NaN.
    """
    if not isinstance(images, Tensor):
        raise InputError(
            f"{name}: expected a torch.Tensor (B, C, H, W), found {type(images).__name__}."
        )
    if not images.is_floating_point():
        hint = " Divide by 255 first." if images.dtype == torch.uint8 else ""
        raise InputError(f"{name}: expected a floating-point dtype, found {images.dtype}.{hint}")
    if images.dtype not in (torch.float32, torch.float64):
        raise InputError(
            f"{name}: expected torch.float32 or torch.float64, found {images.dtype}. For "
            "speed in bfloat16 keep model and images in float32 and choose the precision of the attack."
        )
    if images.ndim != 4:
        raise InputError(f"{name}: expected shape (B, C, H, W), found {tuple(images.shape)}.")
    if images.numel() == 0:
        return images
    low, high = (value.item() for value in torch.aminmax(images.detach()))
    if low != low or high != high:
        raise InputError(
            f"{name}: {int(images.isnan().sum())} values are NaN; expected numbers in [0, 1]."
        )
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        hint = " They look like [0, 255]: divide by 255." if low >= 0 and 2 < high <= 255 else ""
        if low < 0 and high <= 3:
            hint = " Normalisation belongs inside the model: see onmanifold.Normalize."
        raise InputError(f"{name}: expected values in [0, 1], found [{low:.4g}, {high:.4g}].{hint}")
    return images.clamp(0, 1) if low < 0 or high > 1 else images


def check_labels(
    labels: Tensor, count: int, num_classes: int | None = None, name: str = "labels"
) -> Tensor:
    """Check for an int64 tensor (B,) of class numbers.

    Raises:
        InputError: Wrong type, dtype, shape, or a label outside [0, num_classes).
    """
    if not isinstance(labels, Tensor):
        raise InputError(f"{name}: expected a torch.Tensor (B,), found {type(labels).__name__}.")
    if labels.dtype != torch.int64:
        raise InputError(f"{name}: expected dtype torch.int64, found {labels.dtype}.")
    if tuple(labels.shape) != (count,):
        raise InputError(
            f"{name}: expected shape ({count},), one per image, found {tuple(labels.shape)}."
        )
    if count and num_classes is not None:
        low, high = (int(value) for value in torch.aminmax(labels))
        if low < 0 or high >= num_classes:
            wrong = low if low < 0 else high
            raise InputError(f"{name}: found label {wrong}, expected 0 to {num_classes - 1}.")
    return labels
