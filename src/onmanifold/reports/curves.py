"""The figure of budget curves: accuracy against the radius of the threat model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from onmanifold.foundation.errors import InputError
from onmanifold.reports.claims import CONFIDENCE
from onmanifold.reports.figures import COLOURS, DASHES, add_legend, marker_of, new_figure, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from onmanifold.evaluation.curve import BudgetCurve

_BAND = 0.15
# Edges of a band, for prints in grey where two bands overlap.
_EDGE = 0.45


def curves_figure(
    curves: Mapping[str, BudgetCurve], xlabel: str = "radius", scale: float = 1.0
) -> Figure:
    """Accuracy of each model, or under each attack, against the radius, with bands of 95 % (Wilson).

    Tested radii have a marker; between them accuracy is at most that of the marker to the left, and the straight
    lines only lead the eye. Curves are told apart by colour, marker and dashes.

    Args:
        curves: By the name in the legend.
        xlabel: What the radius is, with its unit.
        scale: What radii are multiplied with, such as 255 for image balls in grey levels.

    Returns:
        A figure for `to_svg` and `to_png`.

    Raises:
        InputError: There is no curve.
    """
    if not curves:
        raise InputError("curves: expected at least one, found none.")
    with style():
        figure, axes = new_figure(6.0, 3.6)
        for number, (name, curve) in enumerate(curves.items()):
            table = curve.table(CONFIDENCE)
            radii = scale * table.index.to_numpy(dtype=np.float64)
            look: dict[str, Any] = {
                "color": COLOURS[number % len(COLOURS)],
                "zorder": 2 + len(curves) - number,
            }
            low, high = 100 * table["low"].to_numpy(), 100 * table["high"].to_numpy()
            axes.fill_between(radii, low, high, alpha=_BAND, linewidth=0, **look)
            for edge in (low, high):
                axes.plot(radii, edge, linewidth=0.5, alpha=_EDGE, **look)
            axes.plot(
                radii,
                100 * table["accuracy"].to_numpy(),
                linestyle=DASHES[number % len(DASHES)],
                marker=marker_of(number),
                markersize=4.5,
                linewidth=1.5,
                label=name,
                **look,
            )
        axes.set(xlabel=xlabel, ylabel="accuracy (%)", ylim=(-2, 102))
        axes.set_xlim(left=0)
        axes.grid()
        add_legend(figure, axes)
        return figure
