import io

import numpy as np
import pytest
import torch
from PIL import Image

from onmanifold.foundation.errors import InputError
from onmanifold.foundation.pictures import image_grid


def pixels_of(content):
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "PNG"
        return np.asarray(image)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_image_stands_at_its_place(channels, dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 256, (5, channels, 4, 3), generator=generator)
    found = pixels_of(image_grid(values.to(dtype) / 255, columns=2, scale=3, gap=2))
    # Three rows of images of 12 x 9 pixels, gaps of 2 between and around.
    assert found.shape[:2] == (2 + 3 * 14, 2 + 2 * 11)
    for number in range(5):
        top, left = 2 + number // 2 * 14, 2 + number % 2 * 11
        block = found[top : top + 12, left : left + 9].reshape(12, 9, channels)
        expected = values[number].permute(1, 2, 0).numpy().repeat(3, 0).repeat(3, 1)
        assert np.array_equal(block, expected)
    ground = {tuple(np.atleast_1d(place)) for place in (found[0, 0], found[-5, -5], found[15, 3])}
    assert len(ground) == 1


def test_a_row_is_no_wider_than_its_images():
    assert pixels_of(image_grid(torch.zeros(2, 1, 4, 4), 10, scale=1, gap=0)).shape == (4, 8)


def test_gradients_and_the_caller_s_images_stay_out_of_it():
    images = torch.full((1, 1, 2, 2), 0.5, requires_grad=True)
    assert pixels_of(image_grid(images, 1, scale=1, gap=0)).tolist() == [[128, 128]] * 2
    assert images.tolist() == [[[[0.5, 0.5]] * 2]]


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (torch.zeros(0, 1, 4, 4), {}, "at least one"),
        (torch.zeros(2, 2, 4, 4), {}, "1 or 3 channels"),
        (torch.full((1, 1, 4, 4), 1.5), {}, r"\[0, 1\]"),
        (torch.full((1, 1, 4, 4), float("nan")), {}, "NaN"),
        (torch.zeros(1, 1, 4, 4), {"columns": 0}, "columns"),
        (torch.zeros(1, 1, 4, 4), {"scale": 0}, "scale"),
        (torch.zeros(1, 1, 4, 4), {"gap": -1}, "gap"),
    ],
)
def test_what_cannot_be_drawn_is_explained(images, options, message):
    with pytest.raises(InputError, match=message):
        image_grid(images, **{"columns": 2} | options)
