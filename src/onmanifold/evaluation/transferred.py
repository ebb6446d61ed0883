"""The result of trying attacks on other models than they were made on: matrices, worst cases, a ledger."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from onmanifold.evaluation.ledger import (
    METADATA,
    STANDARD,
    WORST_CASE,
    Evaluation,
    read_table,
    write_table,
)
from onmanifold.evaluation.statistics import Interval, wilson_interval
from onmanifold.foundation.errors import DataError, InputError
from onmanifold.foundation.registry import nearest

Base = Literal["target", "both"]
"""Which samples a success rate is a share of: those that the target gets right, or that both models do."""
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Transfer:
    """What attacks on each of several models do to all of them.

    A sample counts as right where the target is right on the clean image and on the one that was made for the
    source, as everywhere in the library (see `Evaluation`). Tables of papers that look at the latter alone, such
    as ATLD's 3 and 6, have accuracies that are the same or higher.

    Attributes:
        evaluations: By source and target, each with the same attacks and samples. Those of a model with itself
            are white-box attacks; in the others ``objective`` is NaN, and sizes are null.
    """

    evaluations: Mapping[tuple[str, str], Evaluation]

    def __repr__(self) -> str:
        shares = ", ".join(f"{name} {100 * self.worst_case(name):.1f} %" for name in self.models)
        return f"Transfer(worst case over {len(self.models)} sources: {shares})"

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models."""
        return tuple(dict.fromkeys(source for source, _ in self.evaluations))

    @property
    def attacks(self) -> tuple[str, ...]:
        """Names of the attacks."""
        return tuple(next(iter(self.evaluations.values())).names)

    def evaluation(self, source: str, target: str) -> Evaluation:
        """What the images made on ``source`` do to ``target``; also all that `Evaluation` offers.

        Raises:
            InputError: Unknown name; the message shows the nearest.
        """
        for label, name in (("source", source), ("target", target)):
            if name not in self.models:
                raise InputError(f"{label}: unknown model {name!r}.{nearest(name, self.models)}")
        return self.evaluations[source, target]

    def clean_accuracy(self, target: str) -> float:
        """Accuracy of a model on the clean images, in [0, 1]."""
        return self.evaluation(target, target).accuracy()

    def accuracy(self, attack: str, source: str, target: str) -> float:
        """Share of samples that ``target`` gets right clean and as attacked on ``source``, in [0, 1]."""
        return self.evaluation(source, target).accuracy(attack)

    def success_rate(self, attack: str, source: str, target: str, base: Base = "target") -> float:
        """Share of samples whose image, made on ``source``, ``target`` misclassifies, in [0, 1].

        Args:
            attack: Which attack.
            source: Model that the images were made on.
            target: Model that they are tried on.
            base: Of the samples that the target gets right, or "both" models (Disentangling, appendix E).

        Returns:
            NaN where there are no such samples.
        """
        hits, count = self._successes(attack, source, target, base)
        return hits / count if count else float("nan")

    def interval(
        self,
        attack: str,
        source: str,
        target: str,
        confidence: float = 0.95,
        of: Literal["accuracy", "success_rate"] = "accuracy",
    ) -> Interval:
        """Wilson's interval of an accuracy, or of a success rate on what the target gets right."""
        if of == "success_rate":
            return wilson_interval(*self._successes(attack, source, target, "target"), confidence)
        return self.evaluation(source, target).interval(attack, confidence)

    def correct(
        self,
        target: str,
        sources: Sequence[str] | None = None,
        attacks: Sequence[str] | None = None,
    ) -> Bools:
        """Which samples ``target`` gets right under all attacks made on all of the sources, (N,) bool.

        Args:
            target: Model that the images are tried on.
            sources: Models that they were made on; None: all, the target itself among them.
            attacks: None: all.
        """
        names = self.attacks if attacks is None else attacks
        parts = [
            self.evaluation(source, target).correct(name)
            for source in (self.models if sources is None else sources)
            for name in names
        ]
        right: Bools = np.logical_and.reduce([self.evaluation(target, target).correct(), *parts])
        return right

    def worst_case(
        self,
        target: str,
        sources: Sequence[str] | None = None,
        attacks: Sequence[str] | None = None,
    ) -> float:
        """Share of samples that ``target`` gets right under all attacks on all sources; see `correct`."""
        return float(self.correct(target, sources, attacks).mean())

    def matrix(self, attack: str) -> pd.DataFrame:
        """Accuracies in [0, 1]: a row per source, a column per target; white-box attacks on the diagonal."""
        values = [
            [self.accuracy(attack, row, column) for column in self.models] for row in self.models
        ]
        return pd.DataFrame(
            values,
            index=pd.Index(self.models, name="source"),
            columns=pd.Index(self.models, name="target"),
        )

    def table(self) -> pd.DataFrame:
        """Accuracies in [0, 1] as ATLD prints them in its tables 3 and 6.

        A row per target; columns: its clean accuracy, each attack on each source, and the worst case of all.
        """
        columns = [(source, attack) for source in self.models for attack in self.attacks]
        rows = [
            [
                self.clean_accuracy(target),
                *(self.accuracy(attack, source, target) for source, attack in columns),
                self.worst_case(target),
            ]
            for target in self.models
        ]
        return pd.DataFrame(
            rows,
            index=pd.Index(self.models, name="target"),
            columns=pd.MultiIndex.from_tuples(
                [(STANDARD, ""), *columns, (WORST_CASE, "")], names=["source", "attack"]
            ),
        )

    def to_pandas(self, confidence: float = 0.95) -> pd.DataFrame:
        """A row per attack, source and target.

        Columns: attack, source, target, n, clean_accuracy of the target, accuracy with low and high (Wilson),
        success_rate with success_low and success_high.
        """
        rows = []
        for attack in self.attacks:
            for source, target in self.evaluations:
                key = (attack, source, target)
                low, high = self.interval(*key, confidence)
                success_low, success_high = self.interval(*key, confidence, of="success_rate")
                rows.append(
                    {
                        "attack": attack,
                        "source": source,
                        "target": target,
                        "n": len(self.evaluations[source, target]),
                        "clean_accuracy": self.clean_accuracy(target),
                        "accuracy": self.accuracy(*key),
                        "low": low,
                        "high": high,
                        "success_rate": self.success_rate(*key),
                        "success_low": success_low,
                        "success_high": success_high,
                    }
                )
        return pd.DataFrame(rows)

    @cached_property
    def ledger(self) -> pa.Table:
        """A row per source, target, attack and sample: `Evaluation.ledger` with two columns in front."""
        parts, facts = [], []
        for (source, target), evaluation in self.evaluations.items():
            part = evaluation.ledger.replace_schema_metadata(None)
            for name, value in (("target", target), ("source", source)):
                part = part.add_column(0, name, pa.array([value] * len(part), pa.string()))
            parts.append(part)
            facts.append([source, target, evaluation.provenance])
        table = pa.concat_tables(parts, promote_options="default").combine_chunks()
        return table.replace_schema_metadata({METADATA: json.dumps(facts)})

    def save(self, path: str | Path) -> Path:
        """Write the ledger as one Parquet file, atomically."""
        return write_table(path, self.ledger)

    @classmethod
    def load(cls, path: str | Path) -> Transfer:
        """Read a ledger that `save` wrote.

        Raises:
            DataError: The file is missing, truncated, or no ledger of transferred attacks.
        """
        table = read_table(path)
        if not {"source", "target"} <= set(table.column_names):
            raise DataError(
                f"{path} is no ledger of transferred attacks: it has no column 'source'."
            )
        evaluations = {}
        for source, target, facts in json.loads(table.schema.metadata[METADATA]):
            chosen = pc.and_(pc.equal(table["source"], source), pc.equal(table["target"], target))
            part = table.filter(chosen).drop_columns(["source", "target"])
            part = part.replace_schema_metadata({METADATA: json.dumps(facts)})
            evaluations[source, target] = Evaluation(part)
        return cls(evaluations)

    def _successes(self, attack: str, source: str, target: str, base: Base) -> tuple[int, int]:
        """On how many of the samples of the base the target errs, and how many they are."""
        if base not in ("target", "both"):
            raise InputError(f"base: expected 'target' or 'both', found {base!r}.")
        evaluation = self.evaluation(source, target)
        clean, right = evaluation.correct(), evaluation.correct(attack)
        if base == "both":
            clean = clean & self.evaluation(source, source).correct()
        return int((clean & ~right).sum()), int(clean.sum())
