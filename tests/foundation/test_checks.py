import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onmanifold.foundation.checks import check_images, check_labels
from onmanifold.foundation.errors import InputError, OnManifoldError


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_good_images_come_back_as_they_are(dtype):
    images = torch.rand(3, 1, 4, 4, dtype=dtype)
    images[0, 0, 0, :2] = torch.tensor([0.0, 1.0], dtype=dtype)
    checked = check_images(images)
    assert checked.dtype == dtype
    assert torch.equal(checked, images)


def test_rounding_is_clamped_away_without_touching_the_argument():
    images = torch.tensor([-2.98e-8, 0.5, 1 + 1.2e-7, 1]).view(1, 1, 2, 2)
    before = images.clone()
    checked = check_images(images)
    assert torch.equal(checked.flatten(), torch.tensor([0.0, 0.5, 1.0, 1.0]))
    assert torch.equal(images, before)


@given(st.floats(1e-4, 1e6), st.booleans())
@settings(max_examples=30, deadline=None)
def test_anything_beyond_rounding_is_an_error(beyond, above):
    images = torch.full((2, 1, 2, 2), 0.5)
    images[1, 0, 1, 0] = 1 + beyond if above else -beyond
    with pytest.raises(InputError, match=r"^images: expected values in \[0, 1\], found \["):
        check_images(images)


@pytest.mark.parametrize(
    ("images", "parts"),
    [
        ([[0.0]], ["torch.Tensor", "found list"]),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), ["torch.uint8", "Divide by 255"]),
        (torch.zeros(2, 1, 4, 4, dtype=torch.int64), ["floating-point", "torch.int64"]),
        (torch.zeros(4, 4), ["(B, C, H, W)", "(4, 4)"]),
        (torch.full((2, 1, 4, 4), 200.0), ["[0, 1]", "[200, 200]", "[0, 255]", "255"]),
        (torch.full((2, 1, 4, 4), -1.0), ["[0, 1]", "Normalisation", "inside the model"]),
        (torch.full((2, 1, 4, 4), torch.inf), ["[0, 1]", "inf"]),
        (torch.full((2, 1, 4, 4), -torch.inf), ["[0, 1]", "-inf"]),
    ],
)
def test_bad_images(images, parts):
    with pytest.raises(InputError) as caught:
        check_images(images, "examples")
    for part in ["examples:", *parts]:
        assert part in str(caught.value)


def test_one_nan_among_many_is_found_and_counted():
    images = torch.rand(5, 3, 8, 8)
    images[3, 1, 2, 2] = torch.nan
    with pytest.raises(InputError, match="images: 1 values are NaN"):
        check_images(images)


@pytest.mark.parametrize(
    ("labels", "parts"),
    [
        ([0, 1], ["torch.Tensor", "list"]),
        (torch.tensor([0.0, 1.0], dtype=torch.float64), ["torch.int64", "torch.float64"]),
        (torch.tensor([0, 1], dtype=torch.int32), ["torch.int64", "torch.int32"]),
        (torch.tensor([0, 1, 2]), ["(2,)", "(3,)"]),
        (torch.tensor([[0], [1]]), ["(2,)", "(2, 1)"]),
        (torch.tensor([0, 3]), ["label 3", "0 to 2"]),
        (torch.tensor([-1, 1]), ["label -1", "0 to 2"]),
    ],
)
def test_bad_labels(labels, parts):
    with pytest.raises(InputError) as caught:
        check_labels(labels, 2, 3)
    for part in ["labels:", *parts]:
        assert part in str(caught.value)


def test_good_labels():
    labels = torch.tensor([0, 2])
    assert check_labels(labels, 2, 3) is labels
    assert check_labels(torch.tensor([7, -1]), 2) is not None  # without a number of classes
    assert len(check_labels(torch.zeros(0, dtype=torch.int64), 0, 3)) == 0


def test_input_errors_are_value_errors_too():
    assert issubclass(InputError, OnManifoldError)
    assert issubclass(InputError, ValueError)
