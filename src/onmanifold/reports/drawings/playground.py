"""Classifiers of points of the plane, with points and perturbations (ATLD, figures 1, 4, 6 and 7)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onmanifold.reports.figures import COLOURS, INK, marker_of, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Numbers = npt.NDArray[np.floating]
Integers = npt.NDArray[np.int64]
_COLUMNS = 2


@dataclass(frozen=True)
class Boundary:
    """Where a classifier changes its mind, on a grid.

    Attributes:
        across: (R,) first coordinates.
        up: (R,) second coordinates.
        margins: (R, R, K) at [second, first]: by how much each class's logit exceeds the others.
    """

    across: Numbers
    up: Numbers
    margins: Numbers


@dataclass(frozen=True)
class Panel:
    """A part of a figure.

    Attributes:
        points: (N, 2) coordinates.
        labels: (N,) class of each.
        boundary: Of the classifier that the panel is about; its regions are tinted. None: there is none.
        moved: (N, 2) where the points go, for fields of arrows.
    """

    points: Numbers
    labels: Integers
    boundary: Boundary | None = None
    moved: Numbers | None = None


def draw_points(
    panels: Mapping[str, Panel], classes: Sequence[str], reference: Boundary | None = None
) -> Figure:
    """Points over the regions of a classifier, a panel each (ATLD figures 1, 4 and 6).

    Args:
        panels: By their titles.
        classes: Names of the classes.
        reference: A boundary that is drawn dashed in all panels, such as that of the normal classifier.
    """
    return _drawn(panels, classes, reference, _scatter)


def draw_fields(
    panels: Mapping[str, Panel], classes: Sequence[str], reference: Boundary | None = None
) -> Figure:
    """The perturbation of each point as an arrow, of true length (ATLD figure 7).

    Args:
        panels: By their titles; all with ``moved``.
        classes: Names of the classes.
        reference: A boundary that is drawn dashed in all panels.
    """
    return _drawn(panels, classes, reference, _arrows)


def _drawn(
    panels: Mapping[str, Panel],
    classes: Sequence[str],
    reference: Boundary | None,
    draw: Callable[[Axes, Panel, int], None],
) -> Figure:
    from matplotlib.figure import Figure as Drawn
    from matplotlib.lines import Line2D

    columns = min(_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    low, high = _window(panels)
    width = 8.8 if columns > 1 else 5.0
    height = (width - 0.7) / columns * (high[1] - low[1]) / (high[0] - low[0])
    with style():
        figure = Drawn(figsize=(width, 0.8 + lines * (height + 0.25)), layout="constrained")
        panes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
        for pane in panes.flat[len(panels) :]:
            pane.set_axis_off()
        for pane, (title, panel) in zip(panes.flat, panels.items(), strict=False):
            if panel.boundary is not None:
                _regions(pane, panel.boundary)
            if reference is not None:
                _line(pane, reference, dashed=True)
            for number in range(len(classes)):
                draw(pane, panel, number)
            pane.set(title=title, xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
        for pane in panes[-1]:
            pane.set_xlabel("first pixel")
        for pane in panes[:, 0]:
            pane.set_ylabel("second pixel")
        handles: list[Any] = [
            Line2D(
                [],
                [],
                color=COLOURS[number % len(COLOURS)],
                marker=marker_of(number),
                linestyle="",
                label=name,
            )
            for number, name in enumerate(classes)
        ]
        handles.append(Line2D([], [], color=INK, linewidth=1.4, label="boundary"))
        if reference is not None:
            dashes = (0, (3, 2))
            label = "boundary of normal training"
            handles.append(Line2D([], [], color=INK, linewidth=1.0, linestyle=dashes, label=label))
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=8.5)
        return figure


def _window(panels: Mapping[str, Panel]) -> tuple[Numbers, Numbers]:
    """The corners of what all panels show."""
    given = [panel.points for panel in panels.values()]
    given += [panel.moved for panel in panels.values() if panel.moved is not None]
    low = np.min([points.min(0) for points in given], axis=0)
    high = np.max([points.max(0) for points in given], axis=0)
    room = 0.05 * (high - low).max()
    return np.clip(low - room, 0, 1), np.clip(high + room, 0, 1)


def _regions(pane: Axes, boundary: Boundary) -> None:
    from matplotlib.colors import ListedColormap

    seen = boundary.margins.argmax(-1)
    count = boundary.margins.shape[-1]
    tints = ListedColormap([COLOURS[number % len(COLOURS)] for number in range(count)])
    pane.pcolormesh(
        boundary.across,
        boundary.up,
        seen,
        cmap=tints,
        vmin=-0.5,
        vmax=count - 0.5,
        alpha=0.13,
        shading="nearest",
        rasterized=True,
        linewidth=0,
    )
    _line(pane, boundary, dashed=False)


def _line(pane: Axes, boundary: Boundary, dashed: bool) -> None:
    count = boundary.margins.shape[-1]
    # Of two classes both margins have the same zeros.
    for number in range(1 if count == 2 else count):
        pane.contour(
            boundary.across,
            boundary.up,
            boundary.margins[..., number],
            levels=[0.0],
            colors=INK,
            linewidths=1.0 if dashed else 1.4,
            linestyles=[(0, (3, 2))] if dashed else "solid",
        )


def _scatter(pane: Axes, panel: Panel, number: int) -> None:
    chosen = panel.points[panel.labels == number]
    pane.scatter(
        chosen[:, 0],
        chosen[:, 1],
        s=9,
        marker=marker_of(number),
        color=COLOURS[number % len(COLOURS)],
        linewidths=0.3,
        edgecolors="white",
        zorder=3,
    )


def _arrows(pane: Axes, panel: Panel, number: int) -> None:
    assert panel.moved is not None
    rows = panel.labels == number
    start, move = panel.points[rows], (panel.moved - panel.points)[rows]
    colour = COLOURS[number % len(COLOURS)]
    pane.quiver(
        start[:, 0],
        start[:, 1],
        move[:, 0],
        move[:, 1],
        angles="xy",
        scale_units="xy",
        scale=1,
        width=0.003,
        color=colour,
        zorder=3,
    )
    pane.scatter(
        start[:, 0],
        start[:, 1],
        s=5,
        marker=marker_of(number),
        color=colour,
        linewidths=0,
        zorder=3,
    )
