"""Affine transformations of images: the matrix of Disentangling eq. 6, and the bilinear warp."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def affine_matrix(parameters: Tensor) -> Tensor:
    """The matrix (B, 2, 3) of translation, shear, scale and rotation (Disentangling eq. 6).

    Args:
        parameters: (B, 6): t_x, t_y, shear_x, shear_y, scale, rotation in radians; the identity is
            (0, 0, 0, 0, 1, 0).
    """
    tx, ty, shear_x, shear_y, scale, rotation = parameters.unbind(1)
    cos, sin = rotation.cos() * scale, rotation.sin() * scale
    rows = [
        [cos - sin * shear_x, -sin + cos * shear_x, tx],
        [cos * shear_y + sin, -sin * shear_y + cos, ty],
    ]
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)


def warp(images: Tensor, matrix: Tensor) -> Tensor:
    """Images (B, C, H, W) seen through the matrices (B, 2, 3): bilinear, zero outside, corners aligned.

    The grid is computed elementwise, so that a sample's result does not depend on its batch.
    """
    height, width = images.shape[-2:]
    x = torch.linspace(-1, 1, width, dtype=matrix.dtype, device=matrix.device).view(1, 1, -1)
    y = torch.linspace(-1, 1, height, dtype=matrix.dtype, device=matrix.device).view(1, -1, 1)
    entries = matrix.unsqueeze(-1).unsqueeze(-1)
    grid = torch.stack(
        [entries[:, i, 0] * x + entries[:, i, 1] * y + entries[:, i, 2] for i in range(2)], dim=-1
    )
    return functional.grid_sample(images, grid, padding_mode="zeros", align_corners=True)
