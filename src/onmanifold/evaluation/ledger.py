"""The ledger, a row per sample and attack, and what is read from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from onmanifold.evaluation.statistics import (
    Interval,
    PairedComparison,
    compare_paired,
    wilson_interval,
)
from onmanifold.foundation.errors import DataError, InputError
from onmanifold.foundation.files import write_atomically
from onmanifold.foundation.registry import nearest

STANDARD = "standard"
"""Name of the clean predictions."""
WORST_CASE = "worst case"
"""Name of the worst case over all attacks."""

SIZE = "size_"
FOUND_BY = "found_by"
METADATA = b"onmanifold"
_LEADING = {
    "sample": pa.int64(),
    "attack": pa.string(),
    "label": pa.int64(),
    "clean_prediction": pa.int64(),
    "adversarial_prediction": pa.int64(),
    "success": pa.bool_(),
    FOUND_BY: pa.string(),
    "objective": pa.float64(),
}
_TRAILING = {"forwards": pa.int32(), "backwards": pa.int32()}

Bools = npt.NDArray[np.bool_]


def ledger_of(
    clean: pa.Table, outcomes: Mapping[str, pa.Table], provenance: Mapping[str, Any]
) -> pa.Table:
    """Put the outcomes of all attacks together: attack by attack, samples in the dataset's order.

    Args:
        clean: The clean predictions as outcomes; they stand for themselves where there is no attack.
        outcomes: For each attack's name a table as `outcome_table` makes it.
        provenance: JSON-able facts about what produced the ledger, kept in the file's metadata.
    """
    parts = [
        table.append_column("attack", pa.array([name] * len(table), pa.string())).append_column(
            "clean_prediction", clean["adversarial_prediction"].combine_chunks()
        )
        for name, table in (outcomes or {STANDARD: clean}).items()
    ]
    merged = pa.concat_tables(parts, promote_options="default")
    schema = _schema(name for name in merged.column_names if name.startswith(SIZE))
    schema = schema.with_metadata({METADATA: json.dumps(provenance)})
    return merged.select(schema.names).combine_chunks().cast(schema)


def outcome_table(columns: Mapping[str, npt.NDArray[Any] | None], count: int) -> pa.Table:
    """The rows of one batch under one attack: the ledger's columns but the attack's name and clean_prediction.

    Args:
        columns: Values (count,) by name; None: nothing is known.
        count: Number of rows.
    """
    types = _LEADING | _TRAILING
    arrays = {}
    for name, values in columns.items():
        kind = types.get(name, pa.float64())
        arrays[name] = pa.nulls(count, kind) if values is None else pa.array(values).cast(kind)
    return pa.table(arrays)


def completed(table: pa.Table) -> pa.Table:
    """A ledger, or a batch's outcome, with the columns that came later than it; their values are null.

    >>> completed(pa.table({"success": [True]})).column_names
    ['success', 'found_by']
    """
    if FOUND_BY in table.column_names or "success" not in table.column_names:
        return table
    place = table.column_names.index("success") + 1
    return table.add_column(place, FOUND_BY, pa.nulls(len(table), pa.string()))


def _schema(sizes: Any) -> pa.Schema:
    return pa.schema(_LEADING | {name: pa.float64() for name in sorted(sizes)} | _TRAILING)


class Evaluation:
    """What attacks did to a model on a dataset.

    The accuracy under an attack counts a sample as right only where the model is right on the clean image
    *and* on the attack's image, as the adversary may always leave the image as it is. So no attack raises the
    accuracy, and accuracy under an untargeted attack = standard accuracy × (1 − success rate). What the model
    predicted on each image stands in the ledger.

    Attributes:
        ledger: A pyarrow table, a row per sample and attack: sample, attack, label, clean_prediction,
            adversarial_prediction, success, found_by, objective, a column ``size_<variable>`` per perturbation
            variable (null where the attack has none such), forwards, backwards. ``found_by`` names the member
            of an attack made of several, such as `AutoAttack`, that fooled the model ("clean": none was
            needed); it is null where none did, and for attacks without members. Where there was no attack the
            ledger holds the clean predictions, under the name "standard".
    """

    def __init__(self, ledger: pa.Table) -> None:
        names = ledger["attack"].unique().to_pylist()  # in the order of appearance
        if not names:
            raise DataError("The ledger is empty.")
        count, rest = divmod(len(ledger), len(names))
        order = np.repeat(np.array(names, dtype=object), count)
        if rest or not np.array_equal(ledger["attack"].to_numpy(), order):
            raise DataError("The ledger's attacks do not all have the same samples.")
        columns = {
            name: ledger[name].to_numpy().reshape(len(names), count)
            for name in ("sample", "label", "clean_prediction", "adversarial_prediction", "success")
        }
        if any(bool((columns[name] != columns[name][0]).any()) for name in ("sample", "label")):
            raise DataError("The ledger's attacks do not all have the same samples.")
        self.ledger = ledger
        self.names: list[str] = [name for name in names if name != STANDARD]
        self.samples: npt.NDArray[np.int64] = columns["sample"][0]
        self.labels: npt.NDArray[np.int64] = columns["label"][0]
        self._clean: Bools = columns["clean_prediction"][0] == self.labels
        right = columns["adversarial_prediction"] == self.labels
        self._right: dict[str, Bools] = {
            name: self._clean & right[row] for row, name in enumerate(names) if name != STANDARD
        }
        self._success: dict[str, Bools] = dict(zip(names, columns["success"], strict=True))

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.samples)

    def __repr__(self) -> str:
        shares = ", ".join(f"{name} {100 * self.accuracy(name):.1f} %" for name in self._rows())
        return f"Evaluation({len(self)} samples: {shares})"

    @property
    def provenance(self) -> dict[str, Any]:
        """What produced the ledger: dataset, model, seed, attacks."""
        stored: dict[str, Any] = json.loads(
            (self.ledger.schema.metadata or {}).get(METADATA, b"{}")
        )
        return stored

    def correct(self, name: str = STANDARD) -> Bools:
        """Which samples count as right, (N,) bool in the dataset's order.

        Args:
            name: An attack, "standard" or "worst case".

        Raises:
            InputError: Unknown name; the message shows the nearest.
        """
        if name == STANDARD:
            return self._clean
        if name == WORST_CASE:
            return self._worst(self.names)
        return self._right[self._known(name)]

    def accuracy(self, name: str = STANDARD) -> float:
        """Share of samples that count as right, in [0, 1]; names as for `correct`."""
        return float(self.correct(name).mean())

    def success_rate(self, name: str) -> float:
        """Share of the correctly classified samples on which the attack succeeds (Disentangling, section 3.1).

        NaN where the model classifies nothing correctly. ``name`` is an attack or "worst case".
        """
        hits, count = self._successes(name)
        return hits / count if count else float("nan")

    def interval(
        self,
        name: str = STANDARD,
        confidence: float = 0.95,
        of: Literal["accuracy", "success_rate"] = "accuracy",
    ) -> Interval:
        """Wilson's interval of an accuracy or a success rate."""
        if of == "success_rate":
            return wilson_interval(*self._successes(name), confidence)
        right = self.correct(name)
        return wilson_interval(int(right.sum()), len(right), confidence)

    def worst_case(self, names: Sequence[str] | None = None) -> float:
        """Share of samples that are right under each of the attacks (None: all), in [0, 1]."""
        return float(
            self._worst(self.names if names is None else [self._known(n) for n in names]).mean()
        )

    def compare(
        self,
        other: Evaluation,
        name: str = STANDARD,
        other_name: str | None = None,
        confidence: float = 0.95,
    ) -> PairedComparison:
        """Accuracy here minus accuracy there, sample by sample; see `compare_paired`.

        Raises:
            InputError: The other evaluation is of other samples.
        """
        if not (
            np.array_equal(self.samples, other.samples)
            and np.array_equal(self.labels, other.labels)
        ):
            raise InputError("other: expected an evaluation on the same samples in the same order.")
        theirs = other.correct(name if other_name is None else other_name)
        return compare_paired(self.correct(name), theirs, confidence)

    def table(self, confidence: float = 0.95) -> pd.DataFrame:
        """A row for the standard accuracy, each attack and the worst case.

        Columns: n, accuracy, low and high (Wilson), success_rate, the mean over all samples of each variable's
        size, and the mean numbers of forward and backward passes.
        """
        means = self.to_pandas().groupby("attack", sort=False)[self._measures()].mean()
        rows = {}
        for name in self._rows():
            low, high = self.interval(name, confidence)
            rate = float("nan") if name == STANDARD else self.success_rate(name)
            row = {
                "n": len(self),
                "accuracy": self.accuracy(name),
                "low": low,
                "high": high,
                "success_rate": rate,
            }
            rows[name] = row | (means.loc[name].to_dict() if name in self._right else {})
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("attack")

    def to_pandas(self) -> pd.DataFrame:
        """The ledger as a data frame."""
        frame: pd.DataFrame = self.ledger.to_pandas()
        return frame

    def save(self, path: str | Path) -> Path:
        """Write the ledger as one Parquet file, atomically."""
        return write_table(path, self.ledger)

    @classmethod
    def load(
        cls, path: str | Path, method: str | None = None, seed: int | None = None
    ) -> Evaluation:
        """Read a ledger that `save` wrote, or one run's part of an experiment's ledger.

        Ledgers from before there was the column ``found_by`` have nulls in it.

        Args:
            path: The Parquet file.
            method: In an experiment's ledger, whose classifier; needed there.
            seed: In an experiment's ledger, of which seed; None: of the first.

        Raises:
            DataError: The file is missing, truncated, or no ledger.
            InputError: An experiment's ledger without such a run.
        """
        table = completed(read_table(path))
        if {"method", "seed"} <= set(table.column_names):
            table = _part(table, method, seed)
        missing = [name for name in (*_LEADING, *_TRAILING) if name not in table.column_names]
        if missing:
            raise DataError(
                f"{path} is no ledger of one evaluation: it has no column {missing[0]!r}."
            )
        return cls(table)

    def _rows(self) -> list[str]:
        return [STANDARD, *self.names, *([WORST_CASE] if self.names else [])]

    def _measures(self) -> list[str]:
        return [
            name for name in self.ledger.column_names if name.startswith(SIZE) or name in _TRAILING
        ]

    def _known(self, name: str) -> str:
        if name not in self._right:
            raise InputError(f"name: unknown attack {name!r}.{nearest(str(name), self._rows())}")
        return name

    def _worst(self, names: Sequence[str]) -> Bools:
        worst: Bools = np.logical_and.reduce([self._clean, *(self._right[name] for name in names)])
        return worst

    def _successes(self, name: str) -> tuple[int, int]:
        """On how many of the correctly classified samples the attack succeeds, and how many they are."""
        names = self.names if name == WORST_CASE else [self._known(name)]
        hits = np.logical_or.reduce(
            [np.zeros_like(self._clean), *(self._success[name] for name in names)]
        )
        return int((hits & self._clean).sum()), int(self._clean.sum())


def write_table(path: str | Path, table: pa.Table) -> Path:
    """Write a Parquet file with checksums, whole or not at all."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return write_atomically(path, sink.getvalue().to_pybytes())


def read_table(path: str | Path) -> pa.Table:
    """Read a Parquet file and verify its checksums.

    Raises:
        DataError: The file is missing or damaged.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is no Parquet file, or is truncated or damaged ({error})."
        ) from None


def _part(table: pa.Table, method: str | None, seed: int | None) -> pa.Table:
    """The rows of one run of an experiment's ledger."""
    methods = table.column("method").unique().to_pylist()
    if method not in methods:
        raise InputError(
            f"method: the ledger is of an experiment; expected one of {methods}, found {method!r}."
        )
    table = table.filter(pc.equal(table.column("method"), method))
    seeds = table.column("seed").unique().to_pylist()
    seed = seeds[0] if seed is None else seed
    if seed not in seeds:
        raise InputError(f"seed: expected one of {seeds} for {method}, found {seed}.")
    return table.filter(pc.equal(table.column("seed"), seed)).drop_columns(["method", "seed"])
