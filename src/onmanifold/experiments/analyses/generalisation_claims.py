"""What Disentangling claims of robustness and generalisation, judged from many trainings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from onmanifold.analysis.generalisation import POOLED, Relation
from onmanifold.evaluation.statistics import verdict
from onmanifold.experiments.analyses.base import Statement
from onmanifold.reports.claims import Verdict

# Success rates from here on leave an attack no room to do better.
_CEILING = 0.99


def essentially_generalisation(attack: str, relations: Mapping[str, Relation]) -> Statement:
    """Claim 3: the success rate on the manifold rises with test error.

    For each method the interval of Pearson's r must lie above 0; of Fisher's and the bootstrap's interval the
    outer ends count. Over all methods r is told and does not count: it also holds what differs between them.

    Args:
        attack: Which one, for the reader.
        relations: By method, and `POOLED`, from `relate`.
    """
    verdicts, words = [], []
    for name, relation in relations.items():
        judged, text = _correlated(relation)
        if name != POOLED:
            verdicts.append(judged)
        words.append(f"{name}: {text}")
    return Statement(
        f"On-manifold robustness is essentially generalisation: under {attack}, the success rate rises with "
        "test error, for each method",
        "Pearson's r with the interval by Fisher's z and by the bootstrap over trainings. "
        + "; ".join(words)
        + ".",
        _together(verdicts),
        "Disentangling, section 3.4, figure 5",
    )


def not_contradicting(
    attack: str, relations: Mapping[str, Relation], tolerance: float
) -> Statement:
    """Claim 4: for a fixed method, the regular success rate does not rise as test error falls.

    The slope of the regression line must not be below minus the tolerance; its whole interval decides. Only
    single methods count: between methods the paper claims nothing.

    Args:
        attack: Which one, for the reader.
        relations: By method, and `POOLED`, from `relate`.
        tolerance: In points of success rate for each point of test error.
    """
    verdicts, words = [], []
    for name, relation in relations.items():
        if name == POOLED:
            continue
        judged, text = _falling(relation, tolerance)
        verdicts.append(judged)
        words.append(f"{name}: {text}")
    return Statement(
        f"Regular robustness and generalisation are not contradicting: under {attack}, the success rate of no "
        f"method rises by more than {tolerance:g} points for each point that test error falls",
        "Slope of the success rate over test error, with Student's interval. "
        + "; ".join(words)
        + ".",
        _together(verdicts),
        "Disentangling, section 3.5, figure 6",
    )


def _correlated(relation: Relation) -> tuple[Verdict, str]:
    fisher, bootstrap = relation.pearson, relation.bootstrap
    if np.isnan(fisher.coefficient):
        return "not measured", f"not defined ({_range(relation)})"
    judged = verdict(min(fisher.low, bootstrap.low), max(fisher.high, bootstrap.high))
    text = (
        f"{fisher.coefficient:.2f} [{fisher.low:.2f}, {fisher.high:.2f}], "
        f"[{bootstrap.low:.2f}, {bootstrap.high:.2f}] ({judged})"
    )
    return judged, text


def _falling(relation: Relation, tolerance: float) -> tuple[Verdict, str]:
    line = relation.line
    if np.isnan(line.slope):
        return "not measured", "not defined"
    judged = verdict(line.low + tolerance, line.high + tolerance)
    ceiling = ", at the ceiling" if relation.rates.min() >= _CEILING else ""
    text = f"{line.slope:.2f} [{line.low:.2f}, {line.high:.2f}] ({_range(relation)}{ceiling}; {judged})"
    return judged, text


def _range(relation: Relation) -> str:
    if not len(relation.rates):
        return "no trainings"
    low, high = 100 * relation.rates.min(), 100 * relation.rates.max()
    return f"{low:.0f} to {high:.0f} % fooled"


def _together(verdicts: Iterable[Verdict]) -> Verdict:
    """All must hold; one that fails decides, what is not measured does not."""
    found = set(verdicts) - {"not measured"}
    worst_first: tuple[Verdict, ...] = ("does not hold", "within noise", "holds")
    for worst in worst_first:
        if worst in found:
            return worst
    return "not measured"
