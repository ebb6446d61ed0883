"""Figures of class activation maps: maps over images, and how far they move under attack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from onmanifold.reports.drawings.grids import Grid, Scale, as_colours, draw_grid, overlaid
from onmanifold.reports.figures import COLOURS, FAINT, add_legend, marker_of, new_figure, style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_HEAT = "magma"


@dataclass(frozen=True)
class MapExamples:
    """Images with the maps of several classifiers, clean and under attack.

    Attributes:
        clean: (S, C, H, W) in [0, 1].
        labels: Names of the classes of the images, S.
        images: By method, then by attack, "" standing for no attack: (S, C, H, W).
        maps: The same: (S, H, W), at least 0.
        predictions: The same: the class that the classifier sees, S.
    """

    clean: NDArray[np.float32]
    labels: Sequence[str]
    images: Mapping[str, Mapping[str, NDArray[np.float32]]]
    maps: Mapping[str, Mapping[str, NDArray[np.float32]]]
    predictions: Mapping[str, Mapping[str, Sequence[str]]]


def draw_maps(examples: MapExamples) -> Figure:
    """For each image a row per method: the image, and its maps, clean and under each attack (IJSAT figure 9).

    Each map is laid over the image that the classifier sees, in colours from 0 to the map's own maximum; below
    stands the class that is seen.
    """
    methods, attacks = list(examples.maps), list(next(iter(examples.maps.values())))
    rows, captions, marks, names = [], [], [], []
    for number, label in enumerate(examples.labels):
        for method in methods:
            seen = [examples.predictions[method][attack][number] for attack in attacks]
            pictures = [
                overlaid(
                    examples.images[method][attack][number],
                    examples.maps[method][attack][number],
                    _HEAT,
                )
                for attack in attacks
            ]
            rows.append([as_colours(examples.clean[number]), *pictures])
            captions.append([label, *seen])
            marks.append([None, *(name != label for name in seen)])
            names.append(method)
    grid = Grid(
        np.array(rows, dtype=np.float32),
        names,
        ("image", *(attack or "clean" for attack in attacks)),
        headings=(("", 1), ("map", len(attacks))),
        together=len(methods),
        captions=captions,
        marks=marks,
        scale=Scale("map, as a share of its maximum", 1.0, _HEAT),
    )
    return draw_grid(grid)


def draw_movement(summary: pd.DataFrame) -> Figure:
    """How much maps under each attack have in common with the clean ones, with intervals, for each method.

    Args:
        summary: Columns method, attack, and for cosine and rank each the mean, ``_low`` and ``_high``.
    """
    methods, attacks = (list(dict.fromkeys(summary[name])) for name in ("method", "attack"))
    panels = {"cosine": "cosine similarity", "rank": "rank correlation"}
    with style():
        spread = 0.6 / max(len(methods), 1)
        height = 1.1 + len(attacks) * max(0.42, 0.17 * len(methods))
        figure, panes = new_figure(7.6, height, columns=2)
        for pane, (column, title) in zip(panes, panels.items(), strict=True):
            for number, method in enumerate(methods):
                part = summary[summary.method == method].set_index("attack")
                offset = (number - (len(methods) - 1) / 2) * spread
                means = part[column].to_numpy()
                arms = [means - part[f"{column}_low"], part[f"{column}_high"] - means]
                pane.errorbar(
                    means,
                    [attacks.index(attack) + offset for attack in part.index],
                    xerr=np.clip(np.array(arms), 0, None),
                    fmt=marker_of(number),
                    color=COLOURS[number % len(COLOURS)],
                    markersize=5,
                    elinewidth=1.2,
                    label=method,
                )
            for row in range(1, len(attacks)):
                pane.axhline(row - 0.5, color=FAINT, alpha=0.25, linewidth=0.6)
            pane.set(xlabel=f"{title} with the clean map", ylim=(len(attacks) - 0.5, -0.5))
            pane.set_yticks(
                range(len(attacks)), attacks if pane is panes[0] else [""] * len(attacks)
            )
            pane.set_xlim(min(0.0, pane.get_xlim()[0]), 1.02)
            pane.grid(axis="x")
        add_legend(figure, panes[0])
        return figure
