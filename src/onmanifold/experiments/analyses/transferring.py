"""Which classifiers the adversarial examples of others fool (Disentangling appendix E, figure 13)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import pandas as pd

from onmanifold.classifiers import load_classifier
from onmanifold.evaluation import compare_paired, transfer
from onmanifold.evaluation.transferred import Base, Transfer
from onmanifold.experiments.analyses.base import (
    ANALYSES,
    Analysis,
    Drawing,
    Findings,
    Statement,
    Workplace,
)
from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.registry import nearest
from onmanifold.reports.claims import Verdict
from onmanifold.reports.drawings.generalisation import draw_transfer

WHITE_BOX = "itself"
"""Row of the images that were made on the very classifier that they are tried on."""

_CONFIDENCE = 0.95


class _Model(NamedTuple):
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}, seed {self.seed}"


@ANALYSES.register("transfer")
@dataclass(frozen=True)
class TransferAnalysis(Analysis):
    """Adversarial examples of each classifier, on and off the manifold, shown to all the others.

    Images made on a classifier of one method and seed are tried on those of all methods and seeds. What is
    finished is kept in the folder of results, and not repeated.

    Attributes:
        methods: Which of the experiment's; None: all.
        seeds: Which of the experiment's; None: all. With several, images are also tried on classifiers of the
            same method that differ in the seed alone.
        attacks: Which of the experiment's; None: all.
        base: Which images success rates are shares of: those that the "target" classifies correctly, or those
            that "both" classifiers do, as in the paper.
    """

    needs_experiment: ClassVar[bool] = True

    methods: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None
    attacks: tuple[str, ...] | None = None
    base: Base = "both"

    def __post_init__(self) -> None:
        self._not_empty("methods", "seeds", "attacks")

    def run(self, place: Workplace) -> Findings:
        session = place.experiment
        setup, spec = session.setup, session.setup.experiment.evaluation
        for name in self.attacks or ():
            if name not in setup.attacks:
                raise ConfigError(
                    f"analysis: attacks: unknown attack {name!r}.{nearest(name, setup.attacks)}"
                )
        attacks = {name: setup.attacks[name] for name in self.attacks or setup.attacks}
        jobs = place.trained(self.methods, self.seeds)
        if len(jobs) < 2:
            raise ConfigError("experiment: expected two or more classifiers, found one.")
        models = {_Model(job.method, job.seed): load_classifier(job.classifier) for job in jobs}
        place.say(f"Transfer: {len(models)} classifiers, each attacked and shown to all …")
        found = transfer(
            {model.name: network for model, network in models.items()},
            setup.test,
            attacks,
            spec.batch_size,
            spec.seed,
            directory=place.out / "transfer",
            fabric=session.fabric,
            progress=place.bars,
        )
        pairs = self._pairs(found, list(models))
        panels = {attack: _matrix(pairs[pairs.attack == attack]) for attack in attacks}
        base = "both classify" if self.base == "both" else "the latter classifies"
        words = (
            f"Images made on the classifiers of one method, tried on those of another: of those that {base} "
            f"correctly as they are, the share that is misclassified. {setup.train.name}, "
            f"{len(setup.test):,} images; means over {len(set(pairs.target_seed))} seeds of each method."
        )
        return Findings(
            tables={"rates": _summary(pairs), "pairs": pairs},
            drawings={"transfer": Drawing(draw_transfer(panels), "Transferred attacks", words)},
            statements=[_own_gradients_are_best(found, attack) for attack in attacks],
        )

    def _pairs(self, found: Transfer, models: Sequence[_Model]) -> pd.DataFrame:
        """A row for each attack and pair of classifiers."""
        rows = [
            {
                "attack": attack,
                "source": source.method,
                "source_seed": source.seed,
                "target": target.method,
                "target_seed": target.seed,
                "clean_accuracy": found.clean_accuracy(target.name),
                "accuracy": found.accuracy(attack, source.name, target.name),
                "success_rate": found.success_rate(attack, source.name, target.name, self.base),
            }
            for attack in found.attacks
            for source in models
            for target in models
        ]
        return pd.DataFrame(rows)


def _summary(pairs: pd.DataFrame) -> pd.DataFrame:
    """A row for each attack, source and target method: success rates over the pairs of different classifiers."""
    own = (pairs.source == pairs.target) & (pairs.source_seed == pairs.target_seed)
    rows = pairs.assign(source=pairs.source.where(~own, WHITE_BOX))
    groups = rows.groupby(["attack", "source", "target"], sort=False).success_rate
    summary = groups.agg(pairs="count", success_rate="mean", lowest="min", highest="max")
    return summary.reset_index()


def _matrix(pairs: pd.DataFrame) -> pd.DataFrame:
    """Mean success rates: the white-box attacks first, then a row for each method as the source."""
    methods = list(dict.fromkeys(pairs.target))
    table = _summary(pairs).pivot(index="source", columns="target", values="success_rate")
    return table.reindex(index=[WHITE_BOX, *methods], columns=methods)


def _own_gradients_are_best(found: Transfer, attack: str) -> Statement:
    """Whether any transferred attack does more than the same attack on the model itself."""
    pairs = list(_others(found))
    # As many comparisons as pairs, each with a narrower error, so that all together keep theirs (Bonferroni).
    confidence = 1 - (1 - _CONFIDENCE) / len(pairs)
    compared = {
        (source, target): compare_paired(
            found.evaluation(source, target).correct(attack),
            found.evaluation(target, target).correct(attack),
            confidence,
        )
        for source, target in pairs
    }
    (source, target), least = min(compared.items(), key=lambda item: item[1].difference)
    judged: Verdict = "within noise"
    if all(one.low > 0 for one in compared.values()):
        judged = "holds"
    elif any(one.high < 0 for one in compared.values()):
        judged = "does not hold"
    return Statement(
        f"Under {attack}, no images made on another classifier fool more than those made on the classifier "
        "itself; where they do, its gradients mislead",
        f"Over {len(pairs)} pairs, the smallest lead of the attack on the classifier itself: "
        f"{100 * least.difference:.1f} points of accuracy [{100 * least.low:.1f}, {100 * least.high:.1f}], for "
        f"images made on {source}, tried on {target}.",
        judged,
        "Disentangling, appendix E: lower success rates",
    )


def _others(found: Transfer) -> Iterator[tuple[str, str]]:
    return (pair for pair in found.evaluations if pair[0] != pair[1])
