"""Draws docs/images/corruptions-<dataset>.png: every corruption at every severity, beside clean images.

Needs CIFAR-10 and Fashion-MNIST under $ONMANIFOLD_DATA. Run from the repository's root:
``python docs/figures/corruptions_sheet.py``.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch

from onmanifold.data import Dataset, load_dataset
from onmanifold.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt

mpl.use("Agg")
import matplotlib.pyplot as plt

IMAGES = Path(__file__).parents[1] / "images"
# Two samples side by side in each cell, of different brightness and detail.
SAMPLES = {"cifar10": (7, 13), "fashion_mnist": (0, 18)}


def draw(dataset: Dataset, samples: tuple[int, ...], path: Path) -> None:
    """Write the sheet: a row per corruption, the clean images first, then severities 1 to 5."""
    batch = dataset.batch(torch.tensor(samples))
    headings = ["clean", *(f"severity {severity}" for severity in SEVERITIES)]
    size = (2.1 * len(headings), 1.05 * len(CORRUPTIONS))
    figure, axes = plt.subplots(len(CORRUPTIONS), len(headings), figsize=size, squeeze=False)
    for row, name in zip(axes, CORRUPTIONS, strict=True):
        shown = [batch.images]
        shown += [corrupt(batch.images, name, s, 0, batch.indices) for s in SEVERITIES]
        for cell, images in zip(row, shown, strict=True):
            strip = torch.cat(list(images), dim=2).permute(1, 2, 0)
            cell.imshow(strip, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            cell.set(xticks=[], yticks=[])
            for edge in cell.spines.values():
                edge.set_visible(False)
        label = name.replace("_", "\n", 1)
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10)
    for cell, heading in zip(axes[0], headings, strict=True):
        cell.set_title(heading, fontsize=10)
    figure.subplots_adjust(
        left=0.09, right=0.995, top=0.975, bottom=0.005, wspace=0.04, hspace=0.05
    )
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Draw both sheets."""
    for name, samples in SAMPLES.items():
        draw(load_dataset(name, "test"), samples, IMAGES / f"corruptions-{name}.png")


if __name__ == "__main__":
    main()
