"""Affine transformations of images: the matrix of Disentangling eq. 6, and the bilinear warp."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# Values of one chunk of a large batch on the CPU; beyond it the grid and the images leave the caches, and
# the same work takes three times as long.
_CHUNK = 2**19


def affine_matrix(parameters: Tensor) -> Tensor:
    """The matrix (B, 2, 3) of translation, shear, scale and rotation (Disentangling eq. 6).

    Args:
        parameters: (B, 6): t_x, t_y, shear_x, shear_y, scale, rotation in radians; the identity is
            (0, 0, 0, 0, 1, 0). The unit of translations is half the image's width or height.
    """
    # Contiguous columns: the sine of strided values is another routine, and may differ in the last bit.
    tx, ty, shear_x, shear_y, scale, rotation = parameters.T.contiguous().unbind(0)
    cos, sin = rotation.cos() * scale, rotation.sin() * scale
    entries = [
        *(cos - sin * shear_x, -sin + cos * shear_x, tx),
        *(cos * shear_y + sin, -sin * shear_y + cos, ty),
    ]
    return torch.stack(entries, dim=1).view(-1, 2, 3)


def warp(images: Tensor, matrix: Tensor) -> Tensor:
    """Images (B, C, H, W) seen through the matrices (B, 2, 3): bilinear, zero outside, corners aligned.

    The value at position p, in [-1, 1] along both axes, is that of the image at ``matrix @ (p, 1)``.
    All is computed sample by sample, so that a result does not depend on its batch; differentiable in both
    arguments.
    """
    count = max(1, _CHUNK // max(1, images[0].numel())) if len(images) else 1
    if len(images) <= count or images.device.type != "cpu":
        return _warp(images, matrix)
    parts = zip(torch.split(images, count), torch.split(matrix, count), strict=True)
    return torch.cat([_warp(image, entries) for image, entries in parts])


@torch.enable_grad()
def push_warp(images: Tensor, matrix: Tensor, moved: Tensor) -> Tensor:
    """How the warped images (B, C, H, W) move where the matrices (B, 2, 3) move along ``moved`` (B, 2, 3).

    The adjoint of the gradient of `warp` to the matrices; at the seams of the bilinear pieces both take the same
    side. PyTorch has no forward derivative of `grid_sample`, but a pixel depends on its own point alone, so that
    one gradient for each channel gives the slopes of all pixels.
    """
    grid = _grid(matrix, *images.shape[-2:]).to(images.dtype).detach().requires_grad_()
    steps = _grid(moved, *images.shape[-2:]).to(images.dtype)
    found = []
    for channel in torch.split(images, 1, dim=1):
        warped = _sample(channel, grid)
        (slopes,) = torch.autograd.grad(warped.sum(), grid)
        found.append((slopes * steps).sum(-1))
    return torch.stack(found, dim=1)


def _warp(images: Tensor, matrix: Tensor) -> Tensor:
    return _sample(images, _grid(matrix, *images.shape[-2:]).to(images.dtype))


def _sample(images: Tensor, grid: Tensor) -> Tensor:
    return functional.grid_sample(images, grid, padding_mode="zeros", align_corners=True)


def _grid(matrix: Tensor, height: int, width: int) -> Tensor:
    """The points (B, H, W, 2) ``matrix @ (p, 1)`` of all pixels p."""
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    x = torch.linspace(-1, 1, width, dtype=matrix.dtype, device=matrix.device).view(1, -1, 1)
    y = torch.linspace(-1, 1, height, dtype=matrix.dtype, device=matrix.device).view(1, -1, 1)
    along_x, along_y, shift = matrix.view(-1, 1, 2, 3).unbind(-1)
    # Elementwise, where `affine_grid` takes a batched product whose rounding depends on the batch; and as
    # complex numbers, since sums along an axis of two are slow.
    columns = torch.view_as_complex(x * along_x).unsqueeze(1)
    rows = torch.view_as_complex(y * along_y + shift).unsqueeze(2)
    return torch.view_as_real(rows + columns)
