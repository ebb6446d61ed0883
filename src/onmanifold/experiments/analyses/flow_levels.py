"""Attacks on single levels of a flow: what they look like, and what they do (IJSAT, appendix D, figure 8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn

from onmanifold.analysis.flow_levels import LevelAttack, attack_levels
from onmanifold.classifiers import load_classifier
from onmanifold.data.dataset import Batch, Dataset
from onmanifold.evaluation.statistics import (
    compare_paired,
    mean_interval,
    verdict,
    wilson_interval,
)
from onmanifold.experiments.analyses.base import (
    ANALYSES,
    Analysis,
    Drawing,
    Findings,
    Statement,
    Workplace,
)
from onmanifold.experiments.setup import manifold_of
from onmanifold.experiments.spec import Mapped
from onmanifold.foundation.errors import ConfigError
from onmanifold.manifolds.base import Manifold
from onmanifold.reports.drawings.flow_levels import draw_level_measures, draw_levels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SOURCE = "IJSAT, appendix D, figure 8"


@ANALYSES.register("flow_levels")
@dataclass(frozen=True)
class FlowLevels(Analysis):
    """PGD on each level of a flow's latents by itself, and on all at once, at several radii.

    The paper shows images; beside them stand the success on a classifier, the size of the change in pixels, and
    its mean spatial frequency, which says whether the pattern is fine or coarse. The paper's "from coarse to fine
    in semantic details" is about meaning: in pixels its own level 1 is noise, and higher levels are coarser.

    Attributes:
        manifold: Specification; None: the experiment's.
        method: Whose classifier is attacked; None: the experiment's first method. Its first seed is taken.
        radii: Of the l∞ ball around the latents; the defaults are the paper's.
        steps: Of PGD.
        images: Number of test images that are attacked: the first ones that the classifier sees right, so many
            as there are.
        batch_size: Images at once.
        seed: Of the attack's random starts.
    """

    needs_experiment: ClassVar[bool] = True

    manifold: Mapped | str | None = None
    method: str | None = None
    radii: tuple[float, ...] = (0.02, 0.04, 0.1)
    steps: int = 20
    images: int = 100
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        self._at_least(steps=1, images=2, batch_size=1)
        if not self.radii or min(self.radii) <= 0 or list(self.radii) != sorted(set(self.radii)):
            raise ConfigError(f"radii: expected rising numbers > 0, found {list(self.radii)}.")

    def run(self, place: Workplace) -> Findings:
        session = place.experiment
        manifold = self._manifold(place).to(session.fabric.device)
        if len(manifold.levels) < 2:
            raise ConfigError(
                f"manifold: expected one of several levels, found {manifold.name} with one."
            )
        experiment = session.setup.experiment
        method = self.method or next(iter(experiment.methods))
        job = place.trained([method], [experiment.seeds[0]])[0]
        model = load_classifier(job.classifier).to(session.fabric.device)
        test = session.setup.test
        batch = self._seen_right(model, test, session.fabric.device)
        found = []
        for result in attack_levels(
            *(model, manifold, batch.images, batch.labels, self.radii),
            steps=self.steps,
            batch_size=self.batch_size,
            seed=self.seed,
            indices=batch.indices,
        ):
            found.append(result)
            place.say(f"{_name(result)}, radius {result.radius:g}: attacked")
        table = pd.DataFrame([_row(result) for result in found])
        with torch.no_grad():
            shown = _most_telling(found)
            seen = [int(model(result.images[shown].unsqueeze(0)).argmax()) for result in found]
        drawings = {
            "levels": Drawing(
                self._picture(found, batch, shown, [test.classes[label] for label in seen]),
                "Attacks on single levels",
                f"A test image ({test.classes[int(batch.labels[shown])]}) with one level of its latents attacked, "
                "and with all of them, at several radii; below, the class that the classifier sees, ✗ where it is "
                "wrong. On the right the change of each pixel, mean over channels, times the number below.",
            ),
            "measures": Drawing(
                draw_level_measures(table),
                "What attacks on single levels do",
                f"PGD-{self.steps} on the latents of {len(batch.labels):,} correctly classified images, means "
                "with 95 % intervals over images. Frequency: of the change, weighted by power; independent pixels "
                "have 0.38.",
            ),
        }
        return Findings({"levels": table}, drawings, _statements(found))

    @torch.no_grad()
    def _seen_right(self, model: nn.Module, test: Dataset, device: torch.device) -> Batch:
        right = torch.cat(
            [
                model(batch.images).argmax(1).cpu() == batch.labels.cpu()
                for part in torch.split(torch.arange(len(test)), self.batch_size)
                for batch in [test.batch(part, device)]
            ]
        )
        positions = right.nonzero().squeeze(1)[: self.images]
        if len(positions) < 2:
            raise ConfigError(
                f"method: expected a classifier that is right on at least two of {len(test)} test images, found "
                f"one that is right on {len(positions)}."
            )
        return test.batch(positions, device)

    def _manifold(self, place: Workplace) -> Manifold:
        setup = place.experiment.setup
        if self.manifold is None:
            manifold = setup.manifold
        else:
            manifold = manifold_of(self.manifold, setup.experiment.dataset)
        if manifold is None:
            raise ConfigError("manifold: the experiment has none; say which.")
        return manifold.eval()

    def _picture(
        self, found: Sequence[LevelAttack], batch: Batch, shown: int, seen: Sequence[str]
    ) -> Figure:
        count = len(self.radii)
        pictures = torch.stack([result.images[shown] for result in found]).float().cpu().numpy()
        fooled = [bool(result.success[shown]) for result in found]
        return draw_levels(
            batch.images[shown].float().cpu().numpy(),
            pictures.reshape(-1, count, *pictures.shape[1:]),
            [_name(result) for result in found[::count]],
            self.radii,
            [list(seen[start : start + count]) for start in range(0, len(seen), count)],
            [fooled[start : start + count] for start in range(0, len(fooled), count)],
        )


def _name(result: LevelAttack) -> str:
    if result.levels is None:
        return "all levels"
    return "level " + ", ".join(map(str, result.levels))


def _row(result: LevelAttack) -> dict[str, object]:
    count, hits = len(result.success), int(result.success.sum())
    low, high = wilson_interval(hits, count)
    row: dict[str, object] = {
        "level": _name(result),
        "radius": result.radius,
        "images": count,
        "success": hits / count,
        "success_low": low,
        "success_high": high,
    }
    for name in ("linf", "l2", "frequency"):
        estimate = mean_interval(_values(result, name))
        row |= {name: estimate.mean, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return row


def _values(result: LevelAttack, name: str) -> NDArray[np.float64]:
    values = getattr(result, name).double().numpy(force=True)
    return np.asarray(values[np.isfinite(values)], dtype=np.float64)


def _most_telling(found: Sequence[LevelAttack]) -> int:
    """The first image that about half of the attacks fool: there their pictures differ."""
    fooled = torch.stack([result.success for result in found]).double().mean(0)
    return int((fooled - 0.5).abs().argmin())


def _statements(found: Sequence[LevelAttack]) -> list[Statement]:
    alone = [result for result in found if result.levels is not None]
    radii = list(dict.fromkeys(result.radius for result in found))
    statements = []
    for radius in radii:
        single = [result for result in alone if result.radius == radius]
        whole = next(r for r in found if r.levels is None and r.radius == radius)
        statements.append(_finer(single[0], single[-1]))
        best = max(single, key=lambda result: float(result.success.double().mean()))
        statements.append(_stronger(whole, best))
    return statements


def _finer(first: LevelAttack, last: LevelAttack) -> Statement:
    """The change goes from fine to coarse, from the first level to the last."""
    one, other = (r.frequency.double().numpy(force=True) for r in (first, last))
    both = np.isfinite(one) & np.isfinite(other)
    estimate = mean_interval((one - other)[both])
    return Statement(
        f"At radius {first.radius:g} the change is finer on {_name(first)} than on {_name(last)}",
        f"Mean frequency {one[both].mean():.3f} against {other[both].mean():.3f} cycles per pixel, difference "
        f"{estimate.mean:+.3f} (95 % interval over {estimate.runs:,} images: {estimate.low:+.3f} to "
        f"{estimate.high:+.3f}).",
        verdict(estimate.low, estimate.high),
        _SOURCE,
    )


def _stronger(whole: LevelAttack, best: LevelAttack) -> Statement:
    """All levels at once are a stronger attack than the strongest of them alone."""
    every, alone = (r.success.numpy(force=True) for r in (whole, best))
    pair = compare_paired(every, alone)
    return Statement(
        f"At radius {whole.radius:g} an attack on all levels fools the classifier more often than one on "
        f"{_name(best)}, the best alone",
        f"{100 * every.mean():.1f} % against {100 * alone.mean():.1f} %, difference "
        f"{100 * pair.difference:+.1f} points (95 % interval over {pair.samples:,} images: "
        f"{100 * pair.low:+.1f} to {100 * pair.high:+.1f}).",
        verdict(pair.low, pair.high),
        _SOURCE,
    )
