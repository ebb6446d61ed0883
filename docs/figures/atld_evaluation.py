"""Prints the tables of docs/concepts/atld.md: ATLD, IMT and feature scattering, as reported and honestly.

Run from the repository's root: ``python docs/figures/atld_evaluation.py``. What is finished is kept in
``runs/atld_evaluation``, so that a second start goes on where the first one stopped. It takes some twenty minutes
on one core, and reads Fashion-MNIST.

Four networks, each trained on 10,000 images, are attacked as the papers do, by PGD-20 and CW-20 (PGD on the
margin), and by AutoAttack. IMT and IMT+ are then put before the classifier that ATLD trained: images made for the
static classifier (the protocol of ATLD's released code), images made for an adversarially trained one (the paper's
table of black-box attacks), and attacks through the defence. The audit says what it would have said.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import onmanifold as om
from onmanifold.classifiers import Discriminator
from onmanifold.evaluation import IMT
from onmanifold.objectives import TargetedDLR
from onmanifold.training.methods import ATLD, FeatureScattering

RUNS = Path("runs/atld_evaluation")
SEED = 0
RADIUS = 0.1
BALL = om.ImageBall(norm="linf", radius=RADIUS)
METHODS = {
    "AT [PGD-10]": om.AdversarialTraining(om.PGD(BALL, steps=10)),
    "fast AT": om.AdversarialTraining(om.FGSM(BALL, step_size=1.25 * RADIUS, start="uniform")),
    "feature scattering": FeatureScattering(BALL),
    "ATLD": ATLD(om.PGD(BALL, steps=1, step_size=RADIUS)),
}
REPORTED = {
    "FGSM": om.FGSM(BALL),
    "PGD-20": om.PGD(BALL, steps=20, step_size=RADIUS / 4),
    "PGD-100": om.PGD(BALL, steps=100, step_size=RADIUS / 4),
    "CW-20": om.PGD(BALL, steps=20, step_size=RADIUS / 4, objective=om.Margin()),
    "AutoAttack": om.AutoAttack(BALL),
}
THROUGH = {
    "APGD-CE": om.APGD(BALL, steps=50),
    "APGD-T": om.APGD(BALL, steps=30, objective=TargetedDLR(3)),
}
QUERIES = {"Square": om.Square(BALL, 1000), "RayS": om.RayS(BALL, 1000, early_stop=True)}
TRAINING = {"epochs": 10, "schedule": "cosine", "validation_fraction": 0.05}


def trained(train: om.Dataset) -> dict[str, om.training.TrainingResult]:
    """The four networks."""
    found = {}
    for name, method in METHODS.items():
        folder = RUNS / name.replace(" ", "_")
        found[name] = om.train(
            method, "conv_net", train, TRAINING, directory=folder / "classifier", seed=SEED
        )
    return found


def static(networks: dict[str, nn.Module], test: om.Dataset) -> None:
    """Accuracies of the networks as they are."""
    for name, network in networks.items():
        folder = RUNS / name.replace(" ", "_") / "static"
        result = om.evaluate(network, test, REPORTED, seed=SEED, directory=folder)
        found = {attack: 100 * result.accuracy(attack) for attack in ("standard", *REPORTED)}
        print(f"{name:20}" + "  ".join(f"{key} {value:.1f}" for key, value in found.items()))


def defended(
    network: nn.Module, discriminator: Discriminator, other: nn.Module, test: om.Dataset
) -> None:
    """IMT and IMT+ before the network, attacked in every way that applies."""
    defences = {
        "IMT": IMT(network, discriminator, step_size=RADIUS),
        "IMT+": IMT.plus(network, discriminator, step_size=RADIUS),
    }
    for name, defence in defences.items():
        found = om.evaluate_defence(
            defence,
            test,
            BALL,
            attacks={**THROUGH, "PGD-20": REPORTED["PGD-20"]},
            black_box=QUERIES,
            sources={"AT": other},
            seed=SEED,
            directory=RUNS / name,
        )
        print(
            f"\n{name}\n{found.table().round(3).to_string()}\n{found.summary()}\n{found.left_out}"
        )


def audited(models: dict[str, nn.Module], surrogate: nn.Module, test: om.Dataset) -> None:
    """The alarms that the audit raises for PGD-20."""
    for name, model in models.items():
        found = om.audit(
            model, test, {"PGD-20": REPORTED["PGD-20"]}, surrogate=surrogate, seed=SEED
        )
        print(f"\naudit of {name}: alarms: {[finding.name for finding in found.alarms] or 'none'}")


def main() -> None:
    """Train, attack, put the defence before, audit."""
    train = om.load_dataset("fashion_mnist", "train").take(10_000)
    test = om.load_dataset("fashion_mnist", "test").take(500)
    results = trained(train)
    networks = {name: result.classifier.cpu().eval() for name, result in results.items()}
    static(networks, test)
    discriminator = results["ATLD"].players["discriminator"].cpu().eval()
    assert isinstance(discriminator, Discriminator)
    defended(networks["ATLD"], discriminator, networks["AT [PGD-10]"], test)
    defence = IMT(networks["ATLD"], discriminator, step_size=RADIUS)
    audited({**networks, "ATLD + IMT": defence}, networks["AT [PGD-10]"], test)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
