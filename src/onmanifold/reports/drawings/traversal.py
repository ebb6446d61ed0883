"""Figures of latent traversals: images along lines, and how much they change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from onmanifold.reports.drawings.grids import Grid, as_colours, draw_grid
from onmanifold.reports.figures import COLOURS, FAINT, add_legend, marker_of, new_figure, style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def draw_traversal(
    image: NDArray[np.float32],
    reconstruction: NDArray[np.float32],
    lines: NDArray[np.float32],
    directions: Sequence[str],
    offsets: NDArray[np.float32],
) -> Figure:
    """A row for each direction: the image, the image of its code, and those along the line through the code.

    Args:
        image: (C, H, W) in [0, 1].
        reconstruction: (C, H, W), decoded from the image's code.
        lines: (D, S, C, H, W).
        directions: D names.
        offsets: (D, S) distances from the code; they stand below the images.
    """
    count = lines.shape[1]
    fixed = np.broadcast_to(
        np.stack([as_colours(image), as_colours(reconstruction)]),
        (len(directions), 2, *as_colours(image).shape),
    )
    captions = [["", "", *map(_signed, row)] for row in offsets.tolist()]
    grid = Grid(
        np.concatenate([fixed, as_colours(lines)], axis=1),
        directions,
        ("image", "its code", *[""] * count),
        headings=(("", 2), ("distance from the code, in units of latents", count)),
        captions=captions,
    )
    return draw_grid(grid)


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−") if abs(value) >= 0.05 else "0.0"


def draw_changes(table: pd.DataFrame) -> Figure:
    """How much the image changes per unit of latent, for each direction: along the line, and at the code.

    Args:
        table: Columns direction, and for change and rate each the mean, ``_low`` and ``_high``.
    """
    names = {"change": "along the whole line", "rate": "at the code"}
    rows = np.arange(len(table))
    with style():
        figure, axes = new_figure(6.4, 0.9 + 0.3 * len(table))
        for number, (column, label) in enumerate(names.items()):
            means = table[column].to_numpy()
            arms = np.array([means - table[f"{column}_low"], table[f"{column}_high"] - means])
            axes.errorbar(
                means,
                rows + 0.24 * (number - 0.5),
                xerr=np.clip(arms, 0, None),
                fmt=marker_of(number),
                color=COLOURS[number],
                markersize=5,
                elinewidth=1.2,
                label=label,
            )
        for row in rows[1:]:
            axes.axhline(row - 0.5, color=FAINT, alpha=0.25, linewidth=0.6)
        axes.set(xlabel="l2 change of the image per unit of latent", ylim=(len(table) - 0.5, -0.5))
        axes.set_yticks(rows, table["direction"])
        axes.set_xlim(left=0)
        axes.grid(axis="x")
        add_legend(figure, axes)
        return figure
