"""AutoAttack beside its public reference implementation: ``python -m benchmarks.autoattack``.

A small net adversarially trained on Fashion-MNIST here (or a small ResNet on CIFAR-10 with ``--cifar``), attacked
by the standard version of both in one process, in turns. The reference profits from the memory setting that
onmanifold makes for the process, so its time is the best it has.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections import Counter
from pathlib import Path

import torch
from pyautoattack import AutoAttack as Reference
from torch import Tensor, nn

import onmanifold as om
from benchmarks.timing import interleave, ratio

NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
# Radii at which the nets below keep part of their accuracy.
RADII = {
    "fashion_mnist": {"linf": 0.1, "l2": 1.0, "l1": 8.0},
    "cifar10": {"linf": 8 / 255, "l2": 0.5, "l1": 12.0},
}


def adversarially_trained(dataset: str, folder: Path, device: str) -> nn.Module:
    """A net trained with PGD-5 (small) or PGD-3 (CIFAR-10); kept in the folder for the next run."""
    small = dataset == "fashion_mnist"
    path = folder / f"at_{dataset}.safetensors"
    if not path.exists():
        train = om.load_dataset(dataset, "train").take(20_000 if small else 10_000)
        pgd = om.PGD(om.ImageBall("linf", RADII[dataset]["linf"]), steps=5 if small else 3)
        config = {"epochs": 5 if small else 4, "schedule": "cosine"}
        network = "conv_net" if small else {"type": "resnet13", "width": 16}
        found = om.train(om.AdversarialTraining(pgd), network, train, config, progress=True)
        om.save_classifier(found.classifier, path)
    return om.load_classifier(path).eval().to(device)


def compare(
    model: nn.Module, images: Tensor, labels: Tensor, norm: str, radius: float, rounds: int
) -> None:
    """Print accuracies and the ratio of times."""
    attack = om.AutoAttack(om.ImageBall(norm, radius))
    results: dict[str, Tensor] = {}
    found: Counter[str | None] = Counter()

    def ours() -> None:
        result = attack(model, images, labels)
        results["onmanifold"] = ~result.success
        found.clear()
        found.update(result.found_by or ())

    def theirs() -> None:
        reference = Reference(
            model, norm=NORMS[norm], eps=radius, version="standard", seed=0, device=images.device
        )
        found = reference.run_standard_evaluation(images, labels, batch_size=len(images))
        adversarial = found[0] if isinstance(found, tuple) else found
        with torch.no_grad():
            results["reference"] = model(adversarial).argmax(1) == labels

    seconds = interleave({"reference": theirs, "onmanifold": ours}, rounds=rounds, warmup=0)
    robust = {name: 100 * kept.float().mean().item() for name, kept in results.items()}
    print(
        f"AutoAttack standard, {norm} {radius:.4g}, {len(images)} images, "
        f"{torch.get_num_threads()} threads: robust accuracy {robust['reference']:.2f} (reference), "
        f"{robust['onmanifold']:.2f} (onmanifold); time {ratio(seconds, 'onmanifold', 'reference'):.3f} × "
        f"the reference's; found by {dict(found)}",
        flush=True,
    )


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--norms", nargs="+", choices=list(NORMS), default=["linf"])
    parser.add_argument("--cifar", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--keep", type=Path, default=Path("runs/benchmarks"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    dataset = "cifar10" if arguments.cifar else "fashion_mnist"
    model = adversarially_trained(dataset, arguments.keep, arguments.device)
    test = om.load_dataset(dataset, "test")
    images, labels, *_ = test.batch(torch.arange(arguments.images), arguments.device)
    for norm in arguments.norms:
        compare(model, images, labels, norm, RADII[dataset][norm], arguments.rounds)


if __name__ == "__main__":
    main()
