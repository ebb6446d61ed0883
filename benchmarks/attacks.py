"""PGD-20 against the floor and against peers, all in one interleaved run: ``python benchmarks/attacks.py``.

The floor is what no attack can avoid: steps × (forward + backward to the input) of the folded, channels_last
float32 model alone, with the memory setting of the engine. Ratios are medians over rounds of times taken in the
same round; bare seconds say little on a machine that others use. Each candidate runs in a process of its own, as
its users run it; ``--together`` runs all in one, where the peers profit from that setting.
"""

from __future__ import annotations

import argparse
import copy
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor, nn

import onmanifold as om
from benchmarks.timing import interleave, interleave_apart, ratio
from onmanifold.attacks.engine import frozen
from onmanifold.attacks.threads import own_threads, suitable_threads

STEPS = 20


def floor(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], object]:
    """Steps × forward and backward to the input of the folded model, on the engine's threads."""
    with frozen(model, images, om.Engine()) as network:
        alone = copy.deepcopy(network)

    def call() -> None:
        points = images.contiguous(memory_format=torch.channels_last).requires_grad_()
        with own_threads(suitable_threads(model, images)):
            for _ in range(STEPS):
                torch.autograd.grad(alone(points).sum(), points)
        points.requires_grad_(False)

    return call


SETTINGS = {
    "conv_net": ((1, 28, 28), 256, 0.1),
    "resnet18": ((3, 32, 32), 64, 8 / 255),
    "wide_resnet": ((3, 32, 32), 256, 8 / 255),
}
OURS = {
    "onmanifold": {},
    "onmanifold bf16": {"engine": {"precision": "bf16"}},
    "onmanifold bf16, compiled": {"engine": {"precision": "bf16", "compile": True}},
    "onmanifold, fooled dropped": {"early_stop": True},
}


class Task(NamedTuple):
    """What is attacked."""

    network: str
    batch: int
    device: str
    folder: Path


def candidate(name: str, task: Task) -> Callable[[], object]:
    """One attack, by onmanifold or a peer, or the floor; all at equal settings."""
    warnings.filterwarnings("ignore")
    shape, _, radius = SETTINGS[task.network]
    step = radius / 4
    if task.network == "conv_net":
        model, images, labels = trained(task)
    else:
        model, images, labels = untrained(task.network, shape, task.batch, task.device)
    if name == "floor":
        return floor(model, images, labels)
    if name == "torchattacks":
        import torchattacks

        theirs = torchattacks.PGD(model, eps=radius, alpha=step, steps=STEPS, random_start=True)
        return lambda: theirs(images, labels)
    if name == "foolbox":
        import foolbox

        box = foolbox.PyTorchModel(model, bounds=(0, 1), device=task.device)
        fool = foolbox.attacks.LinfPGD(abs_stepsize=step, steps=STEPS, random_start=True)
        return lambda: fool(box, images, labels, epsilons=radius)
    fields = {"early_stop": False, **OURS[name]}
    engine = om.Engine(**fields.pop("engine", {}))
    ball = om.ImageBall(norm="linf", radius=radius)
    ours = om.PGD(ball, steps=STEPS, step_size=step, engine=engine, **fields)
    return lambda: ours(model, images, labels)


def trained(task: Task) -> tuple[nn.Module, Tensor, Tensor]:
    """The small net normally trained on Fashion-MNIST (FONTS where that is missing), and test images."""
    try:
        name, test = "fashion_mnist", om.load_dataset("fashion_mnist", "test")
    except om.OnManifoldError:
        name, test = "fonts", om.load_dataset("fonts", "test")
    path = task.folder / f"normal_{name}.safetensors"
    if not path.exists():
        config = {"epochs": 2, "validation_fraction": 0}
        train = om.load_dataset(name, "train").take(20_000)
        om.save_classifier(om.train("normal", "conv_net", train, config).classifier, path)
    images, labels, *_ = test.batch(torch.arange(task.batch), task.device)
    return om.load_classifier(path).eval().to(task.device), images, labels


def untrained(
    name: str, shape: tuple[int, int, int], batch: int, device: str
) -> tuple[nn.Module, Tensor, Tensor]:
    """A network with batch-norm statistics of its own, images, and the labels it gives them."""
    model = om.build_classifier(name, num_classes=10, image_shape=shape, seed=0).to(device).train()
    images = torch.rand(batch, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        for _ in range(3):
            model(images)
        return model.eval(), images, model(images).argmax(1)


def main() -> None:
    """Print a table of ratios for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=list(SETTINGS))
    parser.add_argument("--batch", type=int, help="images per batch, in place of each model's own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--together", action="store_true", help="all in one process")
    parser.add_argument("--keep", type=Path, default=Path("runs/benchmarks"))
    arguments = parser.parse_args()
    for network in [arguments.only] if arguments.only else ["conv_net", "resnet18"]:
        batch = arguments.batch or SETTINGS[network][1]
        task = Task(network, batch, arguments.device, arguments.keep)
        names = ["floor", "onmanifold", "onmanifold bf16", "torchattacks", "foolbox"]
        if arguments.device != "cpu":
            names.append("onmanifold bf16, compiled")
        if network == "conv_net":
            trained(task)  # once, before several processes look for it
            names.append("onmanifold, fooled dropped")
        if arguments.together:
            calls = {name: candidate(name, task) for name in names}
            seconds = interleave(calls, rounds=arguments.rounds)
        else:
            seconds = interleave_apart(candidate, names, task, rounds=arguments.rounds)
        print(f"\nPGD-{STEPS}, {network}, batch {batch}, {torch.get_num_threads()} threads")
        print(f"{'':28}{'× floor':>10}{'× onmanifold':>14}")
        for name in names:
            floors, ours = ratio(seconds, name, "floor"), ratio(seconds, name, "onmanifold")
            print(f"{name:28}{floors:10.3f}{ours:14.3f}")


if __name__ == "__main__":
    main()
