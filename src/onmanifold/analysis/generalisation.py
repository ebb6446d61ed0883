"""Robustness beside generalisation: correlations and lines over many trainings (Disentangling 3.4, 3.5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from onmanifold.foundation.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

POOLED = "all methods"
"""Name of the trainings of all methods together."""

Floats = npt.NDArray[np.float64]
Kind = Literal["pearson", "spearman"]
IntervalBy = Literal["fisher", "bootstrap"]

_FEWEST = 3
_RESAMPLES = 2000


class Correlation(NamedTuple):
    """How closely two quantities go together.

    Attributes:
        coefficient: In [-1, 1]; NaN where it is not defined: fewer than 3 points, or a quantity that is constant.
        low: Lower end of its interval; -1 where nothing is known.
        high: Upper end; 1 where nothing is known.
        points: Number of points.
    """

    coefficient: float
    low: float
    high: float
    points: int


@dataclass(frozen=True)
class Line:
    """A straight line through points by least squares, with what is needed for its intervals.

    The intervals are Student's: they take the deviations from the line as normal, alike and independent.

    Attributes:
        slope: Units of y for each unit of x; NaN where all x are the same, or there are fewer than 3 points.
        low: Lower end of the slope's interval; minus infinity where there is no slope.
        high: Upper end.
        height: Height of the line at the centre.
        centre: Mean of x.
        spread: Sum of squared distances of x from the centre.
        deviation: Of the points from the line, estimated with points - 2 degrees of freedom.
        points: Number of points.
        confidence: Of all intervals.
    """

    slope: float
    low: float
    high: float
    height: float
    centre: float
    spread: float
    deviation: float
    points: int
    confidence: float

    def at(self, x: npt.ArrayLike) -> Floats:
        """Height of the line at each x."""
        return self.height + self.slope * (np.asarray(x, dtype=np.float64) - self.centre)

    def band(self, x: npt.ArrayLike) -> tuple[Floats, Floats]:
        """Lower and upper end of the interval of the line's height (the mean of y, not single points) at x."""
        places = np.asarray(x, dtype=np.float64) - self.centre
        error = self.deviation * np.sqrt(1 / self.points + places**2 / self.spread)
        half = _student(self.points - 2, self.confidence) * error
        return self.at(x) - half, self.at(x) + half


@dataclass(frozen=True)
class Relation:
    """Success rate against test error over the trainings of one method, or of all.

    Attributes:
        sizes: (T,) number of training images of each training.
        errors: (T,) test errors in [0, 1].
        rates: (T,) success rates in [0, 1].
        pearson: Their correlation, with Fisher's interval.
        bootstrap: The same coefficient with the bootstrap's interval, over trainings.
        spearman: The correlation of their ranks, with the bootstrap's interval.
        line: Regression of the success rate on the test error.
    """

    sizes: npt.NDArray[np.int64]
    errors: Floats
    rates: Floats
    pearson: Correlation
    bootstrap: Correlation
    spearman: Correlation
    line: Line


def success_rate(clean: npt.ArrayLike, attacked: npt.ArrayLike) -> float:
    """Share of the correctly classified images that an attack fools (Disentangling, section 3.1).

    Images that are misclassified as they are need no attack; they count as test error and not here, so that a
    worse classifier does not by that alone look easier to fool. `Evaluation.success_rate` is the same number.

    Args:
        clean: (N,) bool, whether each image is classified correctly.
        attacked: (N,) bool, whether its attacked version is.

    Returns:
        In [0, 1]; NaN where no image is classified correctly.

    Raises:
        InputError: Not two bool arrays of one length.

    >>> success_rate([True, True, True, True, False], [True, False, False, False, False])
    0.75
    """
    one, two = np.asarray(clean), np.asarray(attacked)
    if one.ndim != 1 or one.shape != two.shape or one.dtype != bool or two.dtype != bool:
        raise InputError(
            f"clean, attacked: expected two bool arrays (N,), found {one.dtype} {one.shape} and "
            f"{two.dtype} {two.shape}."
        )
    return float((~two[one]).mean()) if one.any() else math.nan


def correlate(
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    *,
    kind: Kind = "pearson",
    interval: IntervalBy = "fisher",
    confidence: float = 0.95,
    resamples: int = _RESAMPLES,
    seed: int = 0,
) -> Correlation:
    """Correlation of two quantities over trainings.

    Args:
        x: (T,) a number for each training.
        y: (T,) another.
        kind: "pearson": of the values, which a straight line describes; "spearman": of their ranks, for any
            monotone relation.
        interval: "fisher": from Fisher's z = artanh(r), normal with variance 1/(T - 3) for normal quantities;
            for ranks with variance (1 + r²/2)/(T - 3) (Bonett and Wright 2000, Psychometrika 65:23).
            "bootstrap": the percentiles of the coefficient over trainings drawn anew with replacement, which
            assumes no distribution; draws in which a quantity is constant are left out.
        confidence: In (0, 1).
        resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Raises:
        InputError: Different lengths, numbers that are not finite, or an argument out of its range.

    >>> correlate([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 5.0]).points
    4
    """
    first, second = _paired(x, y, confidence)
    _check_choice("kind", kind, get_args(Kind))
    _check_choice("interval", interval, get_args(IntervalBy))
    if resamples < 1:
        raise InputError(f"resamples: expected at least 1, found {resamples}.")
    measure = _COEFFICIENTS[kind]
    points = len(first)
    coefficient = float(measure(first[None], second[None])[0]) if points >= _FEWEST else math.nan
    if math.isnan(coefficient):
        return Correlation(coefficient, -1.0, 1.0, points)
    if interval == "bootstrap":
        low, high = _by_bootstrap(first, second, measure, confidence, resamples, seed)
    else:
        low, high = _by_fisher(coefficient, points, kind, confidence)
    return Correlation(coefficient, low, high, points)


def regress(x: npt.ArrayLike, y: npt.ArrayLike, confidence: float = 0.95) -> Line:
    """Fit a straight line by least squares.

    Args:
        x: (T,).
        y: (T,).
        confidence: Of the intervals of slope and height, in (0, 1).

    Raises:
        InputError: Different lengths, no points, or numbers that are not finite.

    >>> line = regress([0.0, 1.0, 2.0, 3.0], [1.0, 3.0, 5.0, 7.0])
    >>> line.slope, float(line.at(10.0))
    (2.0, 21.0)
    """
    first, second = _paired(x, y, confidence)
    if not len(first):
        raise InputError("x: expected at least one point, found none.")
    centre, height, points = float(first.mean()), float(second.mean()), len(first)
    from_centre = first - centre
    spread = float(from_centre @ from_centre)
    if points < _FEWEST or _constant(first[None])[0]:
        unknown = math.nan
        return Line(
            unknown, -math.inf, math.inf, height, centre, spread, unknown, points, confidence
        )
    slope = float(from_centre @ (second - height)) / spread
    rest = second - height - slope * from_centre
    deviation = math.sqrt(float(rest @ rest) / (points - 2))
    half = _student(points - 2, confidence) * deviation / math.sqrt(spread)
    return Line(
        slope, slope - half, slope + half, height, centre, spread, deviation, points, confidence
    )


def relate(
    trainings: pd.DataFrame,
    attack: str,
    *,
    confidence: float = 0.95,
    resamples: int = _RESAMPLES,
    seed: int = 0,
) -> dict[str, Relation]:
    """Success rate of an attack against test error, for each method and for all of them together.

    A training is one point: one method, size and seed. Trainings of one size share their images, and their
    deviations from a line are alike where the relation is curved; intervals that take trainings as independent
    are then somewhat too narrow. The pooled relation also holds what differs between methods.

    Args:
        trainings: A row per training with the columns "method", "size", "test_error" (in [0, 1]), and one named
            as the attack: its success rate (in [0, 1]). Rows without numbers are left out.
        attack: Name of the column.
        confidence: Of the intervals.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Returns:
        By method, in the order of the rows, then `POOLED` where there are several methods.

    Raises:
        InputError: A column is missing.
    """
    for column in ("method", "size", "test_error", attack):
        if column not in trainings.columns:
            raise InputError(
                f"trainings: expected a column {column!r}, found {list(trainings.columns)}."
            )
    rows = trainings.dropna(subset=["test_error", attack])
    groups = {str(name): rows[rows.method == name] for name in dict.fromkeys(rows.method)}
    if len(groups) > 1:
        groups[POOLED] = rows
    return {
        name: _relation(group, attack, confidence, resamples, seed)
        for name, group in groups.items()
    }


def correlations_table(relations: Mapping[str, Relation]) -> pd.DataFrame:
    """A row per method: how closely success rate and test error go together.

    Columns: method, trainings, pearson with fisher_low, fisher_high, bootstrap_low and bootstrap_high, spearman
    with spearman_low and spearman_high (by the bootstrap).
    """
    import pandas as pd

    rows = [
        {
            "method": name,
            "trainings": relation.pearson.points,
            "pearson": relation.pearson.coefficient,
            "fisher_low": relation.pearson.low,
            "fisher_high": relation.pearson.high,
            "bootstrap_low": relation.bootstrap.low,
            "bootstrap_high": relation.bootstrap.high,
            "spearman": relation.spearman.coefficient,
            "spearman_low": relation.spearman.low,
            "spearman_high": relation.spearman.high,
        }
        for name, relation in relations.items()
    ]
    return pd.DataFrame(rows)


def slopes_table(relations: Mapping[str, Relation]) -> pd.DataFrame:
    """A row per method: how the success rate changes with test error.

    Columns: method, slope (points of success rate for a point of test error) with slope_low and slope_high
    (Student), and lowest_rate and highest_rate, the range of the success rates in [0, 1].
    """
    import pandas as pd

    rows = [
        {
            "method": name,
            "slope": relation.line.slope,
            "slope_low": relation.line.low,
            "slope_high": relation.line.high,
            "lowest_rate": float(relation.rates.min()),
            "highest_rate": float(relation.rates.max()),
        }
        for name, relation in relations.items()
    ]
    return pd.DataFrame(rows)


def _relation(
    rows: pd.DataFrame, attack: str, confidence: float, resamples: int, seed: int
) -> Relation:
    errors, rates = rows.test_error.to_numpy(np.float64), rows[attack].to_numpy(np.float64)

    def correlation(kind: Kind, interval: IntervalBy) -> Correlation:
        return correlate(
            errors,
            rates,
            kind=kind,
            interval=interval,
            confidence=confidence,
            resamples=resamples,
            seed=seed,
        )

    return Relation(
        rows["size"].to_numpy(np.int64),
        errors,
        rates,
        correlation("pearson", "fisher"),
        correlation("pearson", "bootstrap"),
        correlation("spearman", "bootstrap"),
        regress(errors, rates, confidence),
    )


def _by_fisher(r: float, points: int, kind: Kind, confidence: float) -> tuple[float, float]:
    from scipy.special import ndtri

    if points <= _FEWEST:
        return -1.0, 1.0
    factor = 1.0 if kind == "pearson" else 1 + r**2 / 2
    half = float(ndtri((1 + confidence) / 2)) * math.sqrt(factor / (points - 3))
    # artanh(1) is infinite: points on a line leave no doubt.
    centre = math.copysign(math.inf, r) if abs(r) >= 1 else math.atanh(r)
    return math.tanh(centre - half), math.tanh(centre + half)


def _by_bootstrap(
    x: Floats,
    y: Floats,
    measure: Callable[[Floats, Floats], Floats],
    confidence: float,
    resamples: int,
    seed: int,
) -> tuple[float, float]:
    drawn = np.random.default_rng(seed).integers(len(x), size=(resamples, len(x)))
    found = measure(x[drawn], y[drawn])
    found = found[~np.isnan(found)]
    if not len(found):
        return -1.0, 1.0
    tail = (1 - confidence) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return float(low), float(high)


def _pearson(x: Floats, y: Floats) -> Floats:
    """The coefficient of each row of two arrays (R, T); NaN where one of them is constant."""
    a, b = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    scale = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    defined = ~(_constant(x) | _constant(y))
    coefficients: Floats = np.full(len(x), math.nan)
    np.divide((a * b).sum(1), scale, out=coefficients, where=defined)
    # Rounding may leave a coefficient of 1 a hair above it.
    return coefficients.clip(-1, 1)


def _spearman(x: Floats, y: Floats) -> Floats:
    from scipy.stats import rankdata

    first: Floats = rankdata(x, axis=1)
    second: Floats = rankdata(y, axis=1)
    return _pearson(first, second)


_COEFFICIENTS = {"pearson": _pearson, "spearman": _spearman}


def _constant(values: Floats) -> npt.NDArray[np.bool_]:
    """Which rows hold one value only, up to rounding."""
    extent = np.ptp(values, axis=1)
    same: npt.NDArray[np.bool_] = extent <= 1e-12 * np.abs(values).max(axis=1)
    return same


def _student(degrees: int, confidence: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(degrees, (1 + confidence) / 2))


def _paired(x: npt.ArrayLike, y: npt.ArrayLike, confidence: float) -> tuple[Floats, Floats]:
    first, second = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise InputError(
            f"x, y: expected two arrays (T,) of one length, found {first.shape} and {second.shape}."
        )
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise InputError("x, y: expected finite numbers, found NaN or infinity.")
    if not 0 < confidence < 1:
        raise InputError(f"confidence: expected a number in (0, 1), found {confidence}.")
    return first, second


def _check_choice(name: str, found: str, choices: tuple[str, ...]) -> None:
    if found not in choices:
        raise InputError(f"{name}: expected one of {', '.join(choices)}, found {found!r}.")
