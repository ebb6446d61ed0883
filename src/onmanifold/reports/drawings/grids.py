"""Images in rows and columns, with headings over groups of columns and a caption under each image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from onmanifold.foundation.errors import InputError
from onmanifold.reports.figures import INK, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Colours = NDArray[np.float32]
"""Pixels (..., H, W, 3) in [0, 1]."""

# Inches: of the grid at most, and of one image at most.
_WIDTH, _SIDE = 8.2, 0.85
_FOOLED = "#D55E00"


@dataclass(frozen=True)
class Scale:
    """What the colours of some images of a grid mean.

    Attributes:
        label: Of the bar, with the unit.
        top: The value of the brightest colour; the darkest stands for 0.
        colours: Name of a colour map.
    """

    label: str
    top: float
    colours: str = "magma"


@dataclass(frozen=True)
class Grid:
    """Images in rows and columns.

    Attributes:
        images: (R, S, H, W, 3) in [0, 1].
        rows: R names.
        columns: S names.
        headings: Names of groups of columns, with the number of columns of each; empty: no groups.
        together: Number of rows that belong together; more space divides them from the next.
        captions: For each row and column a text below the image; empty: none.
        marks: For each row and column whether the caption tells of a classifier that is fooled (True), or is not
            (False), or of none (None); empty: of none.
        scale: What colours mean, where that is to be said.
    """

    images: Colours
    rows: Sequence[str]
    columns: Sequence[str]
    headings: Sequence[tuple[str, int]] = ()
    together: int = 1
    captions: Sequence[Sequence[str]] = ()
    marks: Sequence[Sequence[bool | None]] = ()
    scale: Scale | None = None

    def __post_init__(self) -> None:
        shape = self.images.shape
        if len(shape) != 5 or shape[4] != 3 or not self.images.size:
            raise InputError(f"images: expected (R, S, H, W, 3), found {shape}.")
        if (len(self.rows), len(self.columns)) != shape[:2]:
            raise InputError(
                f"rows, columns: expected {shape[0]} and {shape[1]} names, found {len(self.rows)} and "
                f"{len(self.columns)}."
            )
        if self.headings and sum(count for _, count in self.headings) != shape[1]:
            raise InputError(
                f"headings: expected groups of {shape[1]} columns, found {self.headings}."
            )


def draw_grid(grid: Grid) -> Figure:
    """All images as one picture, which is far faster to draw and smaller to store than one each."""
    height, width = grid.images.shape[2:4]
    lefts, tops = _places(grid, height, width)
    canvas = np.zeros((tops[-1] + height, lefts[-1] + width, 4), dtype=np.float32)
    for row, top in enumerate(tops):
        for column, left in enumerate(lefts):
            place = canvas[top : top + height, left : left + width]
            place[..., :3], place[..., 3] = grid.images[row, column].clip(0, 1), 1
    unit = min(_SIDE / width, _WIDTH / canvas.shape[1])
    below = 0.17 * bool(grid.captions)
    above = 0.22 * any(grid.columns) * (1 + max(name.count("\n") for name in grid.columns))
    above += 0.24 * bool(grid.headings)
    words = 0.075 * max(map(len, grid.rows), default=0)
    with style():
        figure, axes = new_figure(
            unit * canvas.shape[1] + words + 0.2 + 0.75 * (grid.scale is not None),
            unit * len(canvas) + above + below + 0.15,
        )
        axes.imshow(canvas, interpolation="none", extent=(0, canvas.shape[1], len(canvas), 0))
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelsize=8, pad=3)
        axes.xaxis.tick_top()
        axes.set_xticks([left + width / 2 for left in lefts], grid.columns)
        axes.set_yticks([top + height / 2 for top in tops], grid.rows)
        _write_headings(axes, grid, lefts, width)
        _write_captions(axes, grid, lefts, tops, height, width)
        if grid.scale is not None:
            _add_bar(figure, axes, grid.scale)
        return figure


def _places(grid: Grid, height: int, width: int) -> tuple[list[int], list[int]]:
    """Where columns and rows begin, in pixels of the images."""
    gap, space = max(1, round(0.06 * width)), max(2, round(0.3 * width))
    # A caption needs room that does not depend on how many pixels an image has.
    line = round(0.3 * height) if grid.captions else max(1, round(0.06 * height))
    starts = {0}
    for _, count in grid.headings:
        starts.add(max(starts) + count)
    lefts = [0]
    for column in range(1, len(grid.columns)):
        lefts.append(lefts[-1] + width + (space if column in starts else gap))
    tops = [0]
    for row in range(1, len(grid.rows)):
        apart = grid.together > 1 and row % grid.together == 0
        tops.append(tops[-1] + height + line + (round(0.2 * height) if apart else 0))
    return lefts, tops


def _write_headings(axes: Axes, grid: Grid, lefts: Sequence[int], width: int) -> None:
    first = 0
    lines = max(name.count("\n") + 1 for name in grid.columns) if any(grid.columns) else 0
    for name, count in grid.headings:
        middle = (lefts[first] + lefts[first + count - 1] + width) / 2
        first += count
        axes.annotate(
            name,
            (middle, 0),
            xytext=(0, 6 + 11 * lines),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8.5,
            fontweight="bold",
            annotation_clip=False,
        )


def _write_captions(
    axes: Axes, grid: Grid, lefts: Sequence[int], tops: Sequence[int], height: int, width: int
) -> None:
    for row, texts in enumerate(grid.captions):
        for column, text in enumerate(texts):
            fooled = grid.marks[row][column] if grid.marks else None
            mark = {None: "", True: "✗ ", False: "✓ "}[fooled]
            axes.annotate(
                mark + text,
                (lefts[column] + width / 2, tops[row] + height),
                xytext=(0, -2),
                textcoords="offset points",
                ha="center",
                va="top",
                fontsize=7.5,
                color=_FOOLED if fooled else INK,
                fontweight="bold" if fooled else "normal",
                annotation_clip=False,
            )


def _add_bar(figure: Figure, axes: Axes, scale: Scale) -> None:
    import matplotlib as mpl
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    colours = ScalarMappable(Normalize(0, scale.top), mpl.colormaps[scale.colours])
    bar = figure.colorbar(colours, ax=axes, fraction=0.015, pad=0.02, aspect=30)
    bar.outline.set_visible(False)
    bar.set_label(scale.label, fontsize=8)
    bar.ax.tick_params(labelsize=7, width=0.7)


def as_colours(images: NDArray[np.float32]) -> Colours:
    """Images (..., C, H, W) of one or three channels as pixels (..., H, W, 3)."""
    pixels = np.moveaxis(np.asarray(images, dtype=np.float32), -3, -1)
    return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels[..., :3]


def coloured(values: NDArray[np.float32], scale: Scale) -> Colours:
    """Values (..., H, W), at least 0, in the colours of a scale."""
    import matplotlib as mpl

    shares = np.clip(np.asarray(values) / (scale.top or 1.0), 0, 1)
    return np.asarray(mpl.colormaps[scale.colours](shares)[..., :3], dtype=np.float32)


def overlaid(
    images: NDArray[np.float32], maps: NDArray[np.float32], colours: str = "magma"
) -> Colours:
    """Maps (..., H, W), each brought to a largest value of 1, laid over images (..., C, H, W) in grey."""
    grey = as_colours(images).mean(axis=-1, keepdims=True)
    top = np.asarray(maps).max(axis=(-1, -2), keepdims=True)
    shares = np.asarray(maps) / np.where(top > 0, top, 1.0)
    heat = coloured(shares.astype(np.float32), Scale("", 1.0, colours))
    return np.asarray(0.4 * grey + 0.6 * heat, dtype=np.float32)
