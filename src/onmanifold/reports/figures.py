"""Figures: colour-blind-safe, told apart in grey too, vectors with a transparent ground."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from onmanifold.reports.tables import Table

# Okabe and Ito (2008); the order keeps neighbours apart in grey, markers and dashes do the rest.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.5)),
    (0, (1, 1)),
    (0, (4, 1, 1, 1)),
    (0, (8, 2)),
    "-",
    "-",
)
_WIDTH = 8.8
# Methods of whose points a row of the figure has room for half an inch.
_ROOM = 8
INK = "#1c2127"
FAINT = "#8b939c"

_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "grid.color": FAINT,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "svg.fonttype": "path",
    "svg.hashsalt": "onmanifold",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.0,
}


@dataclass(frozen=True)
class Examples:
    """Images before and after each attack on each method's classifier.

    Attributes:
        clean: (S, C, H, W) in [0, 1].
        labels: Name of each image's class, S.
        adversarial: By attack and method: (S, C, H, W).
        predictions: By attack and method: the class that the classifier sees in each, S.
    """

    clean: NDArray[np.float32]
    labels: Sequence[str]
    adversarial: Mapping[str, Mapping[str, NDArray[np.float32]]] = field(default_factory=dict)
    predictions: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)


def accuracy_figure(table: Table) -> Figure:
    """Accuracy of each method under each attack, with intervals."""
    with style():
        rows, methods = len(table.columns), list(table.rows)
        legend = _legend_lines(methods, _WIDTH)
        height = 0.5 * rows * max(1.0, len(methods) / _ROOM)
        figure, axes = new_figure(_WIDTH, 0.5 + 0.2 * legend + height)
        spread = 0.62 / max(len(methods), 1)
        for number, method in enumerate(methods):
            offset = (number - (len(methods) - 1) / 2) * spread
            found = [(row, entry) for row, entry in enumerate(table.rows[method]) if entry]
            means = [entry.mean for _, entry in found]
            arms = [
                [entry.mean - entry.low for _, entry in found],
                [entry.high - entry.mean for _, entry in found],
            ]
            axes.errorbar(
                means,
                [row + offset for row, _ in found],
                xerr=np.clip(arms, 0, None),
                fmt=marker_of(number),
                color=COLOURS[number % len(COLOURS)],
                markersize=5.5,
                elinewidth=1.2,
                label=method,
            )
        for row in range(1, rows):
            axes.axhline(row - 0.5, color=FAINT, alpha=0.25, linewidth=0.6)
        axes.set(xlim=(-2, 102), ylim=(rows - 0.5, -0.5), xlabel="accuracy (%)")
        axes.set_yticks(range(rows), table.headings())
        axes.grid(axis="x")
        add_legend(figure, axes)
        return figure


def training_figure(
    histories: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    panels: Mapping[str, tuple[str, float]],
) -> Figure | None:
    """Curves over epochs: a panel for each quantity, a colour for each method, a faint line for each seed.

    Args:
        histories: For each method and seed, a record for each epoch.
        panels: For each title, the record's key and a factor. Panels without numbers are left out.

    Returns:
        The figure, or None where there is nothing to draw.
    """
    shown = {
        title: (key, factor)
        for title, (key, factor) in panels.items()
        if any(_series(run, key)[0] for runs in histories.values() for run in runs)
    }
    if not shown:
        return None
    from matplotlib.ticker import MaxNLocator

    with style():
        width = 3.3 * len(shown) + 0.4
        legend = _legend_lines(list(histories), width)
        figure, axes = new_figure(width, 2.8 + 0.2 * legend, columns=len(shown))
        panes: list[Axes] = list(np.atleast_1d(np.asarray(axes, dtype=object)))
        for pane, (title, (key, factor)) in zip(panes, shown.items(), strict=True):
            for number, (method, runs) in enumerate(histories.items()):
                curves = [_series(run, key) for run in runs]
                curves = [curve for curve in curves if curve[0]]
                look: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)]}
                for epochs, values in curves if len(curves) > 1 else []:
                    pane.plot(epochs, factor * np.array(values), linewidth=0.6, alpha=0.35, **look)
                if curves:
                    length = min(len(epochs) for epochs, _ in curves)
                    mean = np.mean([values[:length] for _, values in curves], axis=0)
                    pane.plot(
                        curves[0][0][:length],
                        factor * mean,
                        linestyle=DASHES[number % len(DASHES)],
                        marker=marker_of(number),
                        markersize=3.5,
                        linewidth=1.5,
                        markevery=max(1, length // 6),
                        label=method,
                        **look,
                    )
            pane.set(title=title, xlabel="epoch")
            pane.grid()
            pane.xaxis.set_major_locator(MaxNLocator(integer=True))
        add_legend(figure, panes[0])
        return figure


def _series(run: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    points = [
        (float(record.get("epoch", position)), float(record[key]))
        for position, record in enumerate(run, start=1)
        if isinstance(record.get(key), int | float)
    ]
    return [epoch for epoch, _ in points], [value for _, value in points]


def examples_figure(examples: Examples, attack: str) -> Figure:
    """Clean images, and for each method the adversarial ones and their magnified differences.

    As DMAT figure 4. The differences of all methods share one scale, so that a brighter picture is a
    stronger perturbation; under each image stands the class that the classifier sees.
    """
    adversarial, predictions = examples.adversarial[attack], examples.predictions[attack]
    methods, (count, _, height, width) = list(adversarial), examples.clean.shape
    differences = {
        method: np.abs(images - examples.clean).mean(axis=1)
        for method, images in adversarial.items()
    }
    top = max((float(values.max()) for values in differences.values()), default=0.0) or 1.0
    # One picture holds all images, which is far faster to draw and smaller to store than one each.
    line, space, gap = (
        max(1, round(0.3 * height)),
        max(1, round(0.06 * width)),
        max(1, round(0.28 * width)),
    )
    lefts = [width + gap + number * (2 * width + space + gap) for number in range(len(methods))]
    right = lefts[-1] + 2 * width + space
    mosaic = np.zeros((count * (height + line) - line, right, 4), dtype=np.float32)

    def put(picture: NDArray[np.float32], row: int, left: int) -> None:
        place = row * (height + line)
        mosaic[place : place + height, left : left + width] = picture

    with style():
        import matplotlib as mpl
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        magnified = ScalarMappable(Normalize(0, top), mpl.colormaps["magma"])
        unit = 0.92 / width
        figure, axes = new_figure(unit * right + 1.1, unit * len(mosaic) + 0.85)
        axes.set_axis_off()
        axes.text(width / 2, -0.07 * height, "clean", ha="center", va="bottom", fontsize=8)
        for left, method in zip(lefts, methods, strict=True):
            middle = left + width + space / 2
            words = {"ha": "center", "va": "bottom", "fontsize": 8, "fontweight": "bold"}
            axes.text(middle, -0.07 * height, _folded(method), **words)
            for row in range(count):
                put(_pixels(adversarial[method][row]), row, left)
                difference = magnified.to_rgba(differences[method][row])
                put(np.asarray(difference, dtype=np.float32), row, left + width + space)
                seen, label = predictions[method][row], examples.labels[row]
                _caption(
                    axes, left + width / 2, row * (height + line) + height, seen, seen != label
                )
        for row in range(count):
            put(_pixels(examples.clean[row]), row, 0)
            _caption(axes, width / 2, row * (height + line) + height, examples.labels[row], None)
        axes.imshow(mosaic, interpolation="none", extent=(0, right, len(mosaic), 0))
        bar = figure.colorbar(magnified, ax=axes, fraction=0.012, pad=0.015, aspect=40)
        bar.outline.set_visible(False)
        bar.set_label("difference, mean over channels", fontsize=8)
        bar.ax.tick_params(labelsize=7, width=0.7)
        return figure


def _caption(axes: Axes, x: float, y: float, text: str, fooled: bool | None) -> None:
    """The class below an image, marked where a classifier is fooled or not."""
    mark = {None: "", True: "✗ ", False: "✓ "}[fooled]
    axes.annotate(
        mark + text,
        (x, y),
        xytext=(0, -2),
        textcoords="offset points",
        ha="center",
        va="top",
        fontsize=8,
        color="#D55E00" if fooled else INK,
        fontweight="bold" if fooled else "normal",
        annotation_clip=False,
    )


def _folded(method: str) -> str:
    return method.replace(" [", "\n[", 1).replace(", ", ",\n ", 1)


def _pixels(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """An image (C, H, W) as opaque colours (H, W, 4)."""
    colours = np.clip(np.moveaxis(image, 0, -1), 0, 1)
    colours = np.repeat(colours, 3, axis=-1) if colours.shape[-1] == 1 else colours[..., :3]
    return np.concatenate([colours, np.ones_like(colours[..., :1])], axis=-1)


def style() -> Any:
    """A context in which figures are drawn and saved in the house's style."""
    import matplotlib as mpl

    return mpl.rc_context(_STYLE)


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    """An empty figure of so many inches, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def marker_of(number: int) -> str:
    """The marker of the method of this number: beyond the first seven other pairs of colour and marker follow."""
    return MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """How many columns of labels fit into so many inches."""
    longest = max((len(label) for label in labels), default=0)
    return max(1, min(len(labels), 5, int(width / (0.075 * longest + 0.6))))


def _legend_lines(labels: Sequence[str], width: float) -> int:
    """How many lines a legend above a figure of so many inches takes."""
    return -(-len(labels) // _legend_columns(labels, width)) if labels else 0


def add_legend(figure: Figure, axes: Axes) -> None:
    """A legend of all that is named in the axes, above them, in as many columns as fit."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=_legend_columns([str(label) for label in labels], figure.get_size_inches()[0]),
        fontsize=8.5,
        handlelength=2.4,
    )


def to_svg(figure: Figure) -> str:
    """The figure as a stand-alone SVG document; the same figure gives the same text."""
    buffer = io.StringIO()
    with style():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def to_png(figure: Figure, resolution: int = 200) -> bytes:
    """The figure as PNG on white, ``resolution`` pixels per inch."""
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="png", dpi=resolution, facecolor="white")
    return buffer.getvalue()


def inline_svg(document: str, prefix: str, description: str) -> str:
    """An SVG element for an HTML page: dark and light follow the page, names do not clash, no outside links.

    Args:
        document: From `to_svg`.
        prefix: Unique on the page.
        description: What is seen, for those who do not see it.
    """
    from html import escape

    text = document[document.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'id="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", text)
    text = text.replace(INK, "currentColor")
    # The page decides how large it is shown, up to a quarter larger than it was drawn.
    text = re.sub(
        r'(<svg[^>]*?) width="([\d.]+)pt"',
        lambda match: f'{match[1]} style="max-width:{1.25 * float(match[2]):.0f}pt"',
        text,
        count=1,
    )
    text = re.sub(r'(<svg[^>]*?) height="[\d.]+pt"', r"\1", text, count=1)
    return text.replace(
        "<svg", f'<svg role="img" aria-label="{escape(description, quote=True)}"', 1
    )
