"""Lines in latent space: their ends are decoded codes, they stay in the box, and lengths are what they say."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onmanifold.analysis import principal_directions, traverse
from onmanifold.foundation.errors import InputError
from onmanifold.manifolds.base import Manifold
from onmanifold.manifolds.fonts import fonts_manifold

GENERATOR = torch.Generator().manual_seed(0)


class Linear(Manifold):
    """Pixels 1/2 + W z; with a box or without; a third column of a code never moves."""

    name, exact, fingerprint = "linear", True, "linear"
    code_size, latent_size, image_shape = 3, 2, (1, 2, 2)

    def __init__(self, box=None):
        super().__init__()
        self.box = box
        self.register_buffer("weight", torch.tensor([[0.1, 0.0, 0.0, 0.0], [0.0, 0.03, 0.0, 0.04]]))

    def encode(self, images, labels):
        raise NotImplementedError

    def decode(self, codes):
        shifted = 0.5 + codes[:, :2] @ self.weight + 0.01 * codes[:, 2:]
        return shifted.view(-1, 1, 2, 2)


def codes_of(count=4):
    return 0.5 * torch.randn(count, 3, generator=GENERATOR)


def test_ends_are_decoded_codes_and_steps_are_even():
    manifold, codes = Linear(), codes_of()
    directions = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    found = traverse(manifold, codes, directions, steps=5)
    assert found.offsets.shape == (2, 4, 5)
    assert found.images.shape == (2, 4, 5, 1, 2, 2)
    units = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    for number, unit in enumerate(units):
        for step, offset in enumerate((-2.0, -1.0, 0.0, 1.0, 2.0)):
            moved = codes.clone()
            moved[:, :2] += offset * unit
            torch.testing.assert_close(found.images[number, :, step], manifold.decode(moved))
            torch.testing.assert_close(
                found.offsets[number, :, step], torch.full((4,), offset), atol=1e-6, rtol=0
            )


def test_change_per_unit_is_the_length_of_the_image_of_a_unit():
    found = traverse(Linear(), codes_of(), torch.eye(2), steps=7)
    for values in (found.change, found.rate):
        torch.testing.assert_close(values[0], torch.full((4,), 0.1).double(), atol=1e-4, rtol=0)
        torch.testing.assert_close(values[1], torch.full((4,), 0.05).double(), atol=1e-4, rtol=0)


@given(
    start=st.tuples(*[st.floats(-1.5, 1.5)] * 2),
    angle=st.floats(0, 2 * math.pi),
    span=st.none() | st.floats(0.01, 3),
)
def test_lines_end_at_the_box_or_at_the_span(start, angle, span):
    codes = torch.tensor([[*start, 0.5]])
    direction = torch.tensor([[math.cos(angle), math.sin(angle)]])
    found = traverse(Linear(box=1.0), codes, direction, steps=3, span=span)
    inside = codes[0, :2].clamp(-1, 1)
    ends = inside + found.offsets[0, 0, [0, -1]].unsqueeze(1) * direction
    assert ends.abs().max() <= 1 + 1e-5
    for end, offset in zip(ends, found.offsets[0, 0, [0, -1]], strict=True):
        at_side = math.isclose(end.abs().max().item(), 1, abs_tol=1e-5)
        at_span = span is not None and math.isclose(abs(offset.item()), span, rel_tol=1e-5)
        assert at_side or at_span
    assert found.offsets[0, 0, 0] <= 0 <= found.offsets[0, 0, -1]


def test_a_line_without_length_says_nothing():
    corner = torch.tensor([[1.0, 1.0, 0.0]])
    found = traverse(Linear(box=1.0), corner, torch.tensor([[1.0, -1.0]]), steps=3)
    assert found.offsets.abs().max() == 0
    assert found.change.isnan().all()
    assert found.rate.isnan().all()


def test_letters():
    manifold = fonts_manifold()
    codes = manifold.sample_codes(torch.arange(5), seed=1)
    found = traverse(manifold, codes, torch.eye(6), steps=4)
    for number in range(6):
        for step, value in ((0, -1.0), (3, 1.0)):
            moved = codes.clone()
            moved[:, number] = value
            # Offsets are rounded; a letter's pixels move by at most some ten times as much.
            torch.testing.assert_close(
                found.images[number, :, step], manifold.decode(moved), atol=1e-4, rtol=0
            )
    assert (found.rate > 0).all()


def test_the_batch_size_and_the_manifold_do_not_change():
    manifold, codes = fonts_manifold().train(), codes_of(1)
    codes = manifold.sample_codes(torch.arange(3), seed=2)
    one = traverse(manifold, codes, torch.eye(6), batch_size=1)
    other = traverse(manifold, codes, torch.eye(6))
    assert torch.equal(one.images, other.images)
    assert manifold.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codes": torch.zeros(2, 2)}, "codes: expected a float tensor"),
        ({"directions": torch.eye(3)}, "directions: expected"),
        ({"directions": torch.zeros(1, 2)}, "lengths > 0"),
        ({"steps": 1}, "steps: expected at least 2"),
        ({"span": 0.0}, "span: expected a number > 0"),
    ],
)
def test_wrong_arguments(arguments, message):
    given_arguments = {"codes": codes_of(), "directions": torch.eye(2), **arguments}
    with pytest.raises(InputError, match=message):
        traverse(Linear(), **given_arguments)


def test_principal_directions_are_those_of_the_covariance():
    scales = torch.tensor([0.1, 3.0, 1.0, 0.5])
    turn = torch.linalg.qr(torch.randn(4, 4, generator=GENERATOR))[0]
    codes = (torch.randn(500, 4, generator=GENERATOR) * scales) @ turn
    found = principal_directions(codes, 3)
    vectors = torch.linalg.eigh(torch.cov(codes.T)).eigenvectors
    expected = vectors.T.flip(0)[:3]
    torch.testing.assert_close((found * expected).sum(1).abs(), torch.ones(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(found @ found.T, torch.eye(3), atol=1e-5, rtol=0)
    assert (found.gather(1, found.abs().argmax(1, keepdim=True)) > 0).all()
    with pytest.raises(InputError, match="count: expected 1 to 4"):
        principal_directions(codes, 5)
