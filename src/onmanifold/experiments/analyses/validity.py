"""Do on-manifold adversarial examples keep their label? (Disentangling, definition 1)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from onmanifold.analysis.successful import (
    NothingRightError,
    Successful,
    attack_successfully,
    right_ones,
)
from onmanifold.analysis.validity import LabelCheck, check_label, nearest_of_class
from onmanifold.attacks import Attack
from onmanifold.classifiers import load_classifier
from onmanifold.data.dataset import Batch
from onmanifold.evaluation.statistics import mean_interval, verdict

# Registers "fitted", which a judge may be.
from onmanifold.experiments import fits  # noqa: F401
from onmanifold.experiments.analyses.base import (
    ANALYSES,
    Analysis,
    Drawing,
    Findings,
    Statement,
    Workplace,
)
from onmanifold.experiments.analyses.leaving import first_images, knows_classes
from onmanifold.experiments.analyses.leaving_results import (
    label_statement,
    nothing_right,
    share_columns,
)
from onmanifold.experiments.setup import chosen_attacks
from onmanifold.foundation.errors import ConfigError
from onmanifold.manifolds.base import Manifold
from onmanifold.reports.drawings.validity import Example, draw_examples
from onmanifold.threats import LatentBall

_CLEAN = "clean"


@dataclass(frozen=True)
class _Judged:
    """The successful examples of an attack on a classifier, their labels checked."""

    method: str
    attack: str
    batch: Batch
    found: Successful
    predictions: Tensor
    check: LabelCheck


@ANALYSES.register("validity")
@dataclass(frozen=True)
class Validity(Analysis):
    """Success rates of on-manifold attacks beside the share of examples that are still of their class.

    Every successful example is projected onto the manifold of each class. So are the clean images: how often the
    search finds another class nearer than their own is its error, and how near other classes come to them is what
    the examples are compared with.

    Attributes:
        methods: Which of the experiment's classifiers; None: all.
        attacks: Which of its attacks; None: those on the manifold.
        images: Number of test images. On FONTS some seconds for each that is judged.
        judge: The manifold that has one for each class; None: the experiment's.
        examples: Number of examples in a figure.
        seed: Of the experiment's classifiers, one of its seeds; None: the first.
    """

    needs_experiment: ClassVar[bool] = True

    methods: tuple[str, ...] | None = None
    attacks: tuple[str, ...] | None = None
    images: int = 100
    judge: Manifold | None = None
    examples: int = 10
    seed: int | None = None

    def __post_init__(self) -> None:
        self._at_least(images=1, examples=1)
        self._not_empty("methods", "attacks")
        if self.judge is not None and not knows_classes(self.judge):
            raise ConfigError(f"judge: the codes of {self.judge.name} hold no class.")

    def run(self, place: Workplace) -> Findings:
        setup, device = place.experiment.setup, place.experiment.fabric.device
        manifold = place.manifold if self.judge is None else self.judge
        if not knows_classes(manifold):
            raise ConfigError(
                f"judge: expected a manifold with one for each class; the codes of {manifold.name} hold none."
            )
        attacks = self._attacks(setup.attacks)
        batch = first_images(setup, manifold, self.images, device)
        place.say(f"Labels of {len(batch.labels)} clean images")
        clean = check_label(manifold.to(device), batch.images, batch.labels, indices=batch.indices)
        seed = setup.experiment.seeds[0] if self.seed is None else self.seed
        judged: list[_Judged] = []
        left_out: list[Statement] = []
        for job in place.trained(self.methods, [seed]):
            classifier = load_classifier(job.classifier).to(device)
            try:
                kept = right_ones(classifier, manifold, batch)
            except NothingRightError:
                claim = "on-manifold adversarial examples keep their label"
                left_out.append(nothing_right(job.method, claim, len(batch.labels)))
                place.say(f"{job.method}: {left_out[-1].numbers}")
                continue
            for name, attack in attacks.items():
                found = attack_successfully(classifier, attack, kept, manifold)
                place.say(f"{job.method}, {name}: labels of {len(found.rows)} examples")
                labels, indices = kept.labels[found.rows], kept.indices[found.rows]
                check = check_label(manifold, found.images, labels, found.codes, indices=indices)
                with torch.no_grad():
                    seen = classifier.eval()(found.images).argmax(1)
                judged.append(_Judged(job.method, name, kept, found, seen, check))
        classes = setup.test.classes
        tables = {"validity": _table(judged, clean)}
        if judged:
            tables["examples"] = pd.concat([_rows(each, classes) for each in judged])
        return Findings(
            tables=tables,
            drawings=_drawings(judged, manifold, classes, self.examples),
            statements=[item for each in judged for item in _statements(each, clean, batch.indices)]
            + left_out,
        )

    def _attacks(self, attacks: Mapping[str, Attack]) -> dict[str, Attack]:
        names = self.attacks
        if names is None:
            names = tuple(n for n, each in attacks.items() if isinstance(each.threat, LatentBall))
            if not names:
                raise ConfigError("experiment.attacks: expected one on a latent ball, found none.")
        return chosen_attacks(attacks, names)


def _table(judged: list[_Judged], clean: LabelCheck) -> pd.DataFrame:
    """A row for the clean images, whatever classifiers see in them, and one for each classifier and attack."""
    count = len(clean.kept)
    rows: list[dict[str, object]] = [
        {
            "classifier": "",
            "attack": _CLEAN,
            **share_columns("keep by search alone", int(clean.kept_by_search.sum()), count),
            "nearest other class": float(clean.other.median()),
        }
    ]
    for each in judged:
        right, successful = len(each.batch.labels), len(each.found.rows)
        good = int(each.check.kept.sum())
        rows.append(
            {
                "classifier": each.method,
                "attack": each.attack,
                "right when clean": right,
                "successful": successful,
                **share_columns("success rate", successful, right),
                **share_columns("keep their label", good, successful),
                **share_columns("valid success rate", good, right),
                **share_columns(
                    "keep by search alone", int(each.check.kept_by_search.sum()), successful
                ),
                "nearest other class": float(each.check.other.median()) if successful else math.nan,
            }
        )
    first = ["classifier", "attack"]
    last = ["keep by search alone", "keep by search alone low", "keep by search alone high"]
    table, near = pd.DataFrame(rows), "nearest other class"
    middle = [name for name in table.columns if name not in (*first, near, *last)]
    return table[[*first, *middle, near, *last]]


def _rows(each: _Judged, classes: tuple[str, ...]) -> pd.DataFrame:
    rows, check = each.found.rows, each.check
    return pd.DataFrame(
        {
            "classifier": each.method,
            "attack": each.attack,
            "sample": each.batch.indices[rows].cpu().numpy(),
            "label": [classes[label] for label in each.batch.labels[rows].tolist()],
            "prediction": [classes[label] for label in each.predictions.tolist()],
            "kept": check.kept.cpu().numpy(),
            "kept_by_search": check.kept_by_search.cpu().numpy(),
            "own": check.own.cpu().numpy(),
            "other": check.other.cpu().numpy(),
            "other_class": [classes[label] for label in check.other_class.tolist()],
        }
    )


def _statements(each: _Judged, clean: LabelCheck, indices: Tensor) -> list[Statement]:
    """Whether examples keep their label, and whether they come nearer to other classes than clean images are."""
    count = len(each.found.rows)
    known = each.found.codes is not None
    good = int(each.check.kept.sum())
    first = label_statement(each.method, each.attack, good, count, known=known)
    text = f"{each.method}: examples by {each.attack} come no nearer to another class than their clean images"
    source = "Disentangling, definition 1"
    if count < 2:
        return [first, Statement(text, f"{count} examples", "not measured", source)]
    samples = each.batch.indices[each.found.rows]
    before = clean.other[(indices.unsqueeze(0) == samples.unsqueeze(1)).int().argmax(1)]
    change = mean_interval((each.check.other - before).double().cpu().numpy())
    numbers = (
        f"Distance to the nearest other class: mean {float(each.check.other.mean()):.2f}, of the same clean "
        f"images {float(before.mean()):.2f}; difference {change.mean:.2f} [{change.low:.2f}, {change.high:.2f}], "
        f"on {count} examples."
    )
    return [first, Statement(text, numbers, verdict(change.low, change.high), source)]


def _drawings(
    judged: list[_Judged], manifold: Manifold, classes: tuple[str, ...], count: int
) -> dict[str, Drawing]:
    """For each classifier and attack those examples to which other classes come nearest, and the clearest."""
    drawn = {}
    for number, each in enumerate(judged, start=1):
        if not len(each.found.rows):
            continue
        margins = each.check.other - each.check.own
        order = margins.argsort(stable=True)
        half = min(count, len(order)) // 2
        shown = torch.cat([order[: count - half], order[max(count - half, len(order) - half) :]])
        examples = _examples(each, shown, manifold, classes)
        drawn[f"examples_{number}"] = Drawing(
            draw_examples(examples),
            f"{each.method} under {each.attack}: whose label is kept?",
            "Clean images, what the attack made of them, and the nearest image of another class with its distance "
            "(L2): on the left where that is nearest, on the right where it is furthest. Marked are examples that "
            "keep their label, and such as do not.",
        )
    return drawn


def _examples(
    each: _Judged, shown: Tensor, manifold: Manifold, classes: tuple[str, ...]
) -> list[Example]:
    rows = each.found.rows[shown]
    images, other = each.found.images[shown], each.check.other_class[shown]
    nearest = nearest_of_class(manifold, images, other, indices=each.batch.indices[rows]).points

    def pixels(tensor: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        array: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = tensor.float().cpu().numpy()
        return array

    return [
        Example(
            clean=pixels(each.batch.images[row]),
            adversarial=pixels(images[place]),
            nearest=pixels(nearest[place]),
            label=classes[int(each.batch.labels[row])],
            prediction=classes[int(each.predictions[shown[place]])],
            other=classes[int(other[place])],
            distance=float(each.check.other[shown[place]]),
            kept=bool(each.check.kept[shown[place]]),
        )
        for place, row in enumerate(rows.tolist())
    ]
