"""What a training step of each method costs, in steps of normal training: ``python -m benchmarks.methods``.

The methods are those of experiments/methods/fonts.yaml, on letters from the fonts inside matplotlib. Ratios are
medians over rounds of times taken in the same round. "its parts" of DMAT is what its two attacks and one update
take one by one; "its parts" of IJSAT on Glow is one encoding, the attack from known codes, and one update.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

import onmanifold as om
from benchmarks.timing import interleave, ratio
from onmanifold.attacks.threads import own_threads
from onmanifold.data.dataset import Batch
from onmanifold.data.fonts import embedded_folder
from onmanifold.experiments.setup import build_parts
from onmanifold.experiments.spec import load_experiment
from onmanifold.foundation.memory import keep_freed_memory
from onmanifold.training import Method, Normal, Step
from onmanifold.training.methods.base import persistent

FILE = Path(__file__).parents[1] / "experiments" / "methods" / "fonts.yaml"
Call = Callable[[], object]


def stepper(method: Method, classifier: nn.Module, batch: Batch) -> Call:
    """A call that takes one step of a method, all its players moving."""
    classifier = copy.deepcopy(classifier).to(memory_format=torch.channels_last).train()
    torch.manual_seed(0)
    players = {"classifier": classifier, **method.players(classifier, batch.images[:1])}
    others = {name: player for name, player in players.items() if name != "classifier"}
    optimizers = {name: torch.optim.Adam(player.parameters()) for name, player in players.items()}

    def call() -> None:
        step = Step(classifier, classifier, *batch, epoch=0, seed=0, players=others)
        for turn in method.turns(step):
            for name, loss in turn.items():
                parameters = list(players[name].parameters())
                found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
                for parameter, gradient in zip(parameters, found, strict=True):
                    parameter.grad = gradient
            for name in turn:
                optimizers[name].step()

    return call


def attacker(attack: om.Attack, classifier: nn.Module, batch: Batch) -> Call:
    """A call that makes one batch of examples as training does."""
    attack, classifier = persistent(attack), copy.deepcopy(classifier).train()
    images, labels, codes, indices = batch
    return lambda: attack.examples(classifier, images, labels, codes, indices=indices)


def letters(count: int) -> tuple[Batch, om.Manifold]:
    """A batch of letters with their codes, and their manifold."""
    fonts = om.load_dataset("fonts", "train", size=count, folder=str(embedded_folder()))
    return fonts.batch(torch.arange(count)), om.fonts_manifold(str(embedded_folder()))


def methods_on_letters(rounds: int, only: Sequence[str], count: int) -> None:
    """Print the cost of each method of the file."""
    batch, manifold = letters(count)
    methods, _, _ = build_parts(load_experiment(FILE), manifold)
    classifier = om.build_classifier("conv_net", 10, (1, 28, 28), seed=0, channels=[32, 64, 128])
    chosen = {name: method for name, method in methods.items() if not only or name in only}
    chosen.setdefault("Normal", Normal())
    calls: dict[str, Call] = {
        name: stepper(method, classifier, batch) for name, method in chosen.items()
    }
    dual = next((name for name in chosen if name.startswith("DMAT [")), None)
    parts = []
    if dual is not None:
        for number, attack in enumerate(chosen[dual].attacks):
            calls[f"attack {number}"] = attacker(attack, classifier, batch)
            parts.append(f"attack {number}")
    seconds = interleave(calls, rounds=rounds)
    for name in chosen:
        print(f"{name:28}{ratio(seconds, name, 'Normal'):8.2f} × a normal step", flush=True)
    if dual is not None:
        # An update of DMAT has two forward and backward passes, one for each kind of examples.
        seconds["its parts"] = [
            sum(times)
            for times in zip(*(seconds[part] for part in (*parts, "Normal", "Normal")), strict=True)
        ]
        seconds["one update"] = [
            sum(times)
            for times in zip(*(seconds[part] for part in (*parts, "Normal")), strict=True)
        ]
        print(
            f"DMAT: {ratio(seconds, dual, 'one update'):.2f} × its two attacks and one update, "
            f"{ratio(seconds, dual, 'its parts'):.2f} × with an update for each attack"
        )


def ijsat_on_glow(rounds: int, count: int) -> None:
    """Print what a step of IJSAT on a small Glow costs beside its parts."""
    images = om.load_dataset("fashion_mnist", "train").take(count)
    batch = images.batch(torch.arange(count))
    glow = om.build_manifold("glow", 10, (1, 28, 28), seed=0, levels=3, steps=4, width=64).eval()
    threat = om.JointBall(om.ImageBall(radius=0.1), om.LatentBall(glow, radius=0.02))
    attack = om.PGD(threat, steps=5, step_size={"image": 0.04, "latent": 0.008})
    classifier = om.build_classifier("conv_net", 10, (1, 28, 28), seed=0)
    with torch.no_grad():
        coded = batch._replace(codes=glow.encode(batch.images, batch.labels))

    def encode() -> None:
        with torch.no_grad():
            glow.encode(batch.images, batch.labels)

    calls = {
        "IJSAT": stepper(om.IJSAT(attack), classifier, batch),
        "Normal": stepper(Normal(), classifier, batch),
        "encoding": encode,
        "attack": attacker(attack, classifier, coded),
    }
    seconds = interleave(calls, rounds=rounds)
    parts = zip(*(seconds[part] for part in ("Normal", "encoding", "attack")), strict=True)
    seconds["its parts"] = [sum(times) for times in parts]
    print(
        f"IJSAT on Glow: {ratio(seconds, 'IJSAT', 'Normal'):.1f} × a normal step, "
        f"{ratio(seconds, 'IJSAT', 'its parts'):.2f} × its parts"
    )


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=[], help="names of methods in the file")
    arguments = parser.parse_args()
    keep_freed_memory()
    with own_threads(arguments.threads):
        methods_on_letters(arguments.rounds, arguments.only, arguments.batch)
        ijsat_on_glow(arguments.rounds, arguments.batch)


if __name__ == "__main__":
    main()
