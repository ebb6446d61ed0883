"""What Disentangling claims of robustness and generalisation, judged from many trainings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from onmanifold.analysis.generalisation import POOLED, Relation
from onmanifold.evaluation.statistics import verdict
from onmanifold.experiments.analyses.base import Statement
from onmanifold.reports.claims import Verdict

# Success rates from here on leave an attack no room to do better.
_CEILING = 0.99
_FEWEST = 3
"""Trainings through which a line has a slope with an interval."""


def essentially_generalisation(
    attack: str, relations: Mapping[str, Relation], methods: Sequence[str] = ()
) -> Statement:
    """Claim 3: the success rate on the manifold rises with test error.

    For each method the interval of Pearson's r must lie above 0; of Fisher's and the bootstrap's interval the
    outer ends count. A method whose rates or test errors do not vary shows no correlation: of it, and so of all,
    the claim is not measured, unless another method refutes it. Over all methods r is told and does not count: it
    also holds what differs between them.

    Args:
        attack: Which one, for the reader.
        relations: By method, and `POOLED`, from `relate`.
        methods: All that were tried; those without a relation, because their trainings failed, are not measured.
    """
    verdicts, words = _each(relations, methods, _correlated)
    if POOLED in relations:
        words.append(f"{POOLED}: {_correlated(relations[POOLED])[1]}")
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
    attack: str,
    relations: Mapping[str, Relation],
    tolerance: float,
    methods: Sequence[str] = (),
) -> Statement:
    """Claim 4: for a fixed method, the regular success rate does not rise as test error falls.

    The slope of the regression line must not be below minus the tolerance; its whole interval decides. Rates
    that are constant, or all at the ceiling, could not have risen: of such a method, and so of all, the claim is
    not measured, unless another method refutes it. Only single methods count: between methods the paper claims
    nothing.

    Args:
        attack: Which one, for the reader.
        relations: By method, and `POOLED`, from `relate`.
        tolerance: In points of success rate for each point of test error.
        methods: All that were tried; those without a relation, because their trainings failed, are not measured.
    """
    verdicts, words = _each(relations, methods, lambda relation: _falling(relation, tolerance))
    return Statement(
        f"Regular robustness and generalisation are not contradicting: under {attack}, the success rate of no "
        f"method rises by more than {tolerance:g} points for each point that test error falls",
        "Slope of the success rate over test error, with Student's interval. "
        + "; ".join(words)
        + ".",
        _together(verdicts),
        "Disentangling, section 3.5, figure 6",
    )


def _each(
    relations: Mapping[str, Relation],
    methods: Sequence[str],
    judge: Callable[[Relation], tuple[Verdict, str]],
) -> tuple[list[Verdict], list[str]]:
    """The verdict on each single method, and the words for it; one without a relation is not measured."""
    found = {name: judge(relation) for name, relation in relations.items() if name != POOLED}
    missing: tuple[Verdict, str] = ("not measured", "no trainings with numbers (not measured)")
    found |= {name: missing for name in methods if name not in found}
    return [judged for judged, _ in found.values()], [
        f"{name}: {text}" for name, (_, text) in found.items()
    ]


def _correlated(relation: Relation) -> tuple[Verdict, str]:
    fisher, bootstrap = relation.pearson, relation.bootstrap
    unknown = _not_varied(relation)
    if unknown:
        return "not measured", f"{unknown} (not measured)"
    judged = verdict(min(fisher.low, bootstrap.low), max(fisher.high, bootstrap.high))
    text = (
        f"{fisher.coefficient:.2f} [{fisher.low:.2f}, {fisher.high:.2f}], "
        f"[{bootstrap.low:.2f}, {bootstrap.high:.2f}] ({judged})"
    )
    return judged, text


def _falling(relation: Relation, tolerance: float) -> tuple[Verdict, str]:
    line = relation.line
    unknown = _not_varied(relation)
    if unknown:
        return "not measured", f"{unknown} (not measured)"
    low, high = 100 * relation.rates.min(), 100 * relation.rates.max()
    fooled = f"{low:.0f} to {high:.0f} % fooled"
    if low >= 100 * _CEILING:
        return "not measured", f"{fooled}, all at the ceiling (not measured)"
    judged = verdict(line.low + tolerance, line.high + tolerance)
    text = f"{line.slope:.2f} [{line.low:.2f}, {line.high:.2f}] ({fooled}; {judged})"
    return judged, text


def _not_varied(relation: Relation) -> str:
    """Why nothing can be said of how the rate goes with test error; empty where something can."""
    if relation.pearson.points < _FEWEST:
        return f"{relation.pearson.points} trainings with numbers, too few"
    if np.isnan(relation.line.slope):
        return f"the same test error, {100 * relation.errors[0]:.1f} %, in all trainings"
    if np.isnan(relation.pearson.coefficient):
        ceiling = ", at the ceiling" if relation.rates.min() >= _CEILING else ""
        return f"always {100 * relation.rates[0]:.0f} % fooled{ceiling}"
    return ""


def _together(verdicts: Iterable[Verdict]) -> Verdict:
    """All must hold.

    As for the claims of an experiment, what is not measured keeps a claim from holding. Unlike there, it does
    not hide a failure: a claim of every method is refuted by one, whatever the others would show.
    """
    found = set(verdicts)
    worst_first: tuple[Verdict, ...] = ("does not hold", "not measured", "within noise", "holds")
    return next((worst for worst in worst_first if worst in found), "not measured")
