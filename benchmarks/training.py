"""A step of adversarial training against the plain loop: ``python -m benchmarks.training``.

The plain loop is what tutorials show: PGD on the model as it stands in train mode, gradients to its parameters
computed in the attack too. Ratios are medians over rounds of times taken in the same round. ``--quality``
instead trains the small net both ways on Fashion-MNIST and compares what comes out, over seeds.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

import onmanifold as om
from benchmarks.timing import interleave, ratio

STEPS = 10
Calls = dict[str, Callable[[], object]]


def plain_attack(model: nn.Module, images: Tensor, labels: Tensor, radius: float) -> Tensor:
    """PGD-10 as tutorials write it."""
    step = radius / 4
    points = (images + torch.empty_like(images).uniform_(-radius, radius)).clamp(0, 1)
    for _ in range(STEPS):
        points = points.detach().requires_grad_()
        loss = functional.cross_entropy(model(points), labels)
        loss.backward()
        moved = points.detach() + step * points.grad.sign()
        points = torch.min(torch.max(moved, images - radius), images + radius).clamp(0, 1)
    return points.detach()


def trainer(
    model: nn.Module, attack: Callable[[nn.Module, Tensor, Tensor], Tensor]
) -> Callable[[Tensor, Tensor], None]:
    """A training step of SGD on the examples of an attack."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step(images: Tensor, labels: Tensor) -> None:
        model.train()
        examples = attack(model, images, labels)
        optimizer.zero_grad()
        functional.cross_entropy(model(examples), labels).backward()
        optimizer.step()

    return step


def steps(name: str, shape: tuple[int, int, int], batch: int, radius: float, device: str) -> Calls:
    """A training step by each way, by name."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, *shape, generator=generator).to(device)
    labels = torch.randint(0, 10, (batch,), generator=generator).to(device)
    model = om.build_classifier(name, num_classes=10, image_shape=shape, seed=0).to(device)
    ball = om.ImageBall(norm="linf", radius=radius)
    pgd = om.PGD(ball, steps=STEPS, step_size=radius / 4, early_stop=False)
    bf16 = om.Engine(precision="bf16")
    ways = {
        "plain loop": lambda net, x, y: plain_attack(net, x, y, radius),
        "onmanifold": lambda net, x, y: pgd.examples(net, x, y),
        "onmanifold, attack in bf16": lambda net, x, y: pgd.examples(net, x, y, engine=bf16),
    }

    def repeated(way: str) -> Callable[[], object]:
        net = copy.deepcopy(model)
        if way != "plain loop":
            net = net.to(memory_format=torch.channels_last)
        step = trainer(net, ways[way])
        repeats = 5 if name == "conv_net" else 1
        return lambda: [step(images, labels) for _ in range(repeats)]

    return {way: repeated(way) for way in ways}


def speed(rounds: int, only: str | None, batch_size: int | None, device: str) -> None:
    """Print the ratios of a step's time."""
    settings = {
        "conv_net": ((1, 28, 28), 100, 0.1),
        "resnet18": ((3, 32, 32), 64, 8 / 255),
        "wide_resnet": ((3, 32, 32), 256, 8 / 255),
    }
    for name, (shape, batch, radius) in settings.items():
        if name != only and (only is not None or name == "wide_resnet"):
            continue
        batch = batch_size or batch
        calls = steps(name, shape, batch, radius, device)
        seconds = interleave(calls, rounds=rounds)
        print(f"\nAT [PGD-{STEPS}] step, {name}, batch {batch}, {torch.get_num_threads()} threads")
        for way in calls:
            print(f"{way:28}{ratio(seconds, 'plain loop', way):8.2f} × as fast as the plain loop")


def quality(seeds: int, epochs: int, images: int) -> None:
    """Train the small net both ways; print clean and PGD-50 accuracy of each seed."""
    train = om.load_dataset("fashion_mnist", "train").take(images)
    test = om.load_dataset("fashion_mnist", "test").take(2000)
    radius = 0.1
    ball = om.ImageBall(norm="linf", radius=radius)
    pgd = om.PGD(ball, steps=STEPS, step_size=radius / 4, early_stop=False)
    pgd50 = om.PGD(ball, steps=50, step_size=0.01)
    ways = {
        "plain loop": lambda net, x, y: plain_attack(net, x, y, radius),
        "onmanifold": lambda net, x, y: pgd.examples(net, x, y),
    }
    for way, attack in ways.items():
        for seed in range(seeds):
            torch.manual_seed(seed)
            net = om.build_classifier("conv_net", 10, train.image_shape, seed=seed)
            step = trainer(net, attack)
            for _ in range(epochs):
                for positions in torch.randperm(len(train)).split(100):
                    batch = train.batch(positions)
                    step(batch.images, batch.labels)
            result = om.evaluate(net.eval(), test, {"PGD-50": pgd50})
            clean, robust = result.accuracy("standard"), result.accuracy("PGD-50")
            print(f"{way:12} seed {seed}: clean {100 * clean:5.2f}  PGD-50 {100 * robust:5.2f}")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["resnet18", "conv_net", "wide_resnet"])
    parser.add_argument("--batch", type=int, help="images per step, in place of each model's own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, default=10_000)
    arguments = parser.parse_args()
    if arguments.quality:
        quality(arguments.seeds, arguments.epochs, arguments.images)
    else:
        speed(arguments.rounds, arguments.only, arguments.batch, arguments.device)


if __name__ == "__main__":
    main()
