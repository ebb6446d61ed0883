"""A class-specific VAE-GAN as a manifold: what on-manifold attacks find on it, and how far from it they are.

    onmanifold fit experiments/manifolds/vae_gan_fonts.yaml
    python docs/figures/learned_manifolds.py fonts --manifold runs/vae_gan_fonts/best.safetensors
    onmanifold fit experiments/manifolds/vae_gan_fashion.yaml
    python docs/figures/learned_manifolds.py fashion_mnist --manifold runs/vae_gan_fashion/best.safetensors

Draws docs/images/vae-gan-<dataset>.png and prints success rates, the distances of regular and on-manifold examples
to each manifold (Disentangling, section 3.2, figures 3 and 10), and on FONTS, whose class manifolds are known, the
share of on-manifold examples that keep their label.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import torch
from scipy.stats import mannwhitneyu
from torch import Tensor, nn

import onmanifold as om
from onmanifold.analysis.distance import distance_by_neighbours, distance_by_projection
from onmanifold.analysis.validity import nearest_class
from onmanifold.evaluation import wilson_interval

mpl.use("Agg")
import matplotlib.pyplot as plt

IMAGES = Path(__file__).parents[1] / "images"
COLUMNS = 10
# Of the latent box [-2, 2], and of the FONTS parameters' box [-1, 1]; the paper's, section 3.3.
LATENT_RADIUS = 0.3
PIXEL_RADIUS = 0.3
# From the code of the clean image; further starts take five times as long.
DESCENT = om.ProjectionConfig(steps=100, restarts=0)


class Data(NamedTuple):
    """What is attacked."""

    train: om.Dataset
    test: om.Dataset
    exact: om.Manifold | None


def load(name: str, count: int) -> Data:
    """Training images, the first test images, and the exact manifold where there is one."""
    options = {"size": 20_000} if name == "fonts" else {}
    train = om.load_dataset(name, "train", **options).take(20_000)
    test = om.load_dataset(name, "test").take(count)
    return Data(train, test, om.fonts_manifold() if name == "fonts" else None)


def network(data: Data, folder: Path) -> nn.Module:
    """A small net, trained normally; kept in the folder."""
    path = folder / f"normal-{data.train.name}.safetensors"
    if not path.exists():
        config = om.TrainingConfig(epochs=8, schedule="cosine", validation_fraction=0.0)
        om.save_classifier(om.train("normal", "conv_net", data.train, config).classifier, path)
    return om.load_classifier(path).eval()


def attacks(data: Data, manifold: om.Manifold) -> dict[str, om.Attack]:
    """Regular, on the learned manifold and, where it is known, on the exact one."""
    found: dict[str, om.Attack] = {
        "regular": om.PGD(om.ImageBall("linf", PIXEL_RADIUS), steps=40),
        "on-manifold, learned": om.PGD(
            om.LatentBall(manifold, "linf", LATENT_RADIUS), steps=40, restarts=5
        ),
    }
    if data.exact is not None:
        threat = om.LatentBall(data.exact, "linf", LATENT_RADIUS)
        found["on-manifold, exact"] = om.PGD(threat, steps=40, restarts=5)
    return found


class Examples(NamedTuple):
    """Adversarial images of the test images that the network gets right, and which of them fool it."""

    images: Tensor
    success: Tensor


def made(
    model: nn.Module, batch: om.data.Batch, codes: Tensor, all_attacks: dict[str, om.Attack]
) -> dict[str, Examples]:
    """What each attack makes."""
    found = {}
    for name, attack in all_attacks.items():
        own = batch.codes if name.endswith("exact") else codes if "learned" in name else None
        result = attack(model, batch.images, batch.labels, own, indices=batch.indices)
        found[name] = Examples(result.images, result.success)
    return found


def distances(
    data: Data, manifold: om.Manifold, batch: om.data.Batch, codes: Tensor, images: Tensor
) -> dict[str, Tensor]:
    """L2 distances (B,) of images to each manifold, or approximation of it."""
    train = data.train.batch(torch.arange(len(data.train)))
    learned = distance_by_projection(manifold, images, batch.labels, codes, config=DESCENT)
    found = {
        "VAE-GAN": learned.distance,
        "50 neighbours": distance_by_neighbours(train.images, images).distance,
    }
    if data.exact is not None:
        found["exact"] = distance_by_projection(
            data.exact, images, batch.labels, batch.codes
        ).distance
    return found


def report_distances(
    data: Data,
    manifold: om.Manifold,
    batch: om.data.Batch,
    codes: Tensor,
    examples: dict[str, Examples],
) -> None:
    """Means over successful examples, and how well the distance tells regular from on-manifold ones."""
    table = {"test": distances(data, manifold, batch, codes, batch.images)}
    for name, (images, success) in examples.items():
        found = distances(data, manifold, batch, codes, images)
        table[name] = {to: values[success] for to, values in found.items()}
    for to in table["test"]:
        print(f"L2 distance to the manifold ({to}), successful examples:")
        for name, row in table.items():
            mean, deviation = row[to].mean(), row[to].std()
            print(f"  {name:22} {mean:6.3f} ± {deviation:.3f}  (n = {len(row[to])})")
        regular = table["regular"][to]
        for name in table:
            if name.startswith("on-manifold"):
                other = table[name][to]
                rank_sum = mannwhitneyu(regular.numpy(), other.numpy()).statistic
                auc = rank_sum / (len(regular) * len(other))
                print(f"  regular above {name}: AUC {auc:.3f}")


def report_labels(data: Data, batch: om.data.Batch, found: Examples, count: int) -> None:
    """The share of successful examples whose own class manifold is the nearest; the same of clean images."""
    assert data.exact is not None
    rows = found.success.nonzero().squeeze(1)[:count]
    for name, images in (("clean", batch.images), ("on-manifold, learned", found.images)):
        nearest = nearest_class(data.exact, images[rows])
        kept = int((nearest.classes == batch.labels[rows]).sum())
        low, high = wilson_interval(kept, len(rows))
        share = 100 * kept / len(rows)
        print(
            f"keeps its label, {name}: {share:.1f} % [{100 * low:.1f}, {100 * high:.1f}] of {len(rows)}"
        )


def draw(
    data: Data,
    manifold: om.Manifold,
    batch: om.data.Batch,
    codes: Tensor,
    examples: dict[str, Examples],
) -> None:
    """A column for each of the first classes: original, reconstruction, examples; then samples."""
    success = examples["on-manifold, learned"].success
    columns = []
    for label in range(COLUMNS):
        own = (batch.labels == label).nonzero().squeeze(1)
        fooled = own[success[own]]
        columns.append(int((fooled if len(fooled) else own)[0]))
    rows = {"original": batch.images, "reconstruction": manifold.decode(codes)}
    rows |= {name: found.images for name, found in examples.items()}
    strips = {name: images[columns] for name, images in rows.items()}
    labels = torch.arange(3 * COLUMNS) % COLUMNS
    samples = manifold.decode(manifold.sample_codes(labels, seed=1))
    for number, part in enumerate(samples.split(COLUMNS), start=1):
        strips[f"sample {number}"] = part
    figure, axes = plt.subplots(
        len(strips), COLUMNS, figsize=(0.9 * COLUMNS + 1.6, 0.92 * len(strips)), squeeze=False
    )
    for cells, (name, images) in zip(axes, strips.items(), strict=True):
        for cell, image in zip(cells, images, strict=True):
            cell.imshow(image.detach().permute(1, 2, 0), cmap="gray", vmin=0, vmax=1)
            cell.set(xticks=[], yticks=[])
        cells[0].set_ylabel(name.replace(", ", ",\n"), rotation=0, ha="right", va="center")
    for cell, label in zip(axes[0], range(COLUMNS), strict=True):
        cell.set_title(data.test.classes[label], fontsize=9)
    figure.subplots_adjust(left=0.16, right=0.995, top=0.95, bottom=0.01, wspace=0.06, hspace=0.06)
    path = IMAGES / f"vae-gan-{data.test.name}.png"
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)
    print(f"drawn: {path}")


def main() -> None:
    """Attack, measure, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", choices=["fonts", "fashion_mnist"])
    parser.add_argument("--manifold", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1000, help="test images")
    parser.add_argument(
        "--labelled", type=int, default=200, help="examples projected on all classes"
    )
    parser.add_argument("--networks", type=Path, default=Path("runs/networks"))
    arguments = parser.parse_args()
    manifold = om.load_manifold(arguments.manifold)
    data = load(arguments.dataset, arguments.images)
    model = network(data, arguments.networks)
    everything = data.test.batch(torch.arange(len(data.test)))
    with torch.no_grad():
        right = (model(everything.images).argmax(1) == everything.labels).nonzero().squeeze(1)
        batch = data.test.batch(right)
        codes = manifold.encode(batch.images, batch.labels)
        decoded = model(manifold.decode(codes)).argmax(1) == batch.labels
    print(f"{len(right)} of {len(data.test)} test images classified correctly;")
    print(f"of their reconstructions {100 * decoded.float().mean():.1f} %")
    examples = made(model, batch, codes, attacks(data, manifold))
    for name, found in examples.items():
        print(f"success, {name}: {100 * found.success.float().mean():.1f} %")
    report_distances(data, manifold, batch, codes, examples)
    if data.exact is not None:
        report_labels(data, batch, examples["on-manifold, learned"], arguments.labelled)
    with torch.no_grad():
        draw(data, manifold, batch, codes, examples)


if __name__ == "__main__":
    main()
