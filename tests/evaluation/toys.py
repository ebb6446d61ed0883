"""A small model, dataset and attacks; as a script, an evaluation in a process of its own."""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from onmanifold.attacks import FGSM, PGD, Attack, AttackResult
from onmanifold.data.dataset import Dataset
from onmanifold.evaluation import Evaluation, evaluate
from onmanifold.foundation.errors import InputError, OnManifoldError
from onmanifold.manifolds.base import Manifold
from onmanifold.threats import ImageBall, LatentBall

SHAPE = (1, 6, 6)
BALL = ImageBall(norm="linf", radius=0.02)


class Plane(Manifold):
    """Images sigmoid(W code) of two latents."""

    name, code_size, latent_size, image_shape = "plane", 2, 2, SHAPE
    fingerprint = "plane"

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.register_buffer("weight", torch.randn(2, 36, generator=generator, dtype=torch.float64))

    def encode(self, images: Tensor, labels: Tensor) -> Tensor:
        return torch.logit(images.clamp(1e-6, 1 - 1e-6)).flatten(1) @ torch.linalg.pinv(
            self.weight
        ).to(images)

    def decode(self, codes: Tensor) -> Tensor:
        return torch.sigmoid(codes @ self.weight.to(codes)).view(-1, *SHAPE)


def make_model(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64, 3),
        )
        model(torch.rand(64, *SHAPE))  # running statistics that are not the initial ones
        return model


def make_dataset(count: int = 30) -> Dataset:
    """Points of the plane, labelled as the model sees them, every fifth wrongly; indices from 1000 on."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randn(count, 2, generator=generator)
    images = Plane().decode(codes)
    labels = make_model().eval()(images).argmax(1)
    labels[::5] = (labels[::5] + 1) % 3
    return Dataset(
        name="plane",
        images=images,
        labels=labels,
        classes=("a", "b", "c"),
        codes=codes,
        indices=torch.arange(1000, 1000 + count),
        fingerprint="plane",
    )


def make_attacks() -> dict[str, Attack]:
    return {
        "FGSM": FGSM(BALL),
        "PGD-5": PGD(BALL, steps=5, restarts=2),
        "OM-PGD-5": PGD(LatentBall(Plane(), norm="l2", radius=0.1), steps=5),
    }


@dataclass(frozen=True)
class Counting(PGD):
    """PGD that writes down which samples it was called for, and may fail or take its time.

    It has a name of its own, the same where this file is run and where it is imported, since results are kept
    under it; switches in the environment make it fail, so that its key stays the same.
    """

    registered_name = "counting"

    log: str = ""

    def __call__(
        self, model: nn.Module, images: Tensor, *args: object, **options: object
    ) -> AttackResult:
        calls = Path(self.log).read_text().split() if Path(self.log).exists() else []
        if len(calls) == int(os.environ.get("TOY_FAIL_AFTER", "-1")):
            raise KeyboardInterrupt
        time.sleep(float(os.environ.get("TOY_PAUSE", "0")))
        result = super().__call__(model, images, *args, **options)
        with open(self.log, "a") as file:
            file.write(f"{self.steps}/{int(options['indices'][0])}\n")
        return result


def counting_attacks(log: Path) -> dict[str, Attack]:
    return {f"PGD-{steps}": Counting(BALL, steps=steps, log=str(log)) for steps in (2, 3)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.processes == 1:
        attacks = counting_attacks(arguments.folder / "calls.txt")
        evaluate(
            make_model(), make_dataset(), attacks, batch_size=3, directory=arguments.folder / "run"
        )
        return
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=arguments.processes, strategy="ddp")
    fabric.launch()
    model = fabric.setup_module(make_model().double())
    for name, directory in (("memory", None), ("shared", arguments.folder / "run")):
        # 30 samples in batches of 4: 8 batches; in batches of 25: the second process has one, of 5 samples.
        for batch_size in (4, 25, 30):
            evaluation: Evaluation = evaluate(
                model,
                make_dataset(),
                make_attacks(),
                batch_size=batch_size,
                directory=directory,
                fabric=fabric,
            )
            path = arguments.folder / f"{name}-{batch_size}-{fabric.global_rank}.parquet"
            evaluation.save(path)

    def refuses(model: nn.Module, images: Tensor, *args: object, **options: object) -> AttackResult:
        if fabric.global_rank == 1:
            raise InputError("no such image")
        return FGSM(BALL)(model, images, *args, **options)

    try:
        evaluate(model, make_dataset(), {"A": refuses}, batch_size=4, fabric=fabric)
    except OnManifoldError as error:
        (arguments.folder / f"error-{fabric.global_rank}.txt").write_text(str(error))


if __name__ == "__main__":
    main()
