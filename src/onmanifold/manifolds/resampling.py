"""Convolutions that double or halve the sides of an image at less than half the cost.

Nearest-neighbour up-sampling followed by a 3x3 convolution is one transposed 4x4 convolution of stride 2, and a
3x3 convolution followed by the mean of 2x2 pixels is one 4x4 convolution of stride 2: 16 products where there
were 36. Progressive growing of GANs (Karras et al. 2018) calls it a fused scale.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def up_kernel(weight: Tensor) -> Tensor:
    """The kernel (I, O, 4, 4) of `up_conv` that does what ``weight`` (O, I, 3, 3) does to the larger image."""
    return _sums_of_neighbours(weight.flip(2, 3)).transpose(0, 1)


def up_conv(features: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    """Features (B, I, H, W) at twice the sides, each pixel repeated, then convolved: (B, O, 2 H, 2 W)."""
    return F.conv_transpose2d(features, kernel, bias, stride=2, padding=1)


def down_conv(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Features (B, I, 2 H, 2 W) convolved with ``weight`` (O, I, 3, 3), then means of 2x2: (B, O, H, W)."""
    return F.conv2d(features, _sums_of_neighbours(weight) / 4, bias, stride=2, padding=1)


def _sums_of_neighbours(weight: Tensor) -> Tensor:
    """Kernels (A, B, 3, 3) convolved with a square of 2x2 ones: (A, B, 4, 4)."""
    # In this memory format the sums are an order of magnitude faster.
    weight = weight.contiguous(memory_format=torch.channels_last)
    return F.avg_pool2d(weight, 2, stride=1, padding=1, divisor_override=1)
