"""Robustness against generalisation: sweeps over the number of training images (Disentangling 3.4, 3.5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd

from onmanifold.analysis.generalisation import (
    POOLED,
    Relation,
    correlations_table,
    relate,
    slopes_table,
)
from onmanifold.attacks import Attack
from onmanifold.experiments.analyses.base import (
    ANALYSES,
    Analysis,
    Drawing,
    Findings,
    Statement,
    Workplace,
)
from onmanifold.experiments.analyses.generalisation_claims import (
    essentially_generalisation,
    not_contradicting,
)
from onmanifold.experiments.analyses.sweep_parts import (
    FACTS,
    Grid,
    HeldOut,
    load_error_images,
    measure,
    transferred,
)
from onmanifold.experiments.runner import run_all
from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.registry import nearest
from onmanifold.reports.drawings.generalisation import Points, draw_by_size, draw_relations
from onmanifold.threats import ImageBall, LatentBall

Relations = Mapping[tuple[str, str], Mapping[str, Relation]]
"""By network and attack, then by method."""


@dataclass(frozen=True)
class _Kinds:
    """Names of the attacks that stay on the manifold, and of the regular ones."""

    on_manifold: tuple[str, ...]
    regular: tuple[str, ...]

    def __iter__(self) -> Iterator[str]:
        return iter((*self.on_manifold, *self.regular))

    def with_transferred(self) -> _Kinds:
        """Each attack, and after all of its kind the transferred ones."""
        kinds = (
            (*names, *(transferred(name) for name in names))
            for names in (self.on_manifold, self.regular)
        )
        return _Kinds(*kinds)


@ANALYSES.register("generalisation")
@dataclass(frozen=True)
class Generalisation(Analysis):
    """Success rates against test error, where the number of training images makes them vary.

    Each of the experiment's methods is trained on each number of images with each seed, then attacked by the
    experiment's attacks. All runs are kept in the experiment's store, so that a sweep that was stopped goes on
    where it stopped, and several that were started with the same file share the work.

    Attributes:
        sizes: Numbers of training images, each set in place of the experiment's ``dataset.train``.
        classifiers: Networks by name, each in place of the experiment's; None: that one alone.
        methods: Which of the experiment's; None: all.
        seeds: In place of the experiment's; None: its own.
        attacks: In place of the experiment's, which may refer to its threat models; None: its own.
        steps: At least as many steps of the optimiser in each training: small sets are passed through more
            often. None: the experiment's epochs for all sizes, as in the paper.
        error_images: Test images on which test error is measured, where that shall be more than are attacked;
            None: those that are attacked.
        held_out: A training apart, such as ``{method: Normal, size: 10000}``, whose adversarial examples are shown
            to all as further attacks; None: none.
        on_manifold: Names of the attacks that stay on the manifold; None: those in latent balls.
        regular: Names of the attacks that do not know the manifold; None: those in image balls.
        tolerance: The success rate counts as rising while test error falls if it does by more points than this
            for each point of test error.
        confidence: Of all intervals.
        jobs: Number of processes that share the runs.
    """

    needs_experiment: ClassVar[bool] = True

    sizes: tuple[int, ...] = (250, 1000, 2500, 5000, 10000)
    classifiers: dict[str, Any] | None = None
    methods: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None
    attacks: dict[str, Any] | None = None
    steps: int | None = None
    error_images: int | None = None
    held_out: HeldOut | None = None
    on_manifold: tuple[str, ...] | None = None
    regular: tuple[str, ...] | None = None
    tolerance: float = 0.1
    confidence: float = 0.95
    jobs: int = 1

    def __post_init__(self) -> None:
        if len(self.sizes) < 2 or len(set(self.sizes)) < len(self.sizes) or min(self.sizes) < 1:
            raise ConfigError(
                f"sizes: expected two or more different numbers of images, found {list(self.sizes)}."
            )
        self._not_empty("classifiers", "methods", "seeds", "attacks")
        self._at_least(steps=1, error_images=1, jobs=1)
        if not self.tolerance >= 0:
            raise ConfigError(f"tolerance: expected a number >= 0, found {self.tolerance}.")
        if not 0 < self.confidence < 1:
            raise ConfigError(f"confidence: expected a number in (0, 1), found {self.confidence}.")

    def run(self, place: Workplace) -> Findings:
        grid = Grid(
            self.sizes, self.classifiers, self.methods, self.seeds, self.attacks, self.steps
        )
        parts = list(grid.parts(place))
        kinds = self._kinds(parts[0].session.setup.attacks)
        # Before anything is trained: there may be fewer images than are asked for.
        more = None if self.error_images is None else load_error_images(place, self.error_images)
        source = None if self.held_out is None else grid.held_out(place, self.held_out)
        jobs = run_all([part.session for part in parts], self.jobs, place.device)
        trainings = measure(parts, jobs, more, source)
        if source is not None:
            kinds = kinds.with_transferred()
        relations = {
            (classifier, attack): relate(
                trainings[trainings.classifier == classifier], attack, confidence=self.confidence
            )
            for classifier in dict.fromkeys(part.classifier for part in parts)
            for attack in kinds
        }
        return Findings(
            tables={
                "trainings": trainings,
                "correlations": _joined(relations, correlations_table),
                "slopes": _joined(relations, slopes_table),
            },
            drawings=self._draw(place, trainings, relations, kinds),
            statements=self._judge(trainings, relations, kinds),
        )

    def _kinds(self, attacks: Mapping[str, Attack]) -> _Kinds:
        """The names of the attacks on the manifold, and of the regular ones."""
        kinds = []
        for place, chosen, threat in (
            ("on_manifold", self.on_manifold, LatentBall),
            ("regular", self.regular, ImageBall),
        ):
            own = [name for name, attack in attacks.items() if isinstance(attack.threat, threat)]
            for name in chosen or ():
                if name not in attacks:
                    raise ConfigError(
                        f"analysis: {place}: unknown attack {name!r}.{nearest(name, attacks)}"
                    )
            kinds.append(tuple(own if chosen is None else chosen))
        for name in attacks:
            if name in FACTS:
                raise ConfigError(f"attacks: {name!r} cannot be an attack's name here.")
        if not any(kinds):
            raise ConfigError(
                "analysis: expected an attack in an image ball or a latent ball, or names of attacks in "
                f"on_manifold or regular; found {list(attacks)}."
            )
        return _Kinds(*kinds)

    def _judge(
        self, trainings: pd.DataFrame, relations: Relations, kinds: _Kinds
    ) -> list[Statement]:
        statements = []
        methods = tuple(dict.fromkeys(trainings.method))
        for key, found in relations.items():
            label = _label(key, relations)
            if key[1] in kinds.on_manifold:
                statements.append(essentially_generalisation(label, found, methods))
            if key[1] in kinds.regular:
                statements.append(not_contradicting(label, found, self.tolerance, methods))
        return statements

    def _draw(
        self, place: Workplace, trainings: pd.DataFrame, relations: Relations, kinds: _Kinds
    ) -> dict[str, Drawing]:
        finished = trainings.dropna(subset=["test_error"])
        test = place.experiment.setup.test
        scale = (
            f"{test.name}: {len(finished)} trainings, {len(set(finished.seed))} seeds; {len(test):,} "
            f"images attacked, test error on {self.error_images or len(test):,}."
        )
        drawings = {
            "by_size": Drawing(
                draw_by_size(_panels_by_size(finished, kinds)),
                "More training images",
                f"Means over seeds; faint: each training. {scale}",
            )
        }
        words = (
            "Of the correctly classified images, the share that the attack fools. Faint: each training; strong: "
            f"means over seeds; lines: regression with {self.confidence:.0%} bands; r over all methods with "
            f"Fisher's interval. {scale}"
        )
        for name, attacks, title in (
            ("on_manifold", kinds.on_manifold, "On-manifold success rate against test error"),
            ("regular", kinds.regular, "Regular success rate against test error"),
        ):
            panels = {
                _label(key, relations): found
                for key, found in relations.items()
                if key[1] in attacks
            }
            if panels:
                drawings[name] = Drawing(draw_relations(panels, POOLED), title, words)
        return drawings


def _label(key: tuple[str, str], relations: Relations) -> str:
    """The attack's name, with the network's where there are several."""
    classifier, attack = key
    return f"{classifier}, {attack}" if len({name for name, _ in relations}) > 1 else attack


def _panels_by_size(trainings: pd.DataFrame, kinds: _Kinds) -> dict[str, dict[str, Points]]:
    """Of one network the test error and all success rates; of several the test errors alone."""
    classifiers = list(dict.fromkeys(trainings.classifier))
    if len(classifiers) == 1:
        columns = {"test error": "test_error"} | {name: name for name in kinds}
        return {title: _by_method(trainings, column) for title, column in columns.items()}
    return {
        f"test error, {name}": _by_method(trainings[trainings.classifier == name], "test_error")
        for name in classifiers
    }


def _joined(
    relations: Relations,
    table: Callable[[Mapping[str, Relation]], pd.DataFrame],
) -> pd.DataFrame:
    parts = []
    for (classifier, attack), found in relations.items():
        part = table(found)
        part.insert(0, "attack", attack)
        part.insert(0, "classifier", classifier)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def _by_method(rows: pd.DataFrame, column: str) -> dict[str, Points]:
    rows = rows.dropna(subset=[column])
    return {
        str(method): list(zip(part["size"], part[column], strict=True))
        for method, part in rows.groupby("method", sort=False)
    }
