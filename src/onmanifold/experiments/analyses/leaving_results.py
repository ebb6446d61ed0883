"""From what was measured of leaving the manifold to tables and statements."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import pandas as pd

from onmanifold.analysis.leaving import CLEAN, LOSS_GRADIENT, RANDOM, RANDOM_DIRECTION, Leaving
from onmanifold.analysis.separation import Separation, separation
from onmanifold.evaluation.statistics import Estimate, mean_interval, verdict, wilson_interval
from onmanifold.experiments.analyses.base import Statement

Floats = npt.NDArray[np.float64]
Kept = Mapping[str, tuple[int, int]]
"""For each on-manifold attack how many examples keep their label, and how many were looked at."""

MEASURES = {"to_manifold": "the manifold", "to_neighbours": "the span of neighbours"}
"""Distances of images, by column, and what they are to."""

STEP = "step_to_neighbours"
"""The distance of perturbations to the directions of the span of neighbours (eq. 11)."""

_SOURCE = "Disentangling, section 3.2"
# What "leaves" is to mean: of so many pairs with a clean image the example is the further one.
_APART = 0.9
# What "orthogonally" is to mean of distance over norm, and "to first order tangent" of the share at a hundredth.
_ORTHOGONAL, _TANGENT = 0.9, 0.95


def success_table(measured: Mapping[str, Leaving], kept: Mapping[str, Kept]) -> pd.DataFrame:
    """Success rates with Wilson's intervals, and beside those on the manifold how many keep their label."""
    rows = []
    for method, leaving in measured.items():
        attempts = len(leaving.batch.labels)
        for name, found in leaving.found.items():
            count = len(found.rows)
            row: dict[str, object] = {"classifier": method, "attack": name}
            row |= {"right when clean": attempts, "successful": count}
            row |= share_columns("success rate", count, attempts)
            if name in kept.get(method, {}):
                good, judged = kept[method][name]
                row |= {"judged": judged, **share_columns("keep their label", good, judged)}
                row["valid success rate"] = count / attempts * good / judged if judged else math.nan
            rows.append(row)
    return pd.DataFrame(rows)


def distance_table(measured: Mapping[str, Leaving]) -> pd.DataFrame:
    """Medians of distances, with the intervals that order statistics give."""
    rows = []
    for method, leaving in measured.items():
        for kind, part in leaving.images.groupby("kind", sort=False):
            row: dict[str, object] = {"classifier": method, "kind": kind, "examples": len(part)}
            row["perturbation"] = float(part.perturbation.median())
            for measure in (*MEASURES, STEP):
                low, high = _median_interval(part[measure].to_numpy())
                row |= {measure: float(part[measure].median()), "low": low, "high": high}
                row[f"{measure} low"], row[f"{measure} high"] = row.pop("low"), row.pop("high")
            rows.append(row)
    return pd.DataFrame(rows)


def separation_table(measured: Mapping[str, Leaving]) -> pd.DataFrame:
    """Areas under the curve of each distance: each kind against clean images, and regular against on-manifold.

    Distances to the manifold within the projection's tolerance count as equal.
    """
    rows = []
    for method, leaving in measured.items():
        kinds = [kind for kind in leaving.images.kind.unique() if kind != CLEAN]
        regular = [kind for kind in kinds if kind not in leaving.on_manifold]
        pairs = [(kind, CLEAN) for kind in kinds]
        pairs += [(kind, other) for other in leaving.on_manifold for kind in regular]
        for measure in (*MEASURES, STEP):
            for kind, other in pairs:
                if measure == STEP and other == CLEAN:
                    continue  # whose perturbation is zero
                found = _separation(leaving, measure, kind, other)
                row = {"classifier": method, "distance": measure, "kind": kind, "against": other}
                rows.append(row | found._asdict())
    return pd.DataFrame(rows)


def tangent_table(measured: Mapping[str, Leaving]) -> pd.DataFrame:
    """Mean tangent shares with Student's intervals cut to [0, 1], and median angles in degrees.

    Vectors of length 0 have no share; "with a share" says how many have one.
    """
    rows = []
    for method, leaving in measured.items():
        parts = pd.concat([leaving.images[leaving.images.kind != CLEAN], leaving.directions])
        for kind, part in parts.groupby("kind", sort=False):
            mean = _mean_share(part.share)
            row = {"classifier": method, "kind": kind, "vectors": len(part)}
            row["with a share"] = mean.runs
            row |= {"share": mean.mean, "low": mean.low, "high": mean.high}
            row["angle"] = float(part.angle.median())
            for column in ("share_tenth", "share_hundredth"):
                row[column] = float(part[column].mean()) if column in part else math.nan
            rows.append(row | {"rank / pixels": leaving.rank / leaving.pixels})
    return pd.DataFrame(rows)


def judge(method: str, leaving: Leaving, kept: Kept) -> Iterator[Statement]:
    """What the paper says, each with the numbers of one classifier."""
    kinds = list(leaving.images.kind.unique())
    regular = [kind for kind in leaving.found if kind in kinds and kind not in leaving.on_manifold]
    for name in regular:
        for measure in MEASURES:
            yield _leaves(method, leaving, name, measure)
        yield _orthogonal(method, leaving, name)
        yield _less_than_random(
            f"{method}: perturbations by {name} lie less along the manifold than a random direction",
            leaving,
            leaving.images[leaving.images.kind == name],
            _SOURCE,
        )
    gradients = leaving.directions[leaving.directions.kind == LOSS_GRADIENT]
    text = f"{method}: the loss gradient lies less along the manifold than a random direction"
    yield _less_than_random(text, leaving, gradients, "Disentangling, section C.1")
    for name in leaving.on_manifold:
        if name in kinds:
            yield _tangent(method, leaving, name)
            for other in regular:
                for measure in ("to_manifold", STEP):
                    yield _further(method, leaving, other, name, measure)
        if name in kept:
            known = leaving.found[name].codes is not None
            yield label_statement(method, name, *kept[name], known=known)


def _leaves(method: str, leaving: Leaving, name: str, measure: str) -> Statement:
    found = _separation(leaving, measure, name, CLEAN)
    random = _separation(leaving, measure, RANDOM, CLEAN)
    numbers = (
        f"{found.cases} examples, median distance {_median(leaving, name, measure):.2f}, clean images "
        f"{_median(leaving, CLEAN, measure):.2f}; further away in {_area(found)} of the pairs, where a "
        f"random perturbation is in {100 * random.area:.1f} %. Holds above {100 * _APART:.0f} %."
    )
    text = f"{method}: regular adversarial examples by {name} leave {MEASURES[measure]}"
    return Statement(text, numbers, verdict(found.low - _APART, found.high - _APART), _SOURCE)


def _orthogonal(method: str, leaving: Leaving, name: str) -> Statement:
    part = leaving.images[leaving.images.kind == name]
    ratios = (part.to_manifold / part.perturbation).to_numpy()
    low, high = _median_interval(ratios)
    numbers = (
        f"Distance over norm of the perturbation: median {np.median(ratios):.3f} [{low:.3f}, {high:.3f}], "
        f"median angle to the tangent space {part.angle.median():.1f}°. Holds above {_ORTHOGONAL}."
    )
    text = (
        f"{method}: {name} leaves it almost orthogonally, the distance is the perturbation's norm"
    )
    clean = _median(leaving, CLEAN, "to_manifold")
    if clean > leaving.tolerance:
        numbers += f" Clean images do not lie on it, at a median of {clean:.2f}: this distance is no measure."
        return Statement(text, numbers, "not measured", _SOURCE)
    return Statement(text, numbers, verdict(low - _ORTHOGONAL, high - _ORTHOGONAL), _SOURCE)


def _less_than_random(text: str, leaving: Leaving, part: pd.DataFrame, source: str) -> Statement:
    random = leaving.directions[leaving.directions.kind == RANDOM_DIRECTION]
    both = part.merge(random, on="sample", suffixes=("", "_random")).dropna(
        subset=["share", "share_random"]
    )
    if len(both) < 2:
        return Statement(text, _too_few(len(both), len(part)), "not measured", source)
    own, other = _mean_share(both.share), _mean_share(both.share_random)
    less = _cut(mean_interval((both.share_random - both.share).to_numpy()), -1.0)
    numbers = (
        f"Mean tangent share {_percent(own)}, of a random direction {_percent(other)} "
        f"(rank over pixels {100 * leaving.rank / leaving.pixels:.2f} %), on {_of(len(both), len(part))} images; "
        f"difference {100 * less.mean:.2f} [{100 * less.low:.2f}, {100 * less.high:.2f}] points."
    )
    return Statement(text, numbers, verdict(less.low, less.high), source)


def _tangent(method: str, leaving: Leaving, name: str) -> Statement:
    columns = ["share", "share_tenth", "share_hundredth"]
    every = leaving.images[leaving.images.kind == name]
    part = every.dropna(subset=columns)
    text, source = (
        f"{method}: to first order {name} moves along the manifold",
        "Disentangling, section 3.3",
    )
    if len(part) < 2:
        return Statement(text, _too_few(len(part), len(every)), "not measured", source)
    whole, tenth, hundredth = (_mean_share(part[column]) for column in columns)
    numbers = (
        f"Mean tangent share {_percent(whole)} of the whole move, {_percent(tenth)} of a tenth of it and "
        f"{_percent(hundredth)} of a hundredth, on {_of(len(part), len(every))} examples. Holds above "
        f"{100 * _TANGENT:.0f} % at a hundredth."
    )
    outcome = verdict(hundredth.low - _TANGENT, hundredth.high - _TANGENT)
    return Statement(text, numbers, outcome, source)


def _further(method: str, leaving: Leaving, regular: str, name: str, measure: str) -> Statement:
    found = _separation(leaving, measure, regular, name)
    numbers = (
        f"Median distance {_median(leaving, regular, measure):.2f} against "
        f"{_median(leaving, name, measure):.2f}; further away in {_area(found)} of the pairs. Holds "
        f"above {100 * _APART:.0f} %."
    )
    by = (
        "distance to the manifold"
        if measure == "to_manifold"
        else "perturbation's distance to the span of neighbours"
    )
    text = f"{method}: {regular} examples are clearly told from {name} examples by their {by}"
    return Statement(text, numbers, verdict(found.low - _APART, found.high - _APART), _SOURCE)


def label_statement(method: str, name: str, good: int, judged: int, known: bool) -> Statement:
    """Whether on-manifold adversarial examples are valid, as ``good`` of ``judged`` are.

    Args:
        method: The classifier.
        name: The attack.
        good: Number of examples that keep their label.
        judged: Of so many.
        known: Whether the codes that the attack ended with are on the manifold that judges.
    """
    low, high = wilson_interval(good, judged)
    share = good / judged if judged else math.nan
    numbers = (
        f"{good} of {judged} are nearest to the manifold of their own class: {100 * share:.1f} % "
        f"[{100 * low:.1f}, {100 * high:.1f}]. Holds above {100 * _APART:.0f} %."
    )
    if known:
        numbers += " The attack moved on this very manifold: only another class at distance 0 could take them."
    text = f"{method}: on-manifold adversarial examples by {name} keep their label"
    outcome = verdict(low - _APART, high - _APART) if judged else "not measured"
    return Statement(text, numbers, outcome, "Disentangling, definition 1")


def nothing_right(method: str, claim: str, images: int) -> Statement:
    """What is said of a classifier that gets no image right, so that there is nothing to attack."""
    numbers = f"The classifier gets none of {images} test images right: there is nothing to attack."
    return Statement(f"{method}: {claim}", numbers, "not measured", _SOURCE)


def _separation(leaving: Leaving, measure: str, kind: str, other: str) -> Separation:
    first, second = (leaving.images[leaving.images.kind == name] for name in (kind, other))
    # Distances that the search takes for none are equal: how far it came says nothing of the images.
    least = leaving.tolerance if measure == "to_manifold" else 0.0
    cases, controls = (np.maximum(part[measure].to_numpy(), least) for part in (first, second))
    return separation(cases, controls, first["sample"], second["sample"])


def share_columns(name: str, successes: int, count: int) -> dict[str, float]:
    """A share and its interval, as columns of a table; NaN of none."""
    low, high = wilson_interval(successes, count)
    share = successes / count if count else math.nan
    return {name: share, f"{name} low": low, f"{name} high": high}


def _median(leaving: Leaving, kind: str, measure: str) -> float:
    return float(leaving.images.loc[leaving.images.kind == kind, measure].median())


def _median_interval(values: Floats) -> tuple[float, float]:
    """What order statistics say of the median, at 95 %; unbounded where they are too few."""
    from scipy.stats import quantile_test

    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = quantile_test(values, p=0.5).confidence_interval(0.95)
    return (
        -math.inf if math.isnan(low) else float(low),
        math.inf if math.isnan(high) else float(high),
    )


def _mean_share(values: pd.Series) -> Estimate:
    """The mean of those that there are, its interval cut to what a share can be; NaN and [0, 1] of none."""
    numbers = values.dropna().to_numpy(dtype=np.float64)
    if not len(numbers):
        return Estimate(math.nan, 0.0, 1.0, math.nan, 0)
    return _cut(mean_interval(numbers), 0.0)


def _cut(estimate: Estimate, least: float) -> Estimate:
    """Student's interval knows no bounds; the ends that are shown and judged stay in [least, 1]."""
    low, high = (min(max(end, least), 1.0) for end in (estimate.low, estimate.high))
    return estimate._replace(low=low, high=high)


def _of(count: int, every: int) -> str:
    """How many have a share, and of how many where some do not."""
    return str(count) if count == every else f"{count} (of {every}; the others have no direction)"


def _too_few(count: int, every: int) -> str:
    return f"{count} of {every} vectors have a direction, and so a tangent share; two are needed."


def _percent(mean: Estimate) -> str:
    return f"{100 * mean.mean:.2f} % [{100 * mean.low:.2f}, {100 * mean.high:.2f}]"


def _area(found: Separation) -> str:
    return f"{100 * found.area:.1f} % [{100 * found.low:.1f}, {100 * found.high:.1f}]"
