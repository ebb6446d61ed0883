"""AutoAttack beside its public reference implementation: ``python -m benchmarks.autoattack``.

A small net adversarially trained on Fashion-MNIST here (or a small ResNet on CIFAR-10 with ``--cifar``), attacked
by the standard version of both, in turns. Each runs in a process of its own, as its users run it: onmanifold
changes how its process keeps memory, by which the others would profit too. ``--together`` lets them.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import statistics
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import onmanifold as om

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


class Task(NamedTuple):
    """What is attacked, so that another process can be told."""

    dataset: str
    folder: Path
    device: str
    norm: str
    images: int


class Outcome(NamedTuple):
    """What an attack did: seconds, which samples withstood it, and which member fooled the model how often."""

    seconds: float
    robust: Tensor
    found: dict[str | None, int]


def onmanifold(task: Task) -> Outcome:
    """Ours."""
    model, images, labels = prepared(task)
    attack = om.AutoAttack(om.ImageBall(task.norm, RADII[task.dataset][task.norm]))
    begin = now(task.device)
    result = attack(model, images, labels)
    seconds = now(task.device) - begin
    return Outcome(seconds, ~result.success.cpu(), dict(Counter(result.found_by or ())))


def reference(task: Task) -> Outcome:
    """The reference implementation."""
    from pyautoattack import AutoAttack

    model, images, labels = prepared(task)
    attack = AutoAttack(
        model,
        norm=NORMS[task.norm],
        eps=RADII[task.dataset][task.norm],
        version="standard",
        seed=0,
        device=task.device,
    )
    begin = now(task.device)
    found: Any = attack.run_standard_evaluation(images, labels, batch_size=len(images))
    seconds = now(task.device) - begin
    return judged(model, found[0] if isinstance(found, tuple) else found, labels, seconds)


def torchattacks(task: Task) -> Outcome:
    """The same members at the same settings in torchattacks, whose own default takes 10 steps."""
    import torchattacks as ta

    model, images, labels = prepared(task)
    settings = {"norm": NORMS[task.norm], "eps": RADII[task.dataset][task.norm], "seed": 0}
    members = [
        ta.APGD(model, steps=100, loss="ce", n_restarts=1, **settings),
        ta.APGDT(model, steps=100, n_restarts=1, n_classes=10, **settings),
        ta.FAB(model, steps=100, n_restarts=1, multi_targeted=True, n_classes=10, **settings),
        ta.Square(model, n_queries=5000, n_restarts=1, **settings),
    ]
    attack = ta.MultiAttack(members)
    begin = now(task.device)
    adversarial = attack(images, labels)
    return judged(model, adversarial, labels, now(task.device) - begin)


def prepared(task: Task) -> tuple[nn.Module, Tensor, Tensor]:
    """The model and the images."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    model = adversarially_trained(task.dataset, task.folder, task.device)
    test = om.load_dataset(task.dataset, "test")
    images, labels, *_ = test.batch(torch.arange(task.images), task.device)
    return model, images, labels


def judged(model: nn.Module, images: Tensor, labels: Tensor, seconds: float) -> Outcome:
    """What the model says of a peer's images."""
    with torch.no_grad():
        return Outcome(seconds, (model(images).argmax(1) == labels).cpu(), {})


def now(device: str) -> float:
    """The clock, once a GPU has done all that it was given."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def compare(task: Task, peers: list[Any], rounds: int, together: bool) -> None:
    """Print accuracies and the ratios of times, medians over rounds."""
    outcomes: dict[str, list[Outcome]] = {}
    calls = [*peers, onmanifold]
    with ExitStack() as stack:
        context = multiprocessing.get_context("spawn")
        pools = [ProcessPoolExecutor(1, context) for _ in calls[: 1 if together else None]]
        for pool in pools:
            stack.enter_context(pool)
        for _ in range(rounds):
            for place, call in enumerate(calls):
                done = pools[0 if together else place].submit(call, task).result()
                outcomes.setdefault(call.__name__, []).append(done)
    radius = RADII[task.dataset][task.norm]
    print(
        f"\nAutoAttack standard, {task.norm} {radius:.4g}, {task.images} images of {task.dataset}, "
        f"{torch.get_num_threads()} threads"
    )
    for name, done in outcomes.items():
        pairs = zip(outcomes["onmanifold"], done, strict=True)
        ratio = statistics.median(ours.seconds / theirs.seconds for ours, theirs in pairs)
        robust = 100 * done[-1].robust.float().mean().item()
        print(f"{name:14} robust accuracy {robust:6.2f}   onmanifold takes {ratio:.3f} × its time")
    print(f"found by {outcomes['onmanifold'][-1].found}", flush=True)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--norms", nargs="+", choices=list(NORMS), default=["linf"])
    parser.add_argument("--cifar", action="store_true")
    parser.add_argument("--torchattacks", action="store_true", help="that peer too; linf and l2")
    parser.add_argument("--together", action="store_true", help="all in one process")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--keep", type=Path, default=Path("runs/benchmarks"))
    arguments = parser.parse_args()
    dataset = "cifar10" if arguments.cifar else "fashion_mnist"
    adversarially_trained(dataset, arguments.keep, arguments.device)
    for norm in arguments.norms:
        task = Task(dataset, arguments.keep, arguments.device, norm, arguments.images)
        peers = [reference, torchattacks] if arguments.torchattacks else [reference]
        compare(task, peers, arguments.rounds, arguments.together)


if __name__ == "__main__":
    main()
