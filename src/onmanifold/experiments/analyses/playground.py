"""What adversarial training does in the plane, where all can be seen (ATLD, figures 1, 4, 6 and 7)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

from onmanifold.analysis.playground import (
    distribution_shift,
    grid_logits,
    margins,
    measure_perturbation,
)
from onmanifold.classifiers.discriminator import Discriminator
from onmanifold.data import Batch
from onmanifold.evaluation.defence_imt import IMT
from onmanifold.evaluation.statistics import mean_interval, verdict
from onmanifold.experiments.analyses.base import (
    ANALYSES,
    Analysis,
    Drawing,
    Findings,
    Statement,
    Workplace,
)
from onmanifold.experiments.setup import Setup
from onmanifold.experiments.summary import Trained
from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.registry import nearest
from onmanifold.reports.drawings.playground import Boundary, Panel, draw_fields, draw_points
from onmanifold.training.classification import Classification
from onmanifold.training.examples import training_examples
from onmanifold.training.methods import Method

_RANDOM = "at random"
Numbers = npt.NDArray[np.float64]


class _Model(NamedTuple):
    """A trained classifier with the networks of its method, in eval mode on the CPU."""

    classifier: nn.Module
    players: Mapping[str, nn.Module]


@dataclass
class _Run:
    """What is seen of one seed.

    Attributes:
        models: By method.
        perturbed: (B, 1, 1, 2) by method that makes examples, and the control.
        transformed: (B, 1, 1, 2) by method that has a discriminator, and by title.
        rows: Of the table.
    """

    models: dict[str, _Model] = field(default_factory=dict)
    perturbed: dict[str, Tensor] = field(default_factory=dict)
    transformed: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    rows: list[dict[str, object]] = field(default_factory=list)


@ANALYSES.register("playground")
@dataclass(frozen=True)
class Playground(Analysis):
    """Methods on points of the plane: boundaries, perturbed points, and fields of perturbations.

    ATLD (figures 1 and 7) argues from pictures alone that the perturbations of adversarial training point at the
    decision boundary and corrupt the data's manifold, and that those of feature scattering and of ATLD do so less,
    as they are made without labels. The paper gives no number and no setting of its toy data. Here the examples
    that each method trains on are made of test points on its own classifier as it ends, and measured:

    - toward the boundary: the cosine of a perturbation with the gradient of the cross-entropy, and the share of
      points whose prediction changes;
    - the manifold: the share of perturbed points whose nearest clean point is of another class, among clean
      points that are neither trained on nor perturbed;
    - the global structure: how far the points of a class move as a set (`distribution_shift`), as a share of how
      far they move one by one. 1: all of the perturbation is a change of the distribution; less: points trade
      places.

    Random perturbations of the same radius, on the first method's classifier, are the control. Statements compare
    methods seed by seed; the points are the same for all seeds, so that intervals are over trainings only. Without
    labels a perturbation cannot follow them, so that the first statement says little: what decides is how methods
    without labels compare with each other and with the control.

    Attributes:
        supervised: The method whose perturbations follow the labels.
        unsupervised: Those whose perturbations do not.
        points: Number of test points that are perturbed, all as one batch; others of the test set stand for the
            manifold.
        arrows: Number of them that are drawn as arrows.
        resolution: Of the grid that boundaries are drawn from.
        step_size: Of `IMT`; None: the radius of the supervised method's attack.
        seed: Of the perturbations.
    """

    needs_experiment: ClassVar[bool] = True

    supervised: str = "AT"
    unsupervised: tuple[str, ...] = ("Feature Scattering", "ATLD")
    points: int = 400
    arrows: int = 200
    resolution: int = 200
    step_size: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self._at_least(points=2, arrows=1, resolution=2)
        if self.step_size is not None and not 0 <= self.step_size < float("inf"):
            raise ConfigError(f"step_size: expected a finite number >= 0, found {self.step_size}.")

    def run(self, place: Workplace) -> Findings:
        setup = place.experiment.setup
        self._check(setup)
        runs: dict[int, _Run] = {}
        for job in place.trained():
            run = runs.setdefault(job.seed, _Run())
            run.models[job.method] = _restored(setup, job)
            self._measure(setup, job, run)
        table = pd.DataFrame([row for run in runs.values() for row in run.rows])
        table = table.sort_values(["method", "seed"], kind="stable")
        measures = [name for name in table.columns if name not in ("method", "seed")]
        means = table.groupby("method", sort=False)[measures].mean().reset_index()
        # Methods in the order of the experiment, the control last.
        order = [*setup.methods, _RANDOM]
        means = means.sort_values("method", key=lambda names: names.map(order.index))
        first = next(iter(runs.values()))
        return Findings(
            {"means": means, "seeds": table}, self._draw(setup, first), self._judge(table)
        )

    def _check(self, setup: Setup) -> None:
        if setup.train.image_shape != (1, 1, 2):
            raise ConfigError(
                "experiment: the playground shows points of two coordinates, such as of two_moons; found images "
                f"of shape {setup.train.image_shape}."
            )
        for name in (self.supervised, *self.unsupervised):
            if name not in setup.methods:
                raise ConfigError(f"Unknown method {name!r}.{nearest(name, setup.methods)}")
        if not setup.methods[self.supervised].attacks:
            raise ConfigError(f"supervised: {self.supervised!r} trains against no attack.")
        if len(setup.test) <= self.points:
            raise ConfigError(
                f"points: expected fewer than the {len(setup.test)} test points, of which the others stand for "
                f"the manifold; found {self.points}."
            )

    def _batches(self, setup: Setup) -> tuple[Batch, Batch]:
        """The points that are perturbed, and those that stand for the manifold."""
        rows = torch.arange(len(setup.test))
        first, rest = setup.test.batch(rows[: self.points]), setup.test.batch(rows[self.points :])
        return first, rest

    def _measure(self, setup: Setup, job: Trained, run: _Run) -> None:
        """What a method's examples do to the test points, and its defence where it has a discriminator."""
        model, method = run.models[job.method], setup.methods[job.method]
        points, _ = self._batches(setup)
        made = training_examples(
            method,
            model.classifier,
            points.images,
            points.labels,
            players=model.players,
            indices=points.indices,
            epoch=setup.training.epochs - 1,
            seed=self.seed,
        )
        if made and made[0].shape == points.images.shape:
            run.perturbed[job.method] = made[0]
        row = self._row(setup, job.method, job.seed, model, run.perturbed.get(job.method))
        run.rows.append(row)
        if _RANDOM not in run.perturbed:
            run.perturbed[_RANDOM] = self._at_random(setup.methods[self.supervised], points)
            control = self._row(setup, _RANDOM, job.seed, model, run.perturbed[_RANDOM])
            run.rows.append(control)
        discriminator = model.players.get("discriminator")
        if isinstance(discriminator, Discriminator):
            self._transform(setup, job.method, run, discriminator, row)

    def _at_random(self, supervised: Method, points: Batch) -> Tensor:
        """Random perturbations of the length of the radius."""
        with torch.no_grad():
            region = supervised.attacks[0].threat.around(points.images, points.labels)
            drawn = region.random("surface", self.seed, points.indices)
            return region.render(drawn).clamp(0, 1)

    def _row(
        self, setup: Setup, name: str, seed: int, model: _Model, perturbed: Tensor | None
    ) -> dict[str, object]:
        points, others = self._batches(setup)
        row: dict[str, object] = {"method": name, "seed": seed}
        row["clean accuracy"] = _accuracy(model.classifier, points.images, points.labels)
        attack = setup.methods[self.supervised].attacks[0]
        found = attack(
            model.classifier, points.images, points.labels, seed=self.seed, indices=points.indices
        )
        row["robust accuracy"] = float((~found.success).double().mean())
        if perturbed is None:
            return row
        measured = measure_perturbation(
            model.classifier,
            points.images,
            perturbed,
            points.labels,
            others.images,
            others.labels,
        )
        shift = distribution_shift(points.images, perturbed, points.labels)
        length = float(measured.length.double().square().mean().sqrt())
        row["length"] = length
        row["cosine with the loss gradient"] = float(measured.cosine.nanmean())
        row["crosses the boundary"] = float(measured.crosses.double().mean())
        row["among another class"] = float(measured.strays.double().mean())
        row["distance to own class"] = float(measured.distance.mean())
        row["shift of the distribution"] = shift
        row["shift / length"] = shift / length if length else float("nan")
        return row

    def _transform(
        self,
        setup: Setup,
        name: str,
        run: _Run,
        discriminator: Discriminator,
        row: dict[str, object],
    ) -> None:
        """IMT on the points that PGD makes for the static classifier: not an attack on the defence."""
        points, _ = self._batches(setup)
        classifier = run.models[name].classifier
        attack = setup.methods[self.supervised].attacks[0]
        found = attack(
            classifier, points.images, points.labels, seed=self.seed, indices=points.indices
        )
        radius = getattr(attack.threat, "radius", 8 / 255)
        step_size = float(radius) if self.step_size is None else self.step_size
        defence = IMT(classifier, discriminator, step_size=step_size)
        clean, moved = (
            defence.transform(images).detach() for images in (points.images, found.images)
        )
        run.transformed[name] = {
            "clean, then a step of IMT": clean,
            "perturbed by PGD": found.images,
            "PGD, then a step of IMT": moved,
        }
        row["IMT, clean"] = _accuracy(classifier, clean, points.labels)
        row["IMT, on PGD"] = _accuracy(classifier, moved, points.labels)

    def _draw(self, setup: Setup, run: _Run) -> dict[str, Drawing]:
        points, _ = self._batches(setup)
        clean, labels = _flat(points.images), points.labels.numpy()
        shapes = {name: self._boundary(model.classifier) for name, model in run.models.items()}
        normal = next(iter(shapes))
        classes, reference = setup.test.classes, shapes[normal]
        seed = setup.experiment.seeds[0]
        scale = f"{len(labels)} test points, seed {seed}."
        drawings = {
            "boundaries": Drawing(
                draw_points(
                    {name: Panel(clean, labels, shape) for name, shape in shapes.items()},
                    classes,
                    reference,
                ),
                "Boundaries",
                f"The clean points, and the boundary that each method learns. {scale}",
            )
        }
        # The control last, on the boundary of the classifier that it is measured on.
        moved = {name: _flat(run.perturbed[name]) for name in shapes if name in run.perturbed}
        if moved:
            panels = {"clean": Panel(clean, labels, reference)} | {
                name: Panel(places, labels, shapes[name]) for name, places in moved.items()
            }
            moved[_RANDOM], shapes[_RANDOM] = _flat(run.perturbed[_RANDOM]), reference
            drawings["perturbed"] = Drawing(
                draw_points(panels, classes, reference),
                "Points as each method trains on them",
                f"The examples that each method makes of the clean points on its own classifier. {scale}",
            )
            few = slice(0, self.arrows)
            fields = {
                name: Panel(clean[few], labels[few], shapes[name], places[few])
                for name, places in moved.items()
            }
            drawings["fields"] = Drawing(
                draw_fields(fields, classes, reference),
                "Perturbations",
                f"Where each method moves points, on its own classifier, the first {len(labels[few])} of {scale}",
            )
        for name, sets in run.transformed.items():
            panels = {"clean": Panel(clean, labels, shapes[name])}
            panels |= {
                title: Panel(_flat(images), labels, shapes[name]) for title, images in sets.items()
            }
            number = 1 + sum(key.startswith("imt") for key in drawings)
            drawings[f"imt_{number}" if number > 1 else "imt"] = Drawing(
                draw_points(panels, classes, reference),
                f"{name}: inference with manifold transformation",
                "PGD attacks the classifier without the defence, so that this is no measure of the defence's "
                f"robustness. {scale}",
            )
        return drawings

    def _boundary(self, classifier: nn.Module) -> Boundary:
        grid = grid_logits(classifier, resolution=self.resolution)
        across, up = grid.across.double().numpy(), grid.up.double().numpy()
        return Boundary(across, up, margins(grid.logits).double().numpy())

    def _judge(self, table: pd.DataFrame) -> list[Statement]:
        """The paper's order, from what it says is worst to its own method."""
        order = (self.supervised, *self.unsupervised)
        against_first = [(order[0], other) for other in order[1:]]
        neighbours = list(pairwise(order[1:]))
        boundary, strays, shift = (
            "cosine with the loss gradient",
            "among another class",
            "shift / length",
        )
        said = {
            boundary: "Perturbations of {} point at the decision boundary more than those of {}",
            strays: "{} moves more points among those of another class than {}",
            shift: "{} changes the distributions of the classes more than {}, for the length of its moves",
        }
        source = {boundary: "ATLD, section 1 and figure 7"}
        return [
            self._compare(
                table, column, pair, text, source.get(column, "ATLD, section 1 and figure 1")
            )
            for column, text in said.items()
            for pair in against_first + (neighbours if column != boundary else [])
        ]

    def _compare(
        self, table: pd.DataFrame, column: str, pair: tuple[str, str], text: str, source: str
    ) -> Statement:
        """Whether a number is larger for the first of two methods, seed by seed."""
        said = text.format(*pair)
        one, two = (_by_seed(table, name, column) for name in pair)
        if one is None or two is None:
            return Statement(said, "one of them perturbs no points", "not measured", source)
        found = mean_interval(one - two)
        numbers = (
            f"{column}: {pair[0]} {one.mean():.3f}, {pair[1]} {two.mean():.3f}, difference "
            f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}] over {found.runs} seeds"
        )
        control = _by_seed(table, _RANDOM, column)
        if control is not None:
            numbers += f"; random perturbations {control.mean():.3f}"
        return Statement(said, numbers, verdict(found.low, found.high), source)


def _by_seed(table: pd.DataFrame, method: str, column: str) -> Numbers | None:
    if column not in table:
        return None
    values = table[table.method == method].sort_values("seed")[column].to_numpy(dtype=float)
    return None if np.isnan(values).any() or not len(values) else values


def _restored(setup: Setup, job: Trained) -> _Model:
    """A trained classifier and its method's own networks, from their files."""
    classifier = setup.classifier(job.seed)
    with torch.random.fork_rng(devices=[]):
        image = torch.zeros(1, *setup.train.image_shape)
        task = Classification(setup.methods[job.method], classifier, setup.training, image)
    task.restore(job.classifier)
    return _Model(task.model.eval(), {name: part.eval() for name, part in task.others.items()})


def _accuracy(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((classifier(images).argmax(1) == labels).double().mean())


def _flat(images: Tensor) -> Numbers:
    return images.flatten(1).double().numpy()
