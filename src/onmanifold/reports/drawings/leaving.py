"""Figures of how far images lie from the manifold, and in which direction (Disentangling, figures 3, 10, 14)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onmanifold.reports.figures import COLOURS, DASHES, INK, add_legend, new_figure, style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]

_BINS = 40
# The farthest hundredth of what is drawn may lie outside the picture.
_WITHIN = 0.995
# What every such figure has looks the same in each; attacks take the colours in turn.
_LOOKS: dict[str, tuple[str, Any]] = {
    "clean": (INK, "-"),
    "random perturbation": (COLOURS[6], (0, (1, 1))),
    "loss gradient": (COLOURS[5], (0, (8, 2))),
    "random direction": (INK, (0, (1, 2))),
}


def draw_distances(images: Mapping[str, pd.DataFrame], measure: str, label: str) -> Figure | None:
    """Normalised histograms of distances: a panel for each classifier, an outline for each kind of images.

    Args:
        images: For each classifier a row per image, with columns kind and ``measure``.
        measure: Column that is drawn.
        label: Of the horizontal axis.

    Returns:
        None where no kind was measured.
    """
    values = {
        name: {
            str(kind): part[measure].to_numpy()
            for kind, part in table.groupby("kind", sort=False)
            if part[measure].notna().all()
        }
        for name, table in images.items()
    }
    if not any(values.values()):
        return None
    every = np.concatenate([row for part in values.values() for row in part.values()])
    top = float(np.quantile(every, _WITHIN)) or 1.0
    return _histograms(values, np.linspace(0, top, _BINS + 1), label)


def draw_angles(
    images: Mapping[str, pd.DataFrame],
    directions: Mapping[str, pd.DataFrame],
    random_share: float,
) -> Figure | None:
    """Normalised histograms of angles to the tangent space in degrees: a panel for each classifier.

    Args:
        images: For each classifier a row per image, with columns kind and angle, without which they are left out;
            where there is a column share_hundredth, it is drawn as an angle too.
        directions: The same for directions that are no perturbations.
        random_share: Tangent share that a random direction has on average, of which the angle is marked.

    Returns:
        None where no angle was measured.
    """
    values = {
        name: {
            str(kind): part.angle.dropna().to_numpy()
            for table in (images[name], directions[name])
            for kind, part in table.groupby("kind", sort=False)
            if part.angle.notna().any()
        }
        for name in images
    }
    for name, table in images.items():
        if "share_hundredth" in table:
            for kind, part in table.dropna(subset=["share_hundredth"]).groupby("kind", sort=False):
                shares = part.share_hundredth.to_numpy().clip(0, 1)
                values[name][f"{kind}, a hundredth"] = np.degrees(np.arccos(np.sqrt(shares)))
    if not any(values.values()):
        return None
    mark = math.degrees(math.acos(math.sqrt(random_share))) if random_share >= 0 else None
    label = "angle to the tangent space (degrees)"
    return _histograms(values, np.linspace(0, 90, _BINS + 6), label, mark)


def _histograms(
    values: Mapping[str, Mapping[str, Floats]],
    edges: Floats,
    label: str,
    mark: float | None = None,
) -> Figure:
    kinds = list(dict.fromkeys(kind for part in values.values() for kind in part))
    attacks = [kind for kind in kinds if kind not in _LOOKS]
    turns = {kind: (COLOURS[number % 5], DASHES[number % 5]) for number, kind in enumerate(attacks)}
    looks = _LOOKS | turns
    with style():
        from matplotlib.ticker import PercentFormatter

        figure, axes = new_figure(1.0 + 3.7 * len(values), 3.3, columns=len(values))
        panes: Sequence[Axes] = list(np.atleast_1d(np.asarray(axes, dtype=object)))
        for pane, (name, part) in zip(panes, values.items(), strict=True):
            for kind in kinds:
                if kind in part:
                    _outline(pane, part[kind], edges, looks[kind], kind)
            if mark is not None:
                pane.axvline(mark, color=INK, linewidth=0.7)
            pane.set(title=name, xlabel=label, xlim=(edges[0], edges[-1]))
            pane.yaxis.set_major_formatter(PercentFormatter(1.0))
            pane.grid(axis="y")
        panes[0].set_ylabel("share of the images")
        add_legend(figure, max(panes, key=lambda pane: len(pane.get_legend_handles_labels()[1])))
        return figure


def _outline(pane: Axes, values: Floats, edges: Floats, look: tuple[str, Any], kind: str) -> None:
    """One histogram as shares of all values; what lies outside of the edges counts in the outermost bins."""
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    shares, (colour, dashes) = counts / max(1, len(values)), look
    pane.stairs(shares, edges, color=colour, alpha=0.12, fill=True, linewidth=0)
    pane.stairs(
        shares,
        edges,
        color=colour,
        linewidth=1.5,
        linestyle=dashes,
        label=kind,
    )
