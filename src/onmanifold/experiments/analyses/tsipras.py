"""The toy problem of Tsipras et al. (Disentangling section I): can a classifier be robust and accurate?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from onmanifold.analysis.theory.agreement import ALLOWED_ERRORS
from onmanifold.analysis.theory.curves import trade_off_table
from onmanifold.analysis.theory.model import Array
from onmanifold.analysis.theory.tsipras import ToyDistribution, robust_bound
from onmanifold.experiments.analyses.base import (
    ANALYSES,
    Analysis,
    Drawing,
    Findings,
    Statement,
    Workplace,
)
from onmanifold.experiments.analyses.theory import verdict
from onmanifold.foundation.errors import ConfigError, InputError
from onmanifold.reports.drawings import theory as drawings


@ANALYSES.register("tsipras")
@dataclass(frozen=True)
class Tsipras(Analysis):
    """Standard and robust accuracy on the toy problem of Tsipras et al., with and without valid perturbations.

    Attributes:
        probability: p, that the first feature is the label.
        eta: Mean of the other features, times the label.
        others: How many other features there are.
        radius: Most that each of them moves; None: 2 eta.
        weights: Of the first feature in the classifiers, positive, beside that of the Bayes classifier; None: 24
            from a tenth of the Bayes classifier's to the first feature alone.
        samples: Of the Monte Carlo estimates.
        seed: Of the samples.
    """

    probability: float = 0.9
    eta: float = 3.0
    others: int = 1
    radius: float | None = None
    weights: tuple[float, ...] | None = None
    samples: int = 20_000
    seed: int = 0

    def __post_init__(self) -> None:
        self.toy()
        self._at_least(samples=2)
        for weight in self.weights or ():
            if not 0 < weight < np.inf:
                raise ConfigError(f"weights: expected positive numbers, found {weight}.")

    def toy(self) -> ToyDistribution:
        """The distribution.

        Raises:
            ConfigError: There is none such.
        """
        try:
            return ToyDistribution(self.probability, self.eta, self.others, self.radius)
        except InputError as error:
            raise ConfigError(str(error)) from error

    def run(self, place: Workplace) -> Findings:
        toy = self.toy()
        weights = self.weights or _weights(toy)
        place.say(f"{len(weights) + 1} classifiers")
        table = trade_off_table(toy, sorted({*weights, toy.bayes_weight}), self.samples, self.seed)
        bound = _bound(toy, table)
        caption = (
            f"p = {toy.probability:g}, eta = {toy.eta:g}, {toy.others} other features, radius "
            f"{toy.reach / toy.others:g}. Lines: closed forms; points: {self.samples:,} samples with standard "
            "errors. A perturbation is valid if its label stays the most probable one (definition 3)."
        )
        figure = drawings.draw_trade_off(table, toy.bayes_weight, bound)
        return Findings(
            {"trade_off": table},
            {"trade_off": Drawing(figure, "Robust and accurate, on the toy problem", caption)},
            list(_toy_statements(toy, table, bound, self.samples)),
        )


def _weights(toy: ToyDistribution) -> tuple[float, ...]:
    low = toy.bayes_weight / 10 or 0.01
    high = 1.3 * (toy.reach + 3 * np.sqrt(toy.others)) + toy.bayes_weight
    return tuple(float(value) for value in np.geomspace(low, high, 24))


def _bound(toy: ToyDistribution, table: pd.DataFrame) -> Array:
    """Theorem 2.1 of Tsipras et al., which needs the radius 2 eta; else no bound."""
    if toy.reach < 2 * toy.eta * toy.others:
        return np.ones(len(table))
    return robust_bound(toy, table.standard.to_numpy())


def _row(table: pd.DataFrame, scores: pd.Series) -> pd.Series:
    """The row of the highest score."""
    return table.iloc[int(scores.to_numpy().argmax())]


def _toy_statements(
    toy: ToyDistribution, table: pd.DataFrame, bound: Array, samples: int
) -> Iterator[Statement]:
    source = "Disentangling, section I"
    one = np.ones(1)
    before = np.concatenate([-one, np.full(toy.others, toy.eta)])[None]
    after = before - np.concatenate([0 * one, np.full(toy.others, toy.reach / toy.others)])[None]
    odds = [float(toy.log_odds(features)[0]) for features in (before, after)]
    yield Statement(
        "The example of eq. 27 is no adversarial example: its label is not the most probable one any more",
        f"x_1 = -1 and the others at eta, label 1: the log odds of the label are {odds[0]:.4g}, after the move "
        f"{odds[1]:.4g}.",
        verdict([odds[0] > 0 > odds[1]]),
        f"{source}, eq. 27",
    )
    bayes = _row(table, -(table.weight - toy.bayes_weight).abs())
    slack = bound - table.robust.to_numpy()
    yield Statement(
        "Against every perturbation robust accuracy is at most p / (1 - p) times the standard error",
        f"The most accurate one: {bayes.standard:.4f} standard, {bayes.robust:.4f} robust. Robust accuracy is "
        f"at least {max(slack.min(), 0):.2g} below p / (1 - p) times the standard error.",
        verdict([bool((slack >= -1e-12).all())])
        if (bound < 1).any() and bayes.standard > toy.probability
        else "not measured",
        "Tsipras et al. 2018, theorem 2.1",
    )
    best = _row(table, table.valid)
    yield Statement(
        "Against valid perturbations the most accurate classifier is the most robust one, and loses nothing",
        f"The Bayes classifier: {bayes.standard:.4f} standard, {bayes.valid:.4f} robust; the most that any weight "
        f"reaches is {table.standard.max():.4f} and {best.valid:.4f}.",
        verdict([bool(bayes.valid >= best.valid and bayes.standard == bayes.valid)]),
        source,
    )
    others = table[table.weight != bayes.weight]
    accurate = _row(others, others.standard)
    yield Statement(
        "Then accurate classifiers are robust",
        f"Only the Bayes classifier has no valid adversarial examples: of weight {accurate.weight:.4g} instead of "
        f"{bayes.weight:.4g} the standard accuracy is {accurate.standard:.4f}, and the robust one "
        f"{accurate.valid:.4f}.",
        verdict([bool(accurate.standard - accurate.valid < 0.01)]),
        "not said there",
    )
    errors = _errors_off(table, samples)
    yield Statement(
        "Closed forms and Monte Carlo agree",
        f"{errors.size} compared; the largest difference is {errors.max():.2f} standard errors of a share of "
        f"{samples:,} samples, and {ALLOWED_ERRORS:g} are allowed.",
        verdict([bool(errors.max() <= ALLOWED_ERRORS)]),
    )


def _errors_off(table: pd.DataFrame, samples: int) -> Array:
    """Differences of sampled accuracies from their closed forms, in standard errors of the closed form's share.

    The samples' own standard errors are too small where an event is rare and was seen too rarely.
    """
    found = []
    for name in ("standard", "robust", "valid"):
        share = table[name].to_numpy()
        error = np.sqrt(np.maximum(share * (1 - share), 1 / samples) / samples)
        found.append(np.abs(table[f"{name} sampled"].to_numpy() - share) / error)
    return np.concatenate(found)
