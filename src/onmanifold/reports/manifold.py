"""The quality of a manifold as one self-contained HTML page, with its pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onmanifold.foundation.files import write_atomically
from onmanifold.reports import figures
from onmanifold.reports.html import Picture, render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from onmanifold.analysis.quality import Quality
    from onmanifold.analysis.quality_measures import Measure
    from onmanifold.manifolds.base import Manifold
    from onmanifold.reports.manifold_pictures import Mosaic

# Inches: of a mosaic at most, and of one of its images at most.
_WIDTH, _SIDE = 7.6, 0.62
_PANELS = 4
# Latents whose points are large enough to have a shape.
_FEW = 64


@dataclass(frozen=True)
class ManifoldPage:
    """All that the page shows."""

    title: str
    description: str
    measures: Sequence[Measure]
    pictures: Sequence[Picture] = ()
    curves: Picture | None = None
    facts: Sequence[tuple[str, str]] = field(default_factory=tuple)


def write_manifold_report(
    directory: str | Path,
    manifold: Manifold,
    quality: Quality,
    pictures: Sequence[Mosaic] = (),
    history: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write ``manifold.html``, ``quality.json`` and each figure as SVG and PNG under ``figures/``.

    Args:
        directory: Where to; made where it is missing.
        manifold: What it is about.
        quality: From `measure_quality`.
        pictures: From `picture_manifold`.
        history: A record for each epoch of its training, as in ``metrics.jsonl``.

    Returns:
        The page.

    Raises:
        DataError: A file could not be written.
    """
    folder = Path(directory)

    def keep(name: str, figure: Figure, title: str, caption: str) -> Picture:
        document = figures.to_svg(figure)
        write_atomically(folder / "figures" / f"{name}.svg", document.encode())
        write_atomically(folder / "figures" / f"{name}.png", figures.to_png(figure))
        return Picture(title, caption, figures.inline_svg(document, name, title))

    shown = [keep(item.name, mosaic_figure(item), item.title, item.caption) for item in pictures]
    shown += [
        keep("distances", distances_figure(quality), *_DISTANCES),
        keep("latents", latents_figure(quality), *_LATENTS),
    ]
    curves = history_figure(history)
    page = ManifoldPage(
        title=f"{manifold.name} on {quality.facts['train']['name']}",
        description=(
            "How well a learned manifold holds images that it has not seen, and what its own samples are worth."
        ),
        measures=quality.measures,
        pictures=shown,
        curves=None if curves is None else keep("training", curves, *_TRAINING),
        facts=_facts(manifold, quality, history),
    )
    quality.to_json(folder / "quality.json")
    text = render("manifold.html", page, number=format_number)
    return write_atomically(folder / "manifold.html", text.encode())


def format_number(value: float | None) -> str:
    """Three digits for people.

    >>> [format_number(value) for value in (0.080758, 38.1327, 999.7, 0.0, 4.2e-7, None)]
    ['0.0808', '38.1', '1,000', '0', '4.2e-07', '–']
    """
    if value is None or value != value:
        return "–"
    return f"{value:,.0f}" if 999.5 <= abs(value) < 1e6 else f"{value:.3g}"


def mosaic_figure(mosaic: Mosaic) -> Figure:
    """Images in rows and columns with their names, as one picture."""
    images = mosaic.images.numpy(force=True).astype(np.float32)
    rows, columns, _, height, width = images.shape
    gap, space = max(1, round(0.06 * width)), max(2, round(0.22 * height))
    tops = [
        row * (height + gap) + row // mosaic.group * space * (mosaic.group > 1)
        for row in range(rows)
    ]
    lefts = [column * (width + gap) for column in range(columns)]
    canvas = np.zeros((tops[-1] + height, lefts[-1] + width, 4), dtype=np.float32)
    for row, top in enumerate(tops):
        for column, left in enumerate(lefts):
            picture = np.moveaxis(images[row, column], 0, -1).clip(0, 1)
            canvas[top : top + height, left : left + width, :3] = picture
            canvas[top : top + height, left : left + width, 3] = 1
    unit = min(_SIDE / width, _WIDTH / canvas.shape[1])
    words = 0.075 * max(map(len, mosaic.rows), default=0)
    with figures.style():
        figure, axes = figures.new_figure(
            unit * canvas.shape[1] + words + 0.2,
            unit * len(canvas) + 0.25 * bool(mosaic.columns) + 0.1,
        )
        axes.imshow(canvas, interpolation="none", extent=(0, canvas.shape[1], len(canvas), 0))
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelsize=8, pad=3)
        axes.xaxis.tick_top()
        axes.set_xticks(
            [left + width / 2 for left in lefts] if mosaic.columns else [], mosaic.columns
        )
        axes.set_yticks([top + height / 2 for top in tops] if mosaic.rows else [], mosaic.rows)
        return figure


def distances_figure(quality: Quality) -> Figure:
    """Distances to the nearest training image, of samples and of test images, as cumulative shares."""
    with figures.style():
        figure, axes = figures.new_figure(5.2, 3.0)
        for number, name in enumerate(("sample", "test")):
            values = np.sort(quality.series[f"{name}_distances"])
            shares = np.arange(1, len(values) + 1) / len(values)
            axes.step(
                values,
                100 * shares,
                where="post",
                color=figures.COLOURS[number],
                linestyle=figures.DASHES[number],
                linewidth=1.5,
                label={"sample": "samples", "test": "test images"}[name],
            )
        axes.set(
            xlabel="L2 distance to the nearest training image", ylabel="share (%)", ylim=(0, 100)
        )
        axes.set_xlim(left=0)
        axes.grid()
        figures.add_legend(figure, axes)
        return figure


def latents_figure(quality: Quality) -> Figure:
    """Mean and deviation of each latent over test images and over draws, sorted by the deviation."""
    with figures.style():
        figure, panes = figures.new_figure(7.6, 2.8, columns=2)
        order = np.argsort(quality.series["code_deviation"])[::-1]
        places = np.arange(1, len(order) + 1)
        for pane, kind in zip(panes, ("mean", "deviation"), strict=True):
            for number, (name, label) in enumerate((("draw", "draws"), ("code", "test images"))):
                pane.plot(
                    places,
                    np.asarray(quality.series[f"{name}_{kind}"])[order],
                    linestyle="none",
                    marker=figures.MARKERS[1 - number],
                    markersize=4 if len(order) <= _FEW else 1.5,
                    markeredgewidth=0,
                    alpha=0.85,
                    color=figures.COLOURS[1 - number],
                    label=label,
                )
            pane.set(
                title=f"{kind} of each latent", xlabel="latents, by deviation over test images"
            )
            pane.grid(axis="y")
        highest = max(max(quality.series[f"{name}_deviation"]) for name in ("draw", "code"))
        panes[1].set_ylim(0, 1.08 * highest or 1)
        figures.add_legend(figure, panes[0])
        return figure


def history_figure(history: Sequence[Mapping[str, Any]]) -> Figure | None:
    """What was recorded over the epochs, validation first, at most four panels; None where there is nothing."""
    keys = dict.fromkeys(
        key for record in history for key, value in record.items() if _is_number(value)
    )
    measured = [key for key in keys if key.startswith("validation_")]
    measured += [key for key in keys if key.startswith("train_")]
    panels = {key.replace("_", " "): (key, 1.0) for key in measured[:_PANELS]}
    return figures.training_figure({"": [history]}, panels)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_DISTANCES = (
    "Distance to training images",
    "How many samples, and how many test images, are nearer than that to some training image. Copying pulls the "
    "samples' curve to the left of that of the test images; so does blur, since smooth images are near to many.",
)
_LATENTS = (
    "Latents",
    "Codes of test images beside codes drawn from the manifold's own distribution. Where the two differ, samples "
    "come from elsewhere than images do; a deviation near 0 is a latent that says nothing.",
)
_TRAINING = (
    "",
    "The manifold while it was fitted. Validation images are held out from the training images.",
)


def _facts(
    manifold: Manifold, quality: Quality, history: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    facts = quality.facts
    weights = sum(parameter.numel() for parameter in manifold.parameters())
    box = "none" if manifold.box is None else f"[−{manifold.box:g}, {manifold.box:g}]"
    found = [
        ("Manifold", str(facts["fingerprint"])),
        ("Latents", f"{manifold.latent_size:,} in {len(manifold.levels)} levels, box {box}"),
        ("Exact", "yes" if manifold.exact else "no"),
        ("Weights", f"{weights:,}"),
        ("Training images", _dataset(facts["train"])),
        ("Test images", f"{_dataset(facts['test'])}; {facts['encoded']:,} of them encoded"),
        ("Codes", "as stored with the images" if facts["stored_codes"] else "from the encoder"),
        ("Samples", f"{facts['samples']:,}"),
        ("Classifier", str(facts["classifier"] or "none")),
        ("Perceptual distance", str(facts["perceptual"])),
        ("Epochs", str(len(history)) if history else "none"),
        ("Seed", str(facts["seed"])),
    ]
    return found


def _dataset(facts: Mapping[str, Any]) -> str:
    return f"{facts['images']:,} of {facts['name']} ({facts['fingerprint']})"
