"""PGD-20 against the floor and against peers, all in one interleaved run: ``python benchmarks/attacks.py``.

The floor is what no attack can avoid: steps × (forward + backward to the input) of the folded, channels_last
float32 model alone. Ratios are medians over rounds of times taken in the same round; bare seconds say little
on a machine that others use.
"""

from __future__ import annotations

import argparse
import copy
import os
import warnings
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import foolbox
import torch
import torchattacks
from torch import Tensor, nn

import onmanifold as om
from benchmarks.timing import interleave, ratio
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


def candidates(
    model: nn.Module, images: Tensor, labels: Tensor, radius: float, early: bool
) -> dict[str, Callable[[], object]]:
    """The attack by onmanifold and by its peers, at equal settings."""
    step = radius / 4
    ball = om.ImageBall(norm="linf", radius=radius)
    ours = om.PGD(ball, steps=STEPS, step_size=step, early_stop=False)
    low = om.PGD(
        ball, steps=STEPS, step_size=step, early_stop=False, engine=om.Engine(precision="bf16")
    )
    dropping = om.PGD(ball, steps=STEPS, step_size=step, early_stop=True)
    theirs = torchattacks.PGD(model, eps=radius, alpha=step, steps=STEPS, random_start=True)
    box = foolbox.PyTorchModel(model, bounds=(0, 1))
    fool = foolbox.attacks.LinfPGD(abs_stepsize=step, steps=STEPS, random_start=True)
    compiled = om.Engine(precision="bf16", compile=True)
    fused = om.PGD(ball, steps=STEPS, step_size=step, early_stop=False, engine=compiled)
    calls: dict[str, Callable[[], object]] = {
        "floor": floor(model, images, labels),
        "onmanifold": lambda: ours(model, images, labels),
        "onmanifold bf16": lambda: low(model, images, labels),
        "torchattacks": lambda: theirs(images, labels),
        "foolbox": lambda: fool(box, images, labels, epsilons=radius),
    }
    if images.is_cuda:
        calls["onmanifold bf16, compiled"] = lambda: fused(model, images, labels)
    if early:
        calls["onmanifold, fooled dropped"] = lambda: dropping(model, images, labels)
    return calls


def trained(batch: int, device: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The small net normally trained on Fashion-MNIST (FONTS where that is missing), and test images."""
    try:
        train, test = (om.load_dataset("fashion_mnist", split) for split in ("train", "test"))
    except om.OnManifoldError:
        train, test = (om.load_dataset("fonts", split) for split in ("train", "test"))
    config = {"epochs": 2, "validation_fraction": 0}
    model = om.train("normal", "conv_net", train.take(20_000), config).classifier
    images, labels, *_ = test.batch(torch.arange(batch), device)
    return model.to(device), images, labels


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
    parser.add_argument("--only", choices=["conv_net", "resnet18", "wide_resnet"])
    parser.add_argument("--batch", type=int, help="images per batch, in place of each model's own")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    settings = {
        "conv_net": ((1, 28, 28), 256, 0.1),
        "resnet18": ((3, 32, 32), 64, 8 / 255),
        "wide_resnet": ((3, 32, 32), 256, 8 / 255),
    }
    chosen = [arguments.only] if arguments.only else ["conv_net", "resnet18"]
    for name in chosen:
        shape, batch, radius = settings[name]
        batch = arguments.batch or batch
        if name == "conv_net":
            model, images, labels = trained(batch, arguments.device)
        else:
            model, images, labels = untrained(name, shape, batch, arguments.device)
        calls = candidates(model, images, labels, radius, early=name == "conv_net")
        seconds = interleave(calls, rounds=arguments.rounds)
        print(f"\nPGD-{STEPS}, {name}, batch {batch}, {torch.get_num_threads()} threads")
        print(f"{'':28}{'× floor':>10}{'× onmanifold':>14}")
        for call in calls:
            floors, ours = ratio(seconds, call, "floor"), ratio(seconds, call, "onmanifold")
            print(f"{call:28}{floors:10.3f}{ours:14.3f}")


if __name__ == "__main__":
    main()
