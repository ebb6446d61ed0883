"""Figures of the theory: ellipses, spectra, risks, and the trade-off of Tsipras et al."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from onmanifold.reports.figures import (
    COLOURS,
    DASHES,
    FAINT,
    INK,
    MARKERS,
    add_legend,
    new_figure,
    style,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from onmanifold.analysis.theory.curves import Plane

_SPACES = {"image": "image space", "latent": "latent space"}


def draw_ellipses(planes: Sequence[Plane]) -> Figure:
    """Data of two dimensions, the worst perturbations, and the trained distribution (Directions figure 1).

    Args:
        planes: A panel for each, from `onmanifold.analysis.theory.curves.attack_plane`.
    """
    with style():
        figure, axes = new_figure(8.8, 3.4, columns=len(planes))
        panes: list[Axes] = list(np.atleast_1d(np.asarray(axes, dtype=object)))
        for pane, plane in zip(panes, planes, strict=True):
            _draw_plane(pane, plane)
        limits = [pane.axis() for pane in panes]
        low, high = np.min(limits, axis=0), np.max(limits, axis=0)
        for pane in panes:
            pane.set(xlim=(low[0], high[1]), ylim=(low[2], high[3]), aspect="equal")
            pane.set_xlabel("first coordinate")
        panes[0].set_ylabel("second coordinate")
        add_legend(figure, panes[0])
        return figure


def _draw_plane(pane: Axes, plane: Plane) -> None:
    ellipse = _ellipse(plane.data)
    trained = _ellipse(plane.trained)
    pane.fill(*ellipse.T, color=COLOURS[0], alpha=0.15, linewidth=0)
    pane.plot(*ellipse.T, color=COLOURS[0], label="data, two standard deviations")
    pane.plot(
        *trained.T,
        color=COLOURS[3],
        linestyle=DASHES[1],
        linewidth=1.8,
        label="after adversarial training",
    )
    for number, (x, y) in enumerate(plane.points):
        outline = plane.reach + np.array([x, y])
        label = "within reach of a point" if number == 0 else None
        pane.plot(*outline.T, color=FAINT, linewidth=1.0, alpha=0.9, label=label)
    pane.quiver(
        *plane.points.T,
        *plane.moves.T,
        angles="xy",
        scale_units="xy",
        scale=1,
        width=0.006,
        color=INK,
        zorder=3,
    )
    arrow: dict[str, Any] = {"marker": r"$\rightarrow$", "markersize": 13, "linestyle": "none"}
    pane.plot([], [], color=INK, label="worst perturbation", **arrow)
    pane.set_title(f"{_SPACES[plane.space]}, radius {plane.radius:.2g}")
    pane.grid()


def _ellipse(covariance: Any) -> Any:
    """Outline (n, 2) at two standard deviations."""
    values, vectors = np.linalg.eigh(covariance)
    angles = np.linspace(0, 2 * np.pi, 200)
    return (
        2
        * (np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.sqrt(values.clip(0)))
        @ vectors.T
    )


def draw_spectrum(table: pd.DataFrame, latent_size: int) -> Figure:
    """Eigenvalues after attack, and after adversarial training, over the data's own.

    Args:
        table: From `onmanifold.analysis.theory.curves.spectrum_table`.
        latent_size: Directions that have a latent; a line stands behind them.
    """
    with style():
        figure, axes = new_figure(8.8, 3.5, columns=2)
        titles = {"attacked": "attacked data", "trained": "after adversarial training"}
        for pane, (column, title) in zip(axes, titles.items(), strict=True):
            pane.axhline(1, color=INK, linewidth=1.0, linestyle=DASHES[2], label="original")
            for number, (attack, lines) in enumerate(table.groupby("attack", sort=False)):
                if column not in lines or lines[column].isna().all():
                    continue
                look = {"color": COLOURS[number], "marker": MARKERS[number]}
                pane.plot(
                    lines.direction,
                    lines[column],
                    linestyle=DASHES[number],
                    color=COLOURS[number],
                    linewidth=1.4,
                )
                shown = lines.sampled if column == "attacked" else lines[column]
                errors = lines.error if column == "attacked" else None
                pane.errorbar(
                    lines.direction,
                    shown,
                    yerr=errors,
                    linestyle="none",
                    markersize=4.5,
                    label=str(attack),
                    **look,
                )
            pane.axvline(latent_size + 0.5, color=FAINT, linewidth=0.8)
            pane.set(title=title, xlabel="eigen-direction, largest variance first")
            pane.set_xticks(sorted(table.direction.unique()))
            pane.set_ylim(bottom=-0.05)
            pane.grid(axis="y")
        axes[0].set_ylabel("eigenvalue / that of the data")
        # The second panel has every attack, the first only those whose risk is finite.
        add_legend(figure, axes[1])
        return figure


_PANELS = {
    "latent": ("latent attack", "multiplier $L$", "excess risk × $L$ (nats)"),
    "image": (
        "image attack",
        r"multiplier × smallest eigenvalue, $\lambda_{\min} L$",
        r"excess risk × $\lambda_{\min} L$ (nats)",
    ),
    "radius": (
        "both, by radius",
        "root mean square length of perturbations",
        "excess risk (nats)",
    ),
}


def draw_risk(table: pd.DataFrame) -> Figure:
    """Excess risk over multiplier and radius: closed forms as lines, Monte Carlo as points.

    Args:
        table: From `onmanifold.analysis.theory.curves.risk_table`.
    """
    from matplotlib.container import ErrorbarContainer

    present = [panel for panel in _PANELS if (table.panel == panel).any()]
    with style():
        figure, axes = new_figure(3.6 * len(present), 4.6, columns=len(present))
        panes: list[Axes] = list(np.atleast_1d(np.asarray(axes, dtype=object)))
        for pane, panel in zip(panes, present, strict=True):
            lines = table[table.panel == panel].groupby("line", sort=False)
            for number, (name, line) in enumerate(lines):
                _draw_risk_line(pane, str(name), line, number)
            title, label, height = _PANELS[panel]
            pane.set(xscale="log", yscale="log", title=title, xlabel=label, ylabel=height)
            pane.grid()
            handles, labels = pane.get_legend_handles_labels()
            # Those with points, which matplotlib lists last, come first.
            points = [isinstance(handle, ErrorbarContainer) for handle in handles]
            order = sorted(range(len(handles)), key=lambda place: not points[place])
            pane.legend(
                [handles[place] for place in order],
                [labels[place] for place in order],
                loc="upper center",
                bbox_to_anchor=(0.5, -0.17),
                fontsize=8,
                ncols=1,
                handlelength=2.6,
            )
        return figure


def _draw_risk_line(pane: Axes, name: str, line: pd.DataFrame, number: int) -> None:
    sampled = line.sampled.notna().any()
    colour = COLOURS[number % len(COLOURS)] if sampled else FAINT
    dash = DASHES[number % 4] if sampled else DASHES[1] if "derived" in name else DASHES[2]
    # Several values at a position are several curves of one name.
    ranks = line.groupby("position").cumcount()
    for rank in sorted(ranks.unique()):
        part = line[ranks == rank]
        # A curve without points names itself; one with points is named by them.
        label = name if not sampled and rank == 0 else None
        pane.plot(part.position, part.risk, color=colour, linestyle=dash, label=label)
    if sampled:
        marker = MARKERS[number % len(MARKERS)]
        every = line[line.sampled.notna()]
        pane.errorbar(
            every.position,
            every.sampled,
            yerr=every.error,
            linestyle=dash,
            linewidth=0,
            elinewidth=1.0,
            marker=marker,
            markersize=4.5,
            color=colour,
            label=name,
        )


def draw_trade_off(table: pd.DataFrame, bayes_weight: float, bound: NDArray[np.float64]) -> Figure:
    """Accuracies over the weight of the first feature, and robust over standard accuracy.

    Args:
        table: From `onmanifold.analysis.theory.curves.trade_off_table`.
        bayes_weight: Weight of the Bayes classifier.
        bound: (rows,) most that the robust accuracy can be at the row's standard accuracy, for any classifier.
    """
    names = {
        "standard": "standard",
        "robust": "robust, every perturbation",
        "valid": "robust, valid perturbations",
    }
    bayes = table[np.isclose(table.weight, bayes_weight)]
    curve = table[~np.isclose(table.weight, bayes_weight)]
    with style():
        figure, (left, right) = new_figure(8.8, 3.9, columns=2)
        left.axvline(bayes_weight, color=FAINT, linewidth=0.8)
        for number, (name, label) in enumerate(names.items()):
            look: dict[str, Any] = {"color": COLOURS[number]}
            for part in _pieces(curve, bayes_weight):
                left.plot(part.weight, part[name], linestyle=DASHES[number], linewidth=1.4, **look)
            left.errorbar(
                table.weight,
                table[f"{name} sampled"],
                yerr=table[f"error of {name}"],
                linestyle="none",
                marker=MARKERS[number],
                markersize=4,
                label=label,
                **look,
            )
        _draw_robust_over_standard(right, curve[curve.weight > bayes_weight], bayes, names)
        order = np.argsort(table.standard.to_numpy())
        right.plot(
            table.standard.to_numpy()[order],
            bound[order],
            color=INK,
            linewidth=1.0,
            linestyle=DASHES[3],
            label="most for any classifier, every perturbation",
        )
        left.annotate(
            "Bayes",
            (bayes_weight, 0.5),
            xytext=(-4, 0),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
        left.set(xscale="log", xlabel="weight of the first feature", ylabel="accuracy")
        left.set_title("over the classifiers")
        right.set(xlabel="standard accuracy", ylabel="robust accuracy", title="the trade-off")
        for pane in (left, right):
            pane.set_ylim(-0.03, 1.05)
            pane.grid()
        handles, labels = left.get_legend_handles_labels()
        more, words = right.get_legend_handles_labels()
        figure.legend(
            [*handles, *more], [*labels, *words], loc="outside upper center", ncols=2, fontsize=8.5
        )
        return figure


def _draw_robust_over_standard(
    pane: Axes, curve: pd.DataFrame, bayes: pd.DataFrame, names: Mapping[str, str]
) -> None:
    """From the Bayes classifier, which is marked, to the first feature alone."""
    for number, name in enumerate(names):
        if name == "standard":
            continue
        look: dict[str, Any] = {"color": COLOURS[number], "linestyle": DASHES[number]}
        pane.plot(curve.standard, curve[name], linewidth=2.4, **look)
        for _, row in bayes.iterrows():
            place = (row.standard, row[name])
            pane.plot(*place, linestyle="none", marker=MARKERS[number], color=COLOURS[number])
            pane.annotate(
                "Bayes",
                place,
                xytext=(-7, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=8,
            )


def _pieces(curve: pd.DataFrame, split: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The curve on both sides of the Bayes classifier, at which it may jump."""
    return curve[curve.weight < split], curve[curve.weight > split]
