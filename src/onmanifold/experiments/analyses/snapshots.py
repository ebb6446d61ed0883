"""Accuracy over the snapshots of trainings, clean and under attack (DMAT figure 3, IJSAT figures 2 and 7)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import pandas as pd

from onmanifold.attacks import Attack
from onmanifold.classifiers import load_classifier
from onmanifold.evaluation import STANDARD, Evaluation, evaluate, robust_overfitting
from onmanifold.evaluation.statistics import mean_interval, verdict
from onmanifold.experiments.analyses.base import (
    ANALYSES,
    Analysis,
    Drawing,
    Findings,
    Statement,
    Workplace,
)
from onmanifold.experiments.setup import chosen_attacks
from onmanifold.experiments.summary import Trained
from onmanifold.foundation.errors import ConfigError
from onmanifold.reports.drawings.snapshots import draw_snapshots
from onmanifold.reports.tables import Entry
from onmanifold.training.state import SNAPSHOTS, snapshots_of

_SOURCE = "IJSAT, figure 2 and section 6.4.3; Rice et al. 2020"


class _Curve(NamedTuple):
    """A method and seed: its evaluations, by epoch."""

    job: Trained
    evaluations: Mapping[int, Evaluation]


@ANALYSES.register("snapshots")
@dataclass(frozen=True)
class Snapshots(Analysis):
    """Accuracy of each snapshot of an experiment's trainings on test images, standard and under attacks.

    The experiment's training must have ``snapshot_epochs``. What was evaluated once is kept beside the snapshots,
    batch by batch, and not evaluated again.

    Attributes:
        attacks: Which of the experiment's attacks; None: all.
        methods: Which of the experiment's methods; None: all.
        images: Number of test images, the first ones; None: all.
    """

    needs_experiment: ClassVar[bool] = True

    attacks: tuple[str, ...] | None = None
    methods: tuple[str, ...] | None = None
    images: int | None = None

    def __post_init__(self) -> None:
        self._at_least(images=2)
        self._not_empty("methods", "attacks")

    def run(self, place: Workplace) -> Findings:
        setup = place.experiment.setup
        if setup.training.snapshot_epochs is None:
            raise ConfigError(
                "experiment.training.snapshot_epochs: expected a number of epochs, such as 2; without it a "
                "training keeps no snapshots."
            )
        attacks = chosen_attacks(setup.attacks, self.attacks)
        curves = [
            _Curve(job, self._evaluate(place, job, attacks)) for job in place.trained(self.methods)
        ]
        columns = [STANDARD, *attacks]
        table = _table(curves, columns)
        images = len(next(iter(curves[0].evaluations.values())))
        seeds = len({curve.job.seed for curve in curves})
        caption = (
            f"Accuracy on {images:,} test images after so many epochs of training, with 95 % intervals over "
            f"{'images' if seeds == 1 else f'{seeds} seeds'}. The adversary may always leave an image as it is."
        )
        drawing = Drawing(draw_snapshots(table), "Accuracy while methods are trained", caption)
        statements = [
            _overfitting([curve for curve in curves if curve.job.method == method], attack)
            for attack in attacks
            for method in dict.fromkeys(curve.job.method for curve in curves)
        ]
        return Findings({"snapshots": table}, {"snapshots": drawing}, statements)

    def _evaluate(
        self, place: Workplace, job: Trained, attacks: Mapping[str, Attack]
    ) -> dict[int, Evaluation]:
        session = place.experiment
        test, spec = session.setup.test, session.setup.experiment.evaluation
        if self.images is not None:
            test = test.take(min(self.images, len(test)))
        found = {}
        for epoch, path in _snapshots(session.setup.training.snapshot_epochs or 1, job).items():
            found[epoch] = evaluate(
                load_classifier(path),
                test,
                attacks,
                batch_size=spec.batch_size,
                seed=spec.seed,
                directory=path.parent / "evaluation" / path.stem,
                fabric=session.fabric,
                progress=place.bars,
            )
            shares = ", ".join(
                f"{name} {100 * found[epoch].accuracy(name):.1f} %" for name in (STANDARD, *attacks)
            )
            place.say(f"{job.method}, seed {job.seed}, epoch {epoch}: {shares}")
        return found


def _snapshots(every: int, job: Trained) -> dict[int, Path]:
    """The files by epoch.

    Raises:
        ConfigError: The training was run before it was asked to keep them.
    """
    last = len(job.training.result()["history"])
    wanted = [epoch for epoch in range(1, last + 1) if epoch % every == 0 or epoch == last]
    found = snapshots_of(job.training.folder)
    missing = [epoch for epoch in wanted if epoch not in found]
    if missing:
        raise ConfigError(
            f"{job.training.folder / SNAPSHOTS}: there is no snapshot of epoch {missing[0]}: {job.method}, seed "
            f"{job.seed}, was trained without snapshot_epochs={every}. Remove the folder of the training, and it "
            "is trained anew."
        )
    return {epoch: found[epoch] for epoch in wanted}


def _table(curves: list[_Curve], columns: list[str]) -> pd.DataFrame:
    """A row for each method, attack and epoch; intervals as in an experiment's table."""
    rows = []
    for method in dict.fromkeys(curve.job.method for curve in curves):
        mine = [curve for curve in curves if curve.job.method == method]
        for column in columns:
            for epoch in mine[0].evaluations:
                entry = Entry.of([curve.evaluations[epoch].correct(column) for curve in mine])
                rows.append(
                    {
                        "method": method,
                        "attack": column,
                        "epoch": epoch,
                        "images": len(mine[0].evaluations[epoch]),
                        "seeds": len(mine),
                        "accuracy": entry.mean / 100,
                        "low": entry.low / 100,
                        "high": entry.high / 100,
                    }
                )
    return pd.DataFrame(rows)


def _overfitting(curves: list[_Curve], attack: str) -> Statement:
    """Whether accuracy under an attack falls from the best snapshot to the last, over all seeds of a method."""
    epochs = list(curves[0].evaluations)
    found = [
        robust_overfitting(np.stack([item.correct(attack) for item in curve.evaluations.values()]))
        for curve in curves
    ]
    drop, low, high = found[0].drop.difference, found[0].drop.low, found[0].drop.high
    over = f"{found[0].drop.samples:,} images"
    if len(found) > 1:
        drop, low, high, *_ = mean_interval([result.drop.difference for result in found])
        over = f"{len(found)} seeds"
    method = curves[0].job.method
    best = ", ".join(dict.fromkeys(str(epochs[result.best]) for result in found))
    numbers = (
        f"Best after epoch {best} of {epochs[-1]}; from the best snapshot, chosen on other images, to the last "
        f"accuracy falls by {100 * drop:+.1f} points (95 % interval over {over}: {100 * low:+.1f} to "
        f"{100 * high:+.1f})."
    )
    text = f"Robust overfitting: under {attack} {method} falls from its best snapshot to the last"
    return Statement(text, numbers, verdict(low, high), _SOURCE)
