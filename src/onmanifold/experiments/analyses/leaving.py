"""Do adversarial examples leave the manifold? (Disentangling, sections 3.2 and C, figures 3, 10 and 14)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, TypeVar

import pandas as pd
import torch

from onmanifold.analysis.leaving import Leaving, measure_leaving
from onmanifold.analysis.successful import NothingRightError
from onmanifold.analysis.validity import check_label
from onmanifold.classifiers import load_classifier
from onmanifold.data.dataset import Batch
from onmanifold.experiments.analyses.base import (
    ANALYSES,
    Analysis,
    Drawing,
    Findings,
    Statement,
    Workplace,
)
from onmanifold.experiments.analyses.leaving_results import (
    MEASURES,
    STEP,
    distance_table,
    judge,
    nothing_right,
    separation_table,
    success_table,
    tangent_table,
)
from onmanifold.experiments.setup import Setup, chosen_attacks, manifold_of
from onmanifold.manifolds.base import Manifold
from onmanifold.manifolds.project import ProjectionConfig
from onmanifold.reports.drawings.leaving import draw_angles, draw_distances

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")


@ANALYSES.register("leaving_the_manifold")
@dataclass(frozen=True)
class LeavingTheManifold(Analysis):
    """Distances of adversarial examples to the manifold, and angles of perturbations to its tangent spaces.

    The experiment's attacks are tried on its classifiers, those on latent balls as on-manifold attacks, all others
    as regular ones. Only successful examples count, on images that are classified correctly; a classifier that
    gets none right is named, and left out.

    Attributes:
        methods: Which of the experiment's classifiers; None: all.
        attacks: Which of its attacks; None: all.
        images: Number of test images.
        judged: Number of successful on-manifold examples of each attack whose label is checked by projection onto
            every class; 0: none. On FONTS some seconds for each.
        neighbours: Training images that span the approximated manifold.
        projection: How the nearest point of the manifold is searched.
        seed: Of the experiment's classifiers, one of its seeds; None: the first.
    """

    needs_experiment: ClassVar[bool] = True

    methods: tuple[str, ...] | None = None
    attacks: tuple[str, ...] | None = None
    images: int = 200
    judged: int = 100
    neighbours: int = 50
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    seed: int | None = None

    def __post_init__(self) -> None:
        self._at_least(images=1, judged=0, neighbours=1)
        self._not_empty("methods", "attacks")

    def run(self, place: Workplace) -> Findings:
        setup = place.experiment.setup
        manifold = place.manifold
        attacks = chosen_attacks(setup.attacks, self.attacks)
        device = place.experiment.fabric.device
        batch = first_images(setup, manifold, self.images, device)
        train_images = setup.train.batch(torch.arange(len(setup.train)), device).images
        seed = setup.experiment.seeds[0] if self.seed is None else self.seed
        measured: dict[str, Leaving] = {}
        kept: dict[str, dict[str, tuple[int, int]]] = {}
        left_out: list[Statement] = []
        for job in place.trained(self.methods, [seed]):
            place.say(f"{job.method}: attacks, distances and tangents")
            try:
                leaving = measure_leaving(
                    load_classifier(job.classifier).to(device),
                    manifold.to(device),
                    batch,
                    attacks,
                    train_images,
                    neighbours=self.neighbours,
                    projection=self.projection,
                )
            except NothingRightError:
                claim = "regular adversarial examples leave the manifold"
                left_out.append(nothing_right(job.method, claim, len(batch.labels)))
                place.say(f"{job.method}: {left_out[-1].numbers}")
                continue
            measured[job.method] = leaving
            if self.judged and knows_classes(manifold):
                place.say(f"{job.method}: labels")
                kept[job.method] = self._labels(manifold, leaving)
        if not measured:
            return Findings(statements=left_out)
        return Findings(
            tables={
                "success": success_table(measured, kept),
                "distances": distance_table(measured),
                "separation": separation_table(measured),
                "tangents": tangent_table(measured),
                "images": joined({name: each.images for name, each in measured.items()}),
                "directions": joined({name: each.directions for name, each in measured.items()}),
            },
            drawings=_drawings(measured, setup.test.name),
            statements=[
                item
                for name, each in measured.items()
                for item in judge(name, each, kept.get(name, {}))
            ]
            + left_out,
            shown=24,
        )

    def _labels(self, manifold: Manifold, leaving: Leaving) -> dict[str, tuple[int, int]]:
        """How many of the examples of each on-manifold attack keep their label, and of how many."""
        counts = {}
        for name in leaving.on_manifold:
            found = leaving.found[name]
            rows = slice(0, self.judged)
            which = found.rows[rows]
            codes = None if found.codes is None else found.codes[rows]
            batch = leaving.batch
            result = check_label(
                manifold,
                found.images[rows],
                batch.labels[which],
                codes,
                indices=batch.indices[which],
            )
            counts[name] = int(result.kept.sum()), len(which)
        return counts


def first_images(setup: Setup, manifold: Manifold, count: int, device: torch.device) -> Batch:
    """The first test images, without their codes where those are not of this manifold.

    Codes of another manifold may have as many columns; the data's own manifold tells.
    """
    batch = setup.test.batch(torch.arange(min(count, len(setup.test))), device)
    own = None if batch.codes is None else manifold_of(None, setup.experiment.dataset)
    if own is None or own.fingerprint != manifold.fingerprint:
        return batch._replace(codes=None)
    return batch


def knows_classes(manifold: Manifold) -> bool:
    """Whether codes of a manifold hold the class, so that there is a manifold of each."""
    return bool(getattr(manifold, "conditional", False)) or manifold.name == "fonts"


def joined(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One table, with the classifier in front."""
    parts = []
    for name, table in tables.items():
        part = table.copy()
        part.insert(0, "classifier", name)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def _drawings(measured: Mapping[str, Leaving], dataset: str) -> dict[str, Drawing]:
    """Those for which there is something to draw."""
    images = {name: each.images for name, each in measured.items()}
    directions = {name: each.directions for name, each in measured.items()}
    count = max(each.images_seen for each in measured.values())
    scale = f"{count} test images of {dataset}; only successful examples count."
    drawn: dict[str, tuple[Figure | None, str, str]] = {
        measure: (
            draw_distances(images, measure, f"distance to {words} (L2, pixels in [0, 1])"),
            f"Distance to {words}",
            f"How far clean images, adversarial examples and random perturbations of the same size lie from "
            f"{words}, for each classifier. {scale}",
        )
        for measure, words in MEASURES.items()
    }
    drawn[STEP] = (
        draw_distances(images, STEP, "distance of the perturbation (L2, pixels in [0, 1])"),
        "Distance of the perturbation to the span of neighbours",
        "What of a perturbation no move along the nearest training images explains (eq. 11). Perturbations along "
        f"the manifold are larger, and their own part grows with them. {scale}",
    )
    rank = next(iter(measured.values()))
    drawn["angles"] = (
        draw_angles(images, directions, rank.rank / rank.pixels),
        "Angle to the tangent space",
        "Between the tangent space of the manifold at the clean image and perturbations, loss gradients and "
        "random directions; of on-manifold attacks also the perturbation that a hundredth of their move makes. "
        f"The line is where a random direction lies on average. {scale}",
    )
    return {
        name: Drawing(figure, title, caption)
        for name, (figure, title, caption) in drawn.items()
        if figure is not None
    }
