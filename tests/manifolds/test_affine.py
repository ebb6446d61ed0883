import math

import pytest
import torch
from torch.nn import functional

from onmanifold.manifolds import affine, affine_matrix, warp

IDENTITY = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0, 0.0]])


def parameters(count, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.2, 0.2, 0.5, 0.5, 0.2, 1.5])
    drawn = (2 * torch.rand(count, 6, generator=generator) - 1) * spread
    return (drawn + torch.tensor([0, 0, 0, 0, 0.95, 0])).to(dtype)


def test_the_matrix_is_that_of_equation_6():
    tx, ty, a, b, s, r = 0.1, -0.2, 0.3, -0.4, 0.9, 0.7
    cos, sin = math.cos(r), math.sin(r)
    expected = [
        [cos * s - sin * s * a, -sin * s + cos * s * a, tx],
        [cos * s * b + sin * s, -sin * s * b + cos * s, ty],
    ]
    found = affine_matrix(torch.tensor([[tx, ty, a, b, s, r]], dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64))


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 8, 5)])
def test_the_identity_changes_nothing(shape):
    images = torch.rand(4, *shape, dtype=torch.float64)
    torch.testing.assert_close(
        warp(images, affine_matrix(IDENTITY.double().expand(4, 6))), images, rtol=0, atol=1e-12
    )


def test_a_quarter_turn_and_a_shift_by_pixels():
    images = torch.rand(1, 2, 7, 7, dtype=torch.float64)
    turned = warp(
        images, affine_matrix(IDENTITY.double() + torch.eye(6).double()[5:] * math.pi / 2)
    )
    torch.testing.assert_close(turned, images.rot90(1, (2, 3)), rtol=0, atol=1e-12)
    # Two thirds of half the width are two of the six intervals between the seven corner-aligned pixels.
    shifted = warp(images, affine_matrix(IDENTITY.double() + torch.eye(6).double()[:1] * 2 / 3))
    expected = functional.pad(images[..., 2:], (0, 2))
    torch.testing.assert_close(shifted, expected, rtol=0, atol=1e-12)


def test_it_is_the_spatial_transformer():
    images, matrix = torch.rand(5, 3, 9, 6).double(), affine_matrix(parameters(5))
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=True)
    expected = functional.grid_sample(images, grid, padding_mode="zeros", align_corners=True)
    torch.testing.assert_close(warp(images, matrix), expected, rtol=0, atol=1e-12)


def test_gradients():
    images = torch.rand(3, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    drawn = parameters(3).requires_grad_()

    def both(image, values):
        return warp(image, affine_matrix(values))

    assert torch.autograd.gradcheck(both, (images, drawn))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_do_not_depend_on_the_batch(dtype, monkeypatch):
    images = torch.rand(37, 1, 28, 28, dtype=dtype)
    drawn = parameters(37, dtype)
    whole = warp(images, affine_matrix(drawn))
    for size in (1, 7):
        pairs = zip(images.split(size), drawn.split(size), strict=True)
        parts = [warp(image, affine_matrix(values)) for image, values in pairs]
        assert torch.equal(torch.cat(parts), whole)
    monkeypatch.setattr(affine, "_CHUNK", 5 * 784)
    assert torch.equal(warp(images, affine_matrix(drawn)), whole)


def test_no_images_are_no_error():
    assert warp(torch.rand(0, 1, 4, 4), affine_matrix(torch.rand(0, 6))).shape == (0, 1, 4, 4)
