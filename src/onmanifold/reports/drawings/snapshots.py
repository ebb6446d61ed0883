"""Figures of accuracy over the snapshots of trainings (DMAT figure 3, IJSAT figures 2 and 7)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onmanifold.reports.figures import COLOURS, DASHES, add_legend, marker_of, new_figure, style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_BAND, _EDGE = 0.15, 0.45


def draw_snapshots(table: pd.DataFrame) -> Figure:
    """A panel for each attack, in it a curve over epochs for each method, with bands of the intervals.

    Args:
        table: Columns method, attack, epoch, accuracy, low and high, accuracies in [0, 1].
    """
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    methods, attacks = (list(dict.fromkeys(table[name])) for name in ("method", "attack"))
    with style():
        figure, axes = new_figure(2.9 * len(attacks) + 0.5, 3.2, columns=len(attacks))
        panes: list[Any] = list(np.atleast_1d(np.asarray(axes, dtype=object)))
        for pane, attack in zip(panes, attacks, strict=True):
            for number, method in enumerate(methods):
                part = table[(table.method == method) & (table.attack == attack)]
                part = part.sort_values("epoch")
                colour = COLOURS[number % len(COLOURS)]
                low, high = 100 * part["low"], 100 * part["high"]
                pane.fill_between(part["epoch"], low, high, color=colour, alpha=_BAND, linewidth=0)
                for edge in (low, high):
                    pane.plot(part["epoch"], edge, color=colour, alpha=_EDGE, linewidth=0.5)
                pane.plot(
                    part["epoch"],
                    100 * part["accuracy"],
                    color=colour,
                    linestyle=DASHES[number % len(DASHES)],
                    marker=marker_of(number),
                    markersize=4.5,
                    linewidth=1.5,
                    label=method,
                )
            pane.set(title=attack[:1].upper() + attack[1:], xlabel="epoch", ylim=(-2, 102))
            pane.xaxis.set_major_locator(MaxNLocator(integer=True))
            pane.grid()
        panes[0].set_ylabel("accuracy (%)")
        add_legend(figure, panes[0])
        return figure
