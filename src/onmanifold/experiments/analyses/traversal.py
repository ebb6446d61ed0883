"""Latent traversals: what the latents of a manifold do to images, and how strongly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from onmanifold.analysis.traversal import Traversal, principal_directions, traverse
from onmanifold.evaluation.statistics import mean_interval
from onmanifold.experiments.analyses.base import (
    ANALYSES,
    Analysis,
    Drawing,
    Findings,
    Workplace,
)
from onmanifold.experiments.datasets import load_split
from onmanifold.experiments.setup import manifold_of
from onmanifold.experiments.spec import Mapped, parse_dataset
from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.modules import device_of
from onmanifold.manifolds.base import Manifold
from onmanifold.manifolds.fonts import FontsManifold
from onmanifold.reports.drawings.traversal import draw_changes, draw_traversal
from onmanifold.training.run import one_process

_FONTS = ("translation x", "translation y", "shear x", "shear y", "scale", "rotation")
_ENCODED = 64


@ANALYSES.register("traversal")
@dataclass(frozen=True)
class LatentTraversal(Analysis):
    """Images along latent directions through the codes of test images, and their change per unit of latent.

    Attributes:
        dataset: As in an experiment; its test images are taken.
        manifold: Specification; None: the dataset's own.
        kind: "latents": one latent after the other; "principal": the directions in which the codes of the images
            vary most.
        directions: How many of them; None: all latents, at most 10, or 6 principal directions.
        steps: Images on each line.
        span: Largest distance from the code to either side; None: the manifold's box, or 2 where there is none.
        images: Number of test images on which change is measured.
        shown: Number of images that are drawn, the first of different classes.
    """

    dataset: Mapped | str = "fonts"
    manifold: Mapped | str | None = None
    kind: Literal["latents", "principal"] = "latents"
    directions: int | None = None
    steps: int = 9
    span: float | None = None
    images: int = 100
    shown: int = 2

    def __post_init__(self) -> None:
        self._at_least(steps=2, images=2, shown=1, directions=1)

    def run(self, place: Workplace) -> Findings:
        spec = parse_dataset(self.dataset, "dataset")
        manifold = manifold_of(self.manifold, spec)
        if manifold is None:
            raise ConfigError(
                f"manifold: the dataset {spec.type!r} has none of its own; say which."
            )
        manifold = manifold.eval().to(one_process("32-true", place.device).device)
        # Codes that come with images are those of the dataset's own manifold.
        stored = self.manifold is None
        test = load_split(spec, "test")
        batch = test.batch(torch.arange(min(self.images, len(test))), device_of(manifold))
        codes = batch.codes if stored else None
        if codes is None:
            codes = _encoded(manifold, batch.images, batch.labels)
        names, directions = self._directions(manifold, codes)
        place.say(f"{manifold.name}: {len(names)} directions through {len(codes)} images")
        found = traverse(manifold, codes, directions, self.steps, self.span)
        table = _table(names, found)
        with torch.no_grad():
            shown = _first_of_classes(batch.labels)[: self.shown]
            decoded = manifold.decode(codes[shown]).float().cpu().numpy()
        drawings = {
            f"traversal-{number}": Drawing(
                draw_traversal(
                    batch.images[row].float().cpu().numpy(),
                    decoded[number],
                    found.images[:, row].numpy(),
                    names,
                    found.offsets[:, row].float().cpu().numpy(),
                ),
                f"Latent traversal: {test.classes[int(batch.labels[row])]}",
                "Each row moves the code of one test image along one direction, as far as the manifold's box "
                "allows; all else stays. Below each image: its distance from the code.",
            )
            for number, row in enumerate(shown.tolist())
        }
        drawings["changes"] = Drawing(
            draw_changes(table),
            "Change of the image per unit of latent",
            f"Mean over {len(codes):,} test images with 95 % intervals: the length of the way through the images, "
            f"step by step over {self.steps} images on the line, and the image's derivative at the code itself.",
        )
        return Findings({"traversal": table}, drawings)

    def _directions(self, manifold: Manifold, codes: Tensor) -> tuple[list[str], Tensor]:
        if self.kind == "principal":
            count = min(6, manifold.latent_size) if self.directions is None else self.directions
            found = principal_directions(codes[:, : manifold.latent_size], count)
            return [f"direction {number}" for number in range(1, count + 1)], found
        count = min(10, manifold.latent_size) if self.directions is None else self.directions
        if count > manifold.latent_size:
            raise ConfigError(
                f"directions: expected at most {manifold.latent_size} for {manifold.name}, found {count}."
            )
        names = [f"latent {number}" for number in range(count)]
        if isinstance(manifold, FontsManifold):
            names = list(_FONTS[:count])
        return names, torch.eye(count, manifold.latent_size)


@torch.no_grad()
def _encoded(manifold: Manifold, images: Tensor, labels: Tensor) -> Tensor:
    parts = zip(torch.split(images, _ENCODED), torch.split(labels, _ENCODED), strict=True)
    return torch.cat([manifold.encode(*part) for part in parts])


def _first_of_classes(labels: Tensor) -> Tensor:
    """Positions: the first image of each class in the order in which classes appear, then the others."""
    seen: set[int] = set()
    first: list[int] = []
    rest: list[int] = []
    for position, label in enumerate(labels.tolist()):
        (rest if label in seen else first).append(position)
        seen.add(label)
    return torch.tensor(first + rest)


def _table(names: Sequence[str], found: Traversal) -> pd.DataFrame:
    rows = []
    for number, name in enumerate(names):
        row: dict[str, object] = {"direction": name, "images": found.change.shape[1]}
        for column in ("change", "rate"):
            values = getattr(found, column)[number].numpy()
            estimate = mean_interval(values[np.isfinite(values)])
            row |= {
                column: estimate.mean,
                f"{column}_low": estimate.low,
                f"{column}_high": estimate.high,
            }
        rows.append(row)
    return pd.DataFrame(rows)
