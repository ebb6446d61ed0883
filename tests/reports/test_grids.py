"""Images in rows and columns: each where it belongs, in its own colours."""

import matplotlib as mpl
import numpy as np
import pytest

from onmanifold.foundation.errors import InputError
from onmanifold.reports.drawings.flow_levels import draw_levels
from onmanifold.reports.drawings.grids import (
    Grid,
    Scale,
    as_colours,
    coloured,
    draw_grid,
    overlaid,
)

GENERATOR = np.random.default_rng(0)


def grid(**changes):
    images = GENERATOR.random((2, 3, 4, 5, 3)).astype(np.float32)
    return Grid(**{"images": images, "rows": ["one", "two"], "columns": ["a", "b", "c"]} | changes)


def picture_of(figure):
    return np.asarray(figure.axes[0].images[0].get_array())


def test_each_image_stands_once_in_its_place():
    shown = grid(
        headings=(("first", 1), ("rest", 2)),
        captions=[["x", "y", "z"]] * 2,
        marks=[[None, True, False]] * 2,
        scale=Scale("map", 1.0),
    )
    figure = draw_grid(shown)
    canvas = picture_of(figure)
    assert canvas[..., 3].sum() == 2 * 3 * 4 * 5
    rows, columns = (np.flatnonzero(canvas[..., 3].any(axis=axis)) for axis in (1, 0))
    assert (len(rows), len(columns)) == (8, 15)
    pixels = canvas[np.ix_(rows, columns)][..., :3].reshape(2, 4, 3, 5, 3).swapaxes(1, 2)
    np.testing.assert_array_equal(pixels, shown.images)
    # More space divides the groups of columns than the columns of a group.
    gaps = np.diff(columns)
    assert gaps[4] > gaps[9] > 1
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["first", "rest", *["x", "✗ y", "✓ z"] * 2]
    ticks = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert ticks == ["a", "b", "c"]
    assert figure.axes[1].get_ylabel() == "map"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((2, 3, 4, 5))}, "images: expected"),
        ({"rows": ["one"]}, "rows, columns: expected 2 and 3 names, found 1 and 3"),
        ({"headings": (("all", 2),)}, "headings: expected groups of 3 columns"),
    ],
)
def test_wrong_grids(changes, message):
    with pytest.raises(InputError, match=message):
        grid(**changes)


def test_colours():
    grey = GENERATOR.random((2, 1, 4, 4)).astype(np.float32)
    assert as_colours(grey).shape == (2, 4, 4, 3)
    np.testing.assert_array_equal(as_colours(grey)[..., 2], grey[:, 0])
    colour = GENERATOR.random((3, 4, 4)).astype(np.float32)
    np.testing.assert_array_equal(as_colours(colour)[..., 1], colour[1])
    ends = coloured(np.array([[0.0, 2.0, 9.0]]), Scale("", 2.0, "magma"))[0]
    expected = [mpl.colormaps["magma"](share)[:3] for share in (0.0, 1.0, 1.0)]
    np.testing.assert_allclose(ends, expected, rtol=1e-6)


def test_an_empty_map_is_dark_and_a_full_one_bright():
    image = np.full((1, 2, 2), 0.5, dtype=np.float32)
    maps = np.array([[[0.0, 0.0], [0.0, 0.0]], [[0.0, 3.0], [0.0, 0.0]]], dtype=np.float32)
    empty, spot = overlaid(np.stack([image, image]), maps)
    np.testing.assert_allclose(empty, empty[0, 0].reshape(1, 1, 3) + np.zeros((2, 2, 1)))
    np.testing.assert_allclose(spot[0, 0], empty[0, 0])
    np.testing.assert_allclose(
        spot[0, 1], 0.2 + 0.6 * np.array(mpl.colormaps["magma"](1.0)[:3]), rtol=1e-5
    )


def test_each_difference_has_its_own_scale():
    image = np.zeros((1, 4, 4), dtype=np.float32)
    attacked = np.zeros((2, 2, 1, 4, 4), dtype=np.float32)
    attacked[0, 0], attacked[1, 0], attacked[1, 1] = 0.1, 0.05, 0.001
    figure = draw_levels(image, attacked, ["level 1", "level 2"], (0.02, 0.1))
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts[3:] == [*[""] * 3, "×10", "", *[""] * 3, "×20", "×1,000"]
    canvas = picture_of(figure)
    bright, dark = (np.array(mpl.colormaps["magma"](share)[:3]) for share in (1.0, 0.0))
    # The rightmost column holds the differences at the larger radius: none above, a small one below.
    np.testing.assert_allclose(canvas[0, -1, :3], dark, rtol=1e-5)
    np.testing.assert_allclose(canvas[-1, -1, :3], bright, rtol=1e-5)
