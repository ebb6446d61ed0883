"""Figures of attacks on single levels of a flow (IJSAT figure 8)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from onmanifold.reports.drawings.grids import Grid, Scale, as_colours, coloured, draw_grid
from onmanifold.reports.figures import COLOURS, DASHES, add_legend, marker_of, new_figure, style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# Of differences: a few pixels may be brighter than the scale, so that the pattern is seen.
_SHARE = 99.5


def draw_levels(
    image: NDArray[np.float32],
    attacked: NDArray[np.float32],
    levels: Sequence[str],
    radii: Sequence[float],
    captions: Sequence[Sequence[str]] = (),
    marks: Sequence[Sequence[bool]] = (),
) -> Figure:
    """A row for each level: the attacked image at each radius, then what changed, magnified.

    Differences are means over channels. Each has a scale of its own, given by the number below it, since levels
    differ in how much they change: it brings all but the brightest pixels to the range of the colours.

    Args:
        image: (C, H, W) in [0, 1], the image itself.
        attacked: (L, R, C, H, W) in [0, 1].
        levels: L names.
        radii: R numbers.
        captions: For each level and radius a text below the image, such as the class that is seen.
        marks: For each level and radius whether the classifier is fooled.
    """
    differences = np.abs(attacked - image).mean(axis=2)
    tops = np.percentile(differences, _SHARE, axis=(2, 3))
    shown = coloured(differences / np.where(tops > 0, tops, 1.0)[..., None, None], Scale("", 1.0))
    first = as_colours(np.broadcast_to(image, (len(levels), 1, *image.shape)))
    factors = [[f"×{1 / top:,.0f}" if top > 0 else "" for top in row] for row in tops]
    texts = captions or [[""] * len(radii)] * len(levels)
    none: list[bool | None] = [None] * len(radii)
    grid = Grid(
        np.concatenate([first, as_colours(attacked), shown], axis=1),
        levels,
        ["image", *(f"{radius:g}" for radius in (*radii, *radii))],
        headings=(("", 1), ("attacked, radius", len(radii)), ("difference, radius", len(radii))),
        captions=[["", *row, *scales] for row, scales in zip(texts, factors, strict=True)],
        marks=[[None, *row, *none] for row in marks],
    )
    return draw_grid(grid)


def draw_level_measures(table: pd.DataFrame) -> Figure:
    """Success, size and coarseness of the change against the radius, a curve for each level.

    Args:
        table: Columns level, radius, and for success, l2 and frequency each the mean, ``_low`` and ``_high``.
    """
    panels = {
        "success": ("attack success (%)", 100.0),
        "l2": ("l2 distance in pixels", 1.0),
        "frequency": ("mean frequency (cycles per pixel)", 1.0),
    }
    with style():
        figure, panes = new_figure(8.6, 3.0, columns=len(panels))
        for pane, (column, (title, factor)) in zip(panes, panels.items(), strict=True):
            for number, (level, part) in enumerate(table.groupby("level", sort=False)):
                means = factor * part[column].to_numpy()
                arms = [
                    means - factor * part[f"{column}_low"].to_numpy(),
                    factor * part[f"{column}_high"].to_numpy() - means,
                ]
                pane.errorbar(
                    part["radius"],
                    means,
                    yerr=np.clip(np.array(arms), 0, None),
                    marker=marker_of(number),
                    color=COLOURS[number % len(COLOURS)],
                    linestyle=DASHES[number % len(DASHES)],
                    markersize=4.5,
                    linewidth=1.4,
                    elinewidth=1.0,
                    label=str(level),
                )
            pane.set(title=title, xlabel="radius of the latent ball")
            pane.set_xlim(left=0)
            pane.set_ylim(bottom=0)
            pane.grid()
        panes[0].set_ylim(-2, 102)
        add_legend(figure, panes[0])
        return figure
