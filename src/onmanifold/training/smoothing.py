"""Label smoothing: a share of the label's probability is spread over the other classes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from onmanifold.foundation.errors import ConfigError


def check_smoothing(amount: float) -> None:
    """Raises ConfigError unless ``amount`` is a number in [0, 1)."""
    if not 0 <= amount < 1:
        raise ConfigError(f"smoothing: expected a number in [0, 1), found {amount}.")


def smoothed(
    labels: Tensor, num_classes: int, amount: float, dtype: torch.dtype | None = None
) -> Tensor:
    """Distributions over classes: 1 − amount for the label, amount / (K − 1) for each other class.

    This is how the released code of Feature Scattering, and ATLD after it, smooths labels. Elsewhere the amount is
    spread over all classes, the label's included; ``label_smoothing = amount · K / (K − 1)`` of torch's
    cross-entropy is the same as this.

    Args:
        labels: (B,) int64.
        num_classes: K, at least 2.
        amount: In [0, 1); 0: the labels themselves.
        dtype: Of the result; None: the default.

    Returns:
        (B, K).

    >>> smoothed(torch.tensor([1]), 3, 0.5)
    tensor([[0.2500, 0.5000, 0.2500]])
    """
    others = torch.full(
        (len(labels), num_classes), amount / (num_classes - 1), dtype=dtype, device=labels.device
    )
    return others.scatter(1, labels.unsqueeze(1), 1 - amount)


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, amount: float) -> Tensor:
    """Mean cross-entropy () of logits (B, K) for labels (B,) that are `smoothed`."""
    if amount == 0:
        return functional.cross_entropy(logits, labels)
    return functional.cross_entropy(logits, smoothed(labels, logits.shape[1], amount, logits.dtype))
