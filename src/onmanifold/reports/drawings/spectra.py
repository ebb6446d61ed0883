"""Spectra of clean and attacked images (Directions, figures 2 and 3), and their ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onmanifold.reports.figures import (
    COLOURS,
    DASHES,
    FAINT,
    INK,
    add_legend,
    marker_of,
    new_figure,
    style,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Numbers = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

# Markers on a curve, evenly spaced on the axis.
_MARKS = 8
# Numbers below this share of the largest are rounding, and are not drawn.
_LEAST = 1e-12


def draw_spectra(
    spectra: Mapping[str, Numbers],
    classes: Sequence[str],
    leading: int = 30,
    quantity: str = "eigenvalue",
) -> Figure:
    """A row for each class: the first values of its spectra, and the rest, on a logarithmic scale.

    As Directions figure 2, whose first column, the whole spectrum, is left out.

    Args:
        spectra: For each set of images (K, D), the largest first.
        classes: Names of the K classes.
        leading: How many values the left column holds.
        quantity: What the values are.
    """
    from matplotlib.figure import Figure as Drawn

    with style():
        figure = Drawn(figsize=(8.8, 0.5 + 2.3 * len(classes)), layout="constrained")
        rows = figure.subplots(len(classes), 2, squeeze=False)
        for number, (row, name) in enumerate(zip(rows, classes, strict=True)):
            for pane, part in zip(row, (slice(0, leading), slice(leading, None)), strict=True):
                for place, (label, values) in enumerate(spectra.items()):
                    _curve(pane, values[number], part, place, label)
                pane.set_yscale("log")
                pane.grid()
                pane.margins(x=0.02)
            row[0].set(title=f"{name}: the first {leading}", ylabel=f"{quantity} (pixel²)")
            row[1].set(title=f"{name}: from {leading + 1} on")
        for pane in rows[-1]:
            pane.set_xlabel(f"number of the {quantity}")
        add_legend(figure, rows[0, 0])
        return figure


def draw_all_spectra(
    spectra: Mapping[str, Numbers],
    classes: Sequence[str],
    leading: int = 30,
    quantity: str = "eigenvalue",
) -> Figure:
    """Small multiples: the whole spectra of each class, both axes logarithmic (Directions figure 3).

    Args:
        spectra: For each set of images (K, D), the largest first.
        classes: Names of the K classes.
        leading: Where a line parts the leading values from the rest.
        quantity: What the values are.
    """
    from matplotlib.figure import Figure as Drawn

    columns = min(5, len(classes))
    lines = -(-len(classes) // columns)
    with style():
        figure = Drawn(figsize=(8.8, 0.6 + 1.9 * lines), layout="constrained")
        panes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
        for number, pane in enumerate(panes.flat):
            if number >= len(classes):
                pane.set_axis_off()
                continue
            for place, (label, values) in enumerate(spectra.items()):
                _curve(pane, values[number], slice(None), place, label, spread="log")
            pane.axvline(leading + 0.5, color=FAINT, linewidth=0.8)
            pane.set(title=classes[number], xscale="log", yscale="log")
            pane.grid()
        figure.supxlabel(f"number of the {quantity}", fontsize=9)
        figure.supylabel(f"{quantity} (pixel²)", fontsize=9)
        add_legend(figure, panes[0, 0])
        return figure


def draw_ratios(groups: Integers, ratios: Mapping[str, Numbers], leading: int = 30) -> Figure:
    """The ratio of attacked to clean variance along groups of directions, with its interval.

    Args:
        groups: (G + 1,) where groups begin, from 0, and the end of the last one.
        ratios: For each attack (G, 3): the ratio and the ends of its interval. What is not finite is left out.
        leading: Where a line parts the leading directions from the rest.
    """
    middles = np.sqrt((groups[:-1] + 1.0) * groups[1:])
    with style():
        figure, axes = new_figure(8.8, 3.4)
        for place, (name, values) in enumerate(ratios.items(), start=1):
            shown = np.where(np.isfinite(values) & (values > 0), values, np.nan)
            colour = COLOURS[place % len(COLOURS)]
            axes.fill_between(
                middles, shown[:, 1], shown[:, 2], color=colour, alpha=0.25, linewidth=0
            )
            axes.plot(
                middles,
                shown[:, 0],
                color=colour,
                linestyle=DASHES[place % len(DASHES)],
                marker=marker_of(place),
                markersize=4,
                linewidth=1.4,
                label=name,
            )
        axes.axhline(1, color=INK, linewidth=0.8)
        axes.axvline(leading + 0.5, color=FAINT, linewidth=0.8)
        axes.set(xscale="log", yscale="log", ylabel="attacked / clean variance")
        axes.set_xlabel("number of the direction; the largest clean variance is first")
        axes.grid()
        add_legend(figure, axes)
        return figure


def _curve(
    pane: Axes, values: Numbers, part: slice, place: int, label: str, spread: str = "linear"
) -> None:
    numbers = np.arange(1, len(values) + 1)[part]
    top = np.nanmax(values, initial=0.0)
    shown = np.where(values > _LEAST * top, values, np.nan)[part]
    look: dict[str, Any] = {
        "color": COLOURS[place % len(COLOURS)],
        "linestyle": DASHES[place % len(DASHES)],
        "marker": marker_of(place),
    }
    pane.plot(
        numbers,
        shown,
        markersize=3.5,
        linewidth=1.4,
        markevery=_marked(numbers, np.isfinite(shown), place, spread),
        label=label,
        **look,
    )


def _marked(
    numbers: npt.NDArray[np.int64], drawn: npt.NDArray[np.bool_], place: int, spread: str
) -> list[int]:
    """Where a curve has markers: evenly on its axis, those of several curves side by side."""
    if not drawn.any():
        return []
    last = int(np.flatnonzero(drawn)[-1])
    low, high = float(numbers[0]), float(numbers[last])
    shares = (np.arange(_MARKS) + 0.25 * (1 + place % 4) - 0.2) / _MARKS
    if spread == "log":
        wanted = np.exp(np.log(low) + shares * (np.log(high) - np.log(low)))
    else:
        wanted = low + shares * (high - low)
    found = np.searchsorted(numbers, np.unique(wanted.round().astype(int)))
    return sorted({int(position) for position in found if position <= last})
