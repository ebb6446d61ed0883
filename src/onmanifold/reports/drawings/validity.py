"""On-manifold adversarial examples beside the nearest images of other classes (Disentangling, definition 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from onmanifold.reports.figures import COLOURS, new_figure, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROWS = ("clean", "adversarial", "nearest of\nanother class")
# Inches of an image's side; shares of it between images.
_SIDE, _GAP, _LINE = 0.72, 0.1, 0.3


@dataclass(frozen=True)
class Example:
    """A successful example.

    Attributes:
        clean: (C, H, W) in [0, 1].
        adversarial: (C, H, W).
        nearest: (C, H, W) the nearest image of another class.
        label: Name of the class.
        prediction: What the classifier sees in the adversarial one.
        other: The class of the nearest image.
        distance: From the adversarial one to it.
        kept: Whether the example keeps its label.
    """

    clean: NDArray[np.float32]
    adversarial: NDArray[np.float32]
    nearest: NDArray[np.float32]
    label: str
    prediction: str
    other: str
    distance: float
    kept: bool


def draw_examples(examples: Sequence[Example]) -> Figure:
    """A column for each example: clean, adversarial and nearest of another class, with classes below.

    Under the adversarial image stands what the classifier sees; the mark above the column says whether the label
    is kept.
    """
    count = len(examples)
    _, height, width = examples[0].clean.shape
    step, line = width * (1 + _GAP), height * (1 + _LINE)
    with style():
        figure, axes = new_figure(_SIDE * (1 + _GAP) * count + 1.0, _SIDE * 3 * (1 + _LINE) + 0.3)
        axes.set_axis_off()
        for column, example in enumerate(examples):
            left, middle = column * step, column * step + width / 2
            pictures = (example.clean, example.adversarial, example.nearest)
            captions = (
                example.label,
                f"seen: {example.prediction}",
                f"{example.other}, {example.distance:.1f}",
            )
            mark, colour = ("✓ kept", COLOURS[2]) if example.kept else ("✗ lost", COLOURS[3])
            words = {"ha": "center", "fontsize": 7.5}
            axes.text(middle, -0.06 * height, mark, va="bottom", color=colour, **words)
            for row, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
                top = row * line
                shown = np.repeat(picture, 3, axis=0) if len(picture) == 1 else picture[:3]
                axes.imshow(
                    np.clip(np.moveaxis(shown, 0, -1), 0, 1),
                    interpolation="none",
                    extent=(left, left + width, top + height, top),
                )
                axes.text(middle, top + 1.04 * height, caption, va="top", **words)
        for row, name in enumerate(_ROWS):
            place = (-0.12 * width, row * line + height / 2)
            axes.text(*place, name, ha="right", va="center", fontsize=8, fontweight="bold")
        axes.set(xlim=(0, count * step), ylim=(2 * line + 1.25 * height, -0.25 * height))
        axes.set_aspect("equal")
        return figure
