"""The table of a run: methods by standard accuracy, attacks and worst case, in percent, with intervals."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from onmanifold.reports.claims import CONFIDENCE, Outcomes

if TYPE_CHECKING:
    import rich.table


@dataclass(frozen=True)
class Entry:
    """An accuracy in percent with its 95 % interval.

    Attributes:
        mean: Over seeds.
        low: Lower end of the interval.
        high: Upper end.
        values: One accuracy for each seed.
    """

    mean: float
    low: float
    high: float
    values: tuple[float, ...]

    @property
    def margin(self) -> float:
        """The longer arm of the interval, in percentage points."""
        return max(self.mean - self.low, self.high - self.mean)

    @staticmethod
    def of(correct: Sequence[NDArray[np.bool_]]) -> Entry:
        """From which images were classified correctly, (N,) for each seed.

        Several seeds: Student's interval over seeds, which holds the variation of training. One seed:
        Wilson's interval, which holds only that of the test images.
        """
        from onmanifold.evaluation.statistics import mean_interval, wilson_interval

        values = [100.0 * float(np.mean(item)) for item in correct]
        if len(values) == 1:
            low, high = wilson_interval(int(np.sum(correct[0])), len(correct[0]), CONFIDENCE)
            return Entry(values[0], 100 * low, 100 * high, tuple(values))
        mean, low, high, *_ = mean_interval(values, CONFIDENCE)
        return Entry(mean, max(low, 0.0), min(high, 100.0), tuple(values))


@dataclass(frozen=True)
class Table:
    """Methods by columns; an entry is None where nothing was measured.

    Attributes:
        columns: "standard", attacks and worst cases.
        rows: For each method, an entry for each column.
        images: Number of test images.
    """

    columns: tuple[str, ...]
    rows: dict[str, tuple[Entry | None, ...]]
    images: int

    @staticmethod
    def of(methods: Iterable[str], columns: Iterable[str], outcomes: Outcomes) -> Table:
        """From what was measured."""
        columns = tuple(columns)
        images = max((len(seed) for seeds in outcomes.values() for seed in seeds), default=0)

        def entry(method: str, column: str) -> Entry | None:
            seeds = outcomes.get((method, column))
            return Entry.of(seeds) if seeds else None

        rows = {method: tuple(entry(method, column) for column in columns) for method in methods}
        return Table(columns, rows, images)

    @property
    def note(self) -> str:
        """What the numbers are, in a sentence."""
        seeds = max((len(e.values) for row in self.rows.values() for e in row if e), default=0)
        if seeds > 1:
            interval = f"mean over {seeds} seeds ± half of Student's 95 % interval over seeds"
        else:
            interval = "one seed, ± the longer arm of Wilson's 95 % interval over test images"
        return f"Accuracy in percent on {self.images:,} test images: {interval}."

    def best(self, column: int) -> float | None:
        """The highest accuracy of a column, where more than one method was measured."""
        means = [row[column].mean for row in self.rows.values() if row[column]]  # type: ignore[union-attr]
        return max(means) if len(means) > 1 else None

    def headings(self) -> list[str]:
        """Names of the columns as shown: the first letter is a capital."""
        return [column[:1].upper() + column[1:] for column in self.columns]

    def to_csv(self) -> str:
        """Percent with two decimals; a row for each method, a column for each attack."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["method", *self.columns])
        for method, row in self.rows.items():
            writer.writerow(
                [method, *("" if entry is None else f"{entry.mean:.2f}" for entry in row)]
            )
        return buffer.getvalue()

    def to_markdown(self) -> str:
        """A table with intervals, the best of each column in bold."""
        lines = [
            "| Method | " + " | ".join(self.headings()) + " |",
            "|:--|" + "--:|" * len(self.columns),
        ]
        for method, row in self.rows.items():
            cells = [self._marked(entry, column, "**") for column, entry in enumerate(row)]
            lines.append(f"| {method.replace('|', chr(92) + '|')} | " + " | ".join(cells) + " |")
        return "\n".join([*lines, "", self.note, ""])

    def to_rich(self, width: int = 120) -> rich.table.Table:
        """For the terminal; turned, a column for each method, where it is narrower than the table needs."""
        from rich import box
        from rich.markup import escape
        from rich.table import Table as RichTable

        def show(entry: Entry | None, column: int) -> str:
            if entry is None:
                return "–"
            mean = f"{entry.mean:.1f}"
            mean = f"[bold]{mean}[/bold]" if self.is_best(entry, column) else mean
            return f"{mean} [dim]±{entry.margin:.1f}[/dim]"

        methods, headings = list(self.rows), self.headings()
        needed = max(map(len, methods), default=0) + sum(
            max(len(item), 10) + 2 for item in headings
        )
        cells = [
            [show(entry, column) for column, entry in enumerate(row)] for row in self.rows.values()
        ]
        turned = needed > width
        across, down = (methods, headings) if turned else (headings, methods)
        table = RichTable(
            box=box.SIMPLE_HEAD, caption=self.note, caption_justify="left", pad_edge=False
        )
        table.add_column("Attack" if turned else "Method", no_wrap=turned)
        for heading in across:
            table.add_column(escape(heading), justify="right", overflow="fold")
        for place, name in enumerate(down):
            table.add_row(
                escape(name), *([row[place] for row in cells] if turned else cells[place])
            )
        return table

    def is_best(self, entry: Entry, column: int) -> bool:
        """Whether it is the highest of its column, as printed."""
        best = self.best(column)
        return best is not None and f"{entry.mean:.1f}" == f"{best:.1f}"

    def _marked(self, entry: Entry | None, column: int, mark: str) -> str:
        if entry is None:
            return "–"
        mark = mark if self.is_best(entry, column) else ""
        return f"{mark}{entry.mean:.1f}{mark} ± {entry.margin:.1f}"
