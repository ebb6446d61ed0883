"""Claims: comparisons of what was measured, stated in an experiment file and judged from its results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from onmanifold.evaluation import statistics
from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.registry import Context, build_component, nearest

Relation = Literal[">", "<"]
Verdict = statistics.Verdict
Cell = tuple[str, str]
"""A method and a column of the table, such as ("DMAT", "PGD-50")."""

Outcomes = Mapping[Cell, Sequence[NDArray[np.bool_]]]
"""For each cell and each seed: which test images were classified correctly, (N,)."""

Measured = Mapping[Cell, Sequence[NDArray[np.bool_ | np.float64]]]
"""The same, and cells that hold one share for each seed, (1,)."""

OVERFITTING = "robust overfitting"
"""A column for claims alone: how far robust accuracy on held-out images fell from its best epoch to the last.

It is never negative, and above 0 by luck alone: it compares methods validated on the same images. A single
training's own fall, without that bias, is what `onmanifold.evaluation.robust_overfitting` finds from snapshots.
"""

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a constant plus a weighted sum of accuracies, in percent.

    Attributes:
        constant: In percentage points.
        weights: Weight of each cell.
        text: As shown to a reader.
    """

    constant: float
    weights: Mapping[Cell, float]
    text: str

    @staticmethod
    def parse(value: object, place: str) -> Side:
        """Read a cell, ``[method, [column, ...]]``, a number, or ``{from: cell, to: cell, share: s}``.

        A cell is ``[method, column]``. Several columns stand for the mean of their accuracies; the last form is
        the point that lies a share ``s`` of the way from one accuracy to another.

        Raises:
            ConfigError: Anything else.
        """
        if isinstance(value, int | float) and not isinstance(value, bool):
            return Side(float(value), {}, f"{value:g} %")
        if isinstance(value, Mapping):
            unknown = [key for key in value if key not in ("from", "to", "share")]
            if unknown:
                raise ConfigError(
                    f"{place}: unknown key {unknown[0]!r}.{nearest(str(unknown[0]), ('from', 'to', 'share'))}"
                )
            share = value.get("share")
            if not isinstance(share, int | float) or isinstance(share, bool):
                raise ConfigError(f"{place}: share: expected a number, found {share!r}.")
            start, end = (_cell(value.get(key), f"{place}.{key}") for key in ("from", "to"))
            weights = {start: 1.0 - share}
            weights[end] = weights.get(end, 0.0) + share
            text = f"{100 * share:.0f} % of the way from {_show(start)} to {_show(end)}"
            return Side(0.0, weights, text)
        if (
            isinstance(value, list | tuple)
            and len(value) == 2
            and isinstance(value[1], list | tuple)
        ):
            cells = [_cell((value[0], column), place) for column in value[1]]
            if not cells or len(set(cells)) < len(cells):
                raise ConfigError(f"{place}: expected different columns, found {value[1]!r}.")
            text = f"{value[0]} · mean of {', '.join(column for _, column in cells)}"
            return Side(0.0, dict.fromkeys(cells, 1 / len(cells)), text)
        cell = _cell(value, place)
        return Side(0.0, {cell: 1.0}, _show(cell))


def _cell(value: object, place: str) -> Cell:
    if (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(v, str) for v in value)
    ):
        return str(value[0]), str(value[1])
    raise ConfigError(f"{place}: expected [method, attack], found {value!r}.")


def _show(cell: Cell) -> str:
    return f"{cell[0]} · {cell[1]}"


@dataclass(frozen=True)
class Comparison:
    """``lhs`` is above (or below) ``rhs`` by more than ``margin`` percentage points.

    A negative margin says "at least comparable": ``lhs > rhs`` with margin −3 may be up to 3 points below.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    lhs: object
    rhs: object
    relation: Relation = ">"
    margin: float = 0.0

    def sides(self, place: str) -> tuple[Side, Side]:
        """Both sides, parsed.

        Raises:
            ConfigError: A side is malformed.
        """
        return Side.parse(self.lhs, f"{place}.lhs"), Side.parse(self.rhs, f"{place}.rhs")


@dataclass(frozen=True)
class Claim:
    """A statement that holds if all its comparisons hold.

    Attributes:
        text: The statement.
        comparisons: What it means in numbers.
        source: Where it was made.
    """

    text: str
    comparisons: tuple[Comparison, ...]
    source: str = ""

    @staticmethod
    def parse(value: object, place: str) -> Claim:
        """Read ``{claim, source, all: [comparison, ...]}``, or one comparison with a ``claim`` beside it.

        Raises:
            ConfigError: Unknown or missing key, or a wrong type.
        """
        if not isinstance(value, Mapping) or not isinstance(value.get("claim"), str):
            raise ConfigError(f"{place}: expected a mapping with the key 'claim', found {value!r}.")
        rest = {key: item for key, item in value.items() if key not in ("claim", "source", "all")}
        listed = value.get("all")
        if listed is not None and rest:
            key = next(iter(rest))
            raise ConfigError(
                f"{place}: unknown key {key!r} beside 'all'.{nearest(str(key), ('claim', 'source', 'all'))}"
            )
        specifications = [rest] if listed is None else listed
        if not isinstance(specifications, list) or not specifications:
            raise ConfigError(f"{place}.all: expected a list of comparisons, found {listed!r}.")
        comparisons = []
        for number, specification in enumerate(specifications):
            label = f"{place}.all.{number}" if listed is not None else place
            if not isinstance(specification, Mapping):
                raise ConfigError(f"{label}: expected a comparison, found {specification!r}.")
            comparison = build_component(Comparison, specification, Context(), label)
            comparison.sides(label)
            comparisons.append(comparison)
        return Claim(str(value["claim"]), tuple(comparisons), str(value.get("source", "")))

    def cells(self) -> set[Cell]:
        """All cells that the claim speaks of."""
        sides = [side for item in self.comparisons for side in item.sides("claim")]
        return {cell for side in sides for cell in side.weights}


@dataclass(frozen=True)
class Finding:
    """A comparison and its numbers, in percent and percentage points.

    Attributes:
        lhs: Mean of the left side.
        rhs: Mean of the right side.
        margin: By how much the left side must be above (below) the right.
        excess: By how much more than that it is; positive speaks for the comparison.
        low: Lower end of the 95 % interval of ``excess``.
        high: Upper end.
        verdict: "holds" if the interval is above zero, "does not hold" if below, else "within noise".
    """

    lhs_text: str
    rhs_text: str
    relation: Relation
    margin: float
    verdict: Verdict
    lhs: float = float("nan")
    rhs: float = float("nan")
    excess: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")

    @property
    def statement(self) -> str:
        """What was to be shown, in words."""
        direction = "above" if self.relation == ">" else "below"
        if not self.margin:
            return f"{self.lhs_text} is {direction} {self.rhs_text}"
        if self.margin > 0:
            return (
                f"{self.lhs_text} is more than {self.margin:g} points {direction} {self.rhs_text}"
            )
        other = "below" if self.relation == ">" else "above"
        return f"{self.lhs_text} is at most {-self.margin:g} points {other} {self.rhs_text}"


@dataclass(frozen=True)
class Judgement:
    """A claim, the finding for each of its comparisons, and the verdict over all."""

    claim: Claim
    findings: tuple[Finding, ...] = field(default_factory=tuple)

    @property
    def verdict(self) -> Verdict:
        """The claim holds if all comparisons do, and does not if one does not."""
        verdicts = [finding.verdict for finding in self.findings]
        order: tuple[Verdict, ...] = ("not measured", "does not hold", "within noise")
        return next((verdict for verdict in order if verdict in verdicts), "holds")


def judge(claims: Iterable[Claim], outcomes: Measured) -> list[Judgement]:
    """Judge claims by what was measured.

    The same images are used for both sides, so a difference is taken image by image. With one seed the
    interval is over images: Newcombe's for two accuracies, Student's for more. With several it is Student's
    over the seeds' differences, which holds the variation of training too.
    """
    return [
        Judgement(claim, tuple(_find(comparison, outcomes) for comparison in claim.comparisons))
        for claim in claims
    ]


def _find(comparison: Comparison, outcomes: Measured) -> Finding:
    lhs, rhs = comparison.sides("claim")
    cells = [*lhs.weights, *rhs.weights]
    seeds = min((len(outcomes.get(cell, ())) for cell in cells), default=0)
    words = (lhs.text, rhs.text, comparison.relation, comparison.margin)
    if not seeds:
        return Finding(*words, "not measured")
    left, right = (
        [_per_image(side, outcomes, seed) for seed in range(seeds)] for side in (lhs, rhs)
    )
    sign = 1.0 if comparison.relation == ">" else -1.0
    excess = [sign * (a - b) - comparison.margin for a, b in zip(left, right, strict=True)]
    if seeds > 1:
        _, low, high, *_ = statistics.mean_interval([float(v.mean()) for v in excess], CONFIDENCE)
    elif list(lhs.weights.values()) == list(rhs.weights.values()) == [1.0] and all(
        outcomes[cell][0].dtype == np.bool_ for cell in cells
    ):
        first, second = cells if sign > 0 else reversed(cells)
        pair = statistics.compare_paired(outcomes[first][0], outcomes[second][0], CONFIDENCE)
        low, high = (100 * end - comparison.margin for end in (pair.low, pair.high))
    else:
        _, low, high, *_ = statistics.mean_interval(excess[0], CONFIDENCE)
    means = [float(np.mean([values.mean() for values in side])) for side in (left, right, excess)]
    return Finding(*words, statistics.verdict(low, high), means[0], means[1], means[2], low, high)


def _per_image(side: Side, outcomes: Measured, seed: int) -> NDArray[np.float64]:
    """A side's value on each image, (N,), or (1,), in percent; its mean is the side's value."""
    total = np.full(1, side.constant)
    for cell, weight in side.weights.items():
        total = total + 100.0 * weight * np.asarray(outcomes[cell][seed], dtype=np.float64)
    return total
