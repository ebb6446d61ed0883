"""Draws docs/images/unseen-<dataset>.png: the unseen attacks of DMAT on a normally trained network.

Prints the network's accuracy under each attack. Needs CIFAR-10 and Fashion-MNIST under $ONMANIFOLD_DATA. Run
from the repository's root: ``python docs/figures/unseen_sheet.py --weights runs/unseen``. Trained networks are
kept in that folder; training them takes five minutes on one processor.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import torch
from torch import Tensor, nn

import onmanifold as om
from onmanifold.evaluation.unseen import unseen_attacks

mpl.use("Agg")
import matplotlib.pyplot as plt

IMAGES = Path(__file__).parents[1] / "images"
COLUMNS = 8


class Plan(NamedTuple):
    """How a network is trained on a dataset."""

    training_images: int
    epochs: int
    augmentation: om.Augmentation


PLANS = {
    "cifar10": Plan(8000, 14, om.Augmentation(flip=True, crop_padding=4)),
    "fashion_mnist": Plan(6000, 6, om.Augmentation()),
}


class Row(NamedTuple):
    """Images of one attack, and what the network says of them."""

    name: str
    accuracy: float
    images: Tensor
    predictions: Tensor


def network(name: str, weights: Path) -> nn.Module:
    """A small residual network, loaded or trained."""
    path, plan = weights / f"normal-{name}.safetensors", PLANS[name]
    if not path.exists():
        data = om.load_dataset(name, "train").take(plan.training_images)
        config = om.TrainingConfig(
            epochs=plan.epochs,
            learning_rate=0.003,
            schedule="cosine",
            augmentation=plan.augmentation,
            validation_fraction=0.0,
        )
        untrained = om.build_classifier("resnet13", 10, data.image_shape, seed=0, width=16)
        om.save_classifier(om.train("normal", untrained, data, config).classifier, path)
    return om.load_classifier(path).eval()


def rows(model: nn.Module, data: om.Dataset, steps: int) -> list[Row]:
    """Clean images and every attack; accuracies are over all of ``data``.

    Shown are the first images that the network gets right.
    """
    attacks = unseen_attacks("dmat", data.image_shape, steps)
    evaluation = om.evaluate(model, data, attacks)
    right = torch.from_numpy(evaluation.correct()).nonzero().squeeze(1)
    batch = data.batch(right[:COLUMNS])
    found = [Row("clean", evaluation.accuracy(), batch.images, batch.labels)]
    for name, attack in attacks.items():
        result = attack(model, batch.images, batch.labels, indices=batch.indices)
        found.append(Row(name, evaluation.accuracy(name), result.images, result.predictions))
    return found


def draw(found: list[Row], classes: tuple[str, ...], path: Path) -> None:
    """Write the sheet: a row per attack, under each image what the network takes it for."""
    size = (1.25 * COLUMNS + 1.2, 1.42 * len(found))
    figure, axes = plt.subplots(len(found), COLUMNS, figsize=size, squeeze=False)
    for cells, row in zip(axes, found, strict=True):
        for cell, image, guess, label in zip(
            cells, row.images, row.predictions, found[0].predictions, strict=True
        ):
            cell.imshow(image.permute(1, 2, 0), cmap="gray", vmin=0, vmax=1)
            cell.set(xticks=[], yticks=[])
            right = bool(guess == label)
            cell.set_xlabel(
                classes[guess], fontsize=8, labelpad=2, color="black" if right else "tab:red"
            )
        heading = f"{row.name}\n{100 * row.accuracy:.1f} %"
        cells[0].set_ylabel(heading, rotation=0, ha="right", va="center", labelpad=8)
    figure.subplots_adjust(left=0.12, right=0.995, top=0.995, bottom=0.025, wspace=0.06, hspace=0.2)
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Train or load, attack, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=Path("runs/unseen"))
    parser.add_argument("--images", type=int, default=200, help="test images attacked")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--datasets", nargs="+", choices=list(PLANS), default=list(PLANS))
    arguments = parser.parse_args()
    arguments.weights.mkdir(parents=True, exist_ok=True)
    for name in arguments.datasets:
        data = om.load_dataset(name, "test").take(arguments.images)
        found = rows(network(name, arguments.weights), data, arguments.steps)
        for row in found:
            print(f"{name:14} {row.name:8} {100 * row.accuracy:5.1f} %")
        draw(found, data.classes, IMAGES / f"unseen-{name}.png")


if __name__ == "__main__":
    main()
