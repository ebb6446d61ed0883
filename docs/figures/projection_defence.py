"""Prints the table of docs/concepts/defences.md: projection onto the manifold of letters, attacked through.

Run from the repository's root: ``python docs/figures/projection_defence.py``. Finished batches are kept in
``runs/projection_defence``, so that a second start goes on where the first one stopped. On one core of a laptop it
takes about half an hour; nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path

import onmanifold as om
from onmanifold.attacks.rays import RayS
from onmanifold.attacks.square import Square
from onmanifold.data.fonts import embedded_folder
from onmanifold.evaluation.defence_evaluation import evaluate_defence
from onmanifold.evaluation.defence_projection import ManifoldProjection
from onmanifold.evaluation.defences import Defence
from onmanifold.objectives import TargetedDLR

RUNS = Path("runs/projection_defence")
SEED = 0
BALL = om.ImageBall(norm="linf", radius=0.1)
METHODS = {
    "normal": om.Normal(),
    "adversarial": om.AdversarialTraining(om.PGD(BALL, steps=5)),
}
ATTACKS = {
    "APGD-CE": om.APGD(BALL, steps=50),
    "APGD-T": om.APGD(BALL, steps=30, objective=TargetedDLR(3)),
}
QUERIES = {"Square": Square(BALL, 300), "RayS": RayS(BALL, 300, early_stop=True)}


def main() -> None:
    """Train both classifiers, attack both with and without the projection, print what was found."""
    folder = str(embedded_folder())
    train = om.load_dataset("fonts", "train", size=20_000, seed=SEED, folder=folder)
    test = om.load_dataset("fonts", "test", size=200, seed=SEED, folder=folder)
    projection = ManifoldProjection(om.fonts_manifold(folder), train.codes, starts=4, steps=10)
    for name, method in METHODS.items():
        trained = om.train(
            method,
            "conv_net",
            train,
            {"epochs": 6, "schedule": "cosine"},
            directory=RUNS / name / "classifier",
            seed=SEED,
        )
        found = evaluate_defence(
            Defence(trained.classifier.cpu(), projection),
            test,
            BALL,
            attacks=ATTACKS,
            black_box=QUERIES,
            surrogates={"smooth": projection.smooth},
            batch_size=50,
            seed=SEED,
            directory=RUNS / name,
        )
        print(
            f"\n{name}\n{found.table().round(3).to_string()}\n{found.summary()}\n{found.left_out}"
        )


if __name__ == "__main__":
    main()
