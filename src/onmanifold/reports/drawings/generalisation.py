"""Robustness beside generalisation, and attacks that transfer (Disentangling figures 5 to 8, 12, 13, 15, 16)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onmanifold.reports import figures

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

    from onmanifold.analysis.generalisation import Correlation, Relation

Points = Sequence[tuple[int, float]]
"""Number of training images and a share in [0, 1], a pair for each training."""

_COLUMNS = 3
_PANEL = (3.1, 2.7)
_LEGEND = 0.4


def draw_by_size(panels: Mapping[str, Mapping[str, Points]]) -> Figure:
    """Shares against the number of training images: a panel for each quantity, a line for each method.

    The lines are means over the trainings of each size, which are the faint points (Disentangling figures 5 to 8,
    top and left).

    Args:
        panels: For each quantity, such as "test error", and each method its trainings.
    """
    with figures.style():
        figure, panes = _panes(len(panels))
        for pane, (title, methods) in zip(panes, panels.items(), strict=True):
            for number, (method, points) in enumerate(methods.items()):
                colour = figures.COLOURS[number % len(figures.COLOURS)]
                marker = figures.marker_of(number)
                sizes, shares = _columns(points)
                pane.scatter(sizes, 100 * shares, s=14, marker=marker, color=colour, **_FAINT)
                found, means = _means(sizes, shares)
                pane.plot(
                    found,
                    100 * means,
                    marker=marker,
                    markersize=5,
                    color=colour,
                    linestyle=figures.DASHES[number % len(figures.DASHES)],
                    linewidth=1.5,
                    label=method,
                )
            _size_axis(pane, [size for points in methods.values() for size, _ in points])
            pane.set(title=title, ylabel="share of images (%)", ylim=(-4, 104))
            pane.grid()
        figures.add_legend(figure, panes[0])
        return figure


def draw_relations(panels: Mapping[str, Mapping[str, Relation]], pooled: str = "") -> Figure:
    """Success rate against test error: a panel for each attack, with regression lines and their bands.

    Faint points are trainings, strong ones means over the trainings of each size, a band is the interval of the
    line's height (Disentangling figures 5 to 8, bottom and right; 12, 13, 15, 16).

    Args:
        panels: For each attack and method the relation, from `relate`.
        pooled: Name of the relation over all methods: its correlation stands above the panel.
    """
    from matplotlib.ticker import MaxNLocator

    with figures.style():
        figure, panes = _panes(len(panels), heading=0.2)
        for pane, (title, relations) in zip(panes, panels.items(), strict=True):
            methods = {name: item for name, item in relations.items() if name != pooled}
            for number, (method, relation) in enumerate(methods.items()):
                _cloud(pane, number, method, relation)
            if pooled in relations:
                words = f"{pooled}: {_words(relations[pooled].pearson)}"
                above: dict[str, Any] = {
                    "xytext": (0, 4),
                    "textcoords": "offset points",
                    "ha": "center",
                }
                pane.annotate(words, (0.5, 1), xycoords="axes fraction", fontsize=8.5, **above)
            pane.set_title(title, pad=18 if pooled in relations else 6)
            pane.set(xlabel="test error (%)", ylabel="success rate (%)", ylim=(-4, 104))
            pane.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
            pane.grid()
        figures.add_legend(figure, panes[0])
        return figure


def draw_transfer(panels: Mapping[str, pd.DataFrame]) -> Figure:
    """Success rates of transferred attacks: a heat map for each attack, the numbers in percent in its cells.

    Args:
        panels: For each attack a table of success rates in [0, 1]: a row for what the images were made on, a
            column for what they are tried on; NaN where there is nothing. A first row that is no model, such as
            that of white-box attacks, is set apart.
    """
    with figures.style():
        tables = list(panels.values())
        names = [str(name) for table in tables for name in (*table.index, *table.columns)]
        label = 0.06 * max(len(name) for name in names)
        rows, columns = (max(table.shape[axis] for table in tables) for axis in (0, 1))
        panel = (0.5 * columns + label + 0.7, 0.42 * rows + 0.7 * label + 0.9)
        figure, panes = _panes(len(panels), panel, legend=0)
        for pane, (title, table) in zip(panes, panels.items(), strict=True):
            shades = _heat_map(pane, table)
            pane.set(title=title, xlabel="tried on", ylabel="made on")
        bar = figure.colorbar(shades, ax=panes, fraction=0.03, pad=0.02, aspect=25)
        bar.outline.set_visible(False)
        bar.set_label("success rate (%)", fontsize=8)
        bar.ax.tick_params(labelsize=7, width=0.7)
        return figure


def _heat_map(pane: Axes, table: pd.DataFrame) -> AxesImage:
    values = 100 * table.to_numpy(np.float64)
    shades = pane.imshow(values, vmin=0, vmax=100, cmap="cividis", aspect="auto")
    for row, column in np.ndindex(*values.shape):
        value = values[row, column]
        known = not np.isnan(value)
        pane.text(
            column,
            row,
            f"{value:.0f}" if known else "–",
            ha="center",
            va="center",
            fontsize=8.5,
            # Dark writing on light cells: cividis passes middle grey at about 55 %.
            color=figures.INK if value > 55 or not known else "white",
        )
    if table.index[0] not in table.columns:
        pane.axhline(0.5, color="white", linewidth=3)
    pane.set_xticks(range(len(table.columns)), table.columns, rotation=35, ha="right")
    pane.set_yticks(range(len(table.index)), table.index)
    pane.tick_params(length=0)
    for spine in pane.spines.values():
        spine.set_visible(False)
    return shades


_FAINT: dict[str, Any] = {"alpha": 0.35, "linewidths": 0}


def _cloud(pane: Axes, number: int, method: str, relation: Relation) -> None:
    """The trainings of a method, their means by size, and their line."""
    colour, marker = figures.COLOURS[number % len(figures.COLOURS)], figures.marker_of(number)
    errors, rates = 100 * relation.errors, 100 * relation.rates
    pane.scatter(errors, rates, s=14, marker=marker, color=colour, **_FAINT)
    _, means = _means(relation.sizes, rates)
    _, places = _means(relation.sizes, errors)
    pane.plot(
        places,
        means,
        linestyle="none",
        marker=marker,
        markersize=5,
        color=colour,
    )
    dash = figures.DASHES[number % len(figures.DASHES)]
    # The legend shows line and marker together.
    pane.plot([], [], color=colour, marker=marker, markersize=5, linestyle=dash, label=method)
    if np.isnan(relation.line.slope):
        return
    along = np.linspace(relation.errors.min(), relation.errors.max(), 60)
    low, high = relation.line.band(along)
    look = {"color": colour, "linewidth": 1.3, "linestyle": dash}
    pane.plot(100 * along, 100 * relation.line.at(along), **look)
    pane.fill_between(
        100 * along,
        100 * np.clip(low, 0, 1),
        100 * np.clip(high, 0, 1),
        color=colour,
        alpha=0.15,
        linewidth=0,
    )


def _words(correlation: Correlation) -> str:
    if np.isnan(correlation.coefficient):
        return "r not defined"
    low, high = correlation.low, correlation.high
    text = f"r = {correlation.coefficient:.2f} [{low:.2f}, {high:.2f}]"
    return text.replace("-", "\N{MINUS SIGN}")


def _panes(
    count: int,
    panel: tuple[float, float] = _PANEL,
    legend: float = _LEGEND,
    heading: float = 0.0,
) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, at most three beside each other."""
    from matplotlib.figure import Figure

    columns = min(count, _COLUMNS)
    rows = -(-count // columns)
    width, height = columns * panel[0] + 0.3, rows * (panel[1] + heading) + legend
    figure = Figure(figsize=(width, height), layout="constrained")
    panes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for pane in panes[count:]:
        pane.remove()
    return figure, panes[:count]


def _size_axis(pane: Axes, sizes: Sequence[int]) -> None:
    """Numbers of training images, in equal steps for equal factors, each with its own tick."""
    from matplotlib.ticker import NullLocator

    ticks = sorted(set(sizes))
    pane.set_xscale("log")
    pane.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=30, ha="right", fontsize=8)
    pane.xaxis.set_minor_locator(NullLocator())
    pane.set_xlabel("training images")


def _columns(points: Points) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    sizes = np.array([size for size, _ in points], dtype=np.int64)
    return sizes, np.array([share for _, share in points], dtype=np.float64)


def _means(
    sizes: npt.NDArray[np.int64], values: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The sizes that occur, ascending, and the mean value of each."""
    found = np.unique(sizes)
    return found, np.array([values[sizes == size].mean() for size in found])
