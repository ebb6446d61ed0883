"""The table: numbers, intervals and the three ways it is written."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from rich.console import Console

from onmanifold.reports.tables import Entry, Table


def correct(*counts: int, images: int = 200) -> list[np.ndarray]:
    return [np.arange(images) < count for count in counts]


@pytest.fixture
def table() -> Table:
    outcomes = {
        ("Normal", "standard"): correct(180),
        ("Normal", "PGD-50"): correct(0),
        ("DMAT [PGD-5, OM-PGD-5]", "standard"): correct(170),
        ("DMAT [PGD-5, OM-PGD-5]", "PGD-50"): correct(121),
        ("Failed", "standard"): [],
    }
    methods = ["Normal", "DMAT [PGD-5, OM-PGD-5]", "Failed"]
    return Table.of(methods, ["standard", "PGD-50"], outcomes)


def test_csv_is_percent_with_two_decimals(table):
    assert table.to_csv() == (
        "method,standard,PGD-50\n"
        "Normal,90.00,0.00\n"
        '"DMAT [PGD-5, OM-PGD-5]",85.00,60.50\n'
        "Failed,,\n"
    )
    assert len(list(csv.reader(io.StringIO(table.to_csv())))[2]) == 3


def test_markdown_golden(table):
    # Wilson's intervals of 180, 0, 170 and 121 of 200, computed by hand from his formula.
    assert table.to_markdown() == (
        "| Method | Standard | PGD-50 |\n"
        "|:--|--:|--:|\n"
        "| Normal | **90.0** ± 4.9 | 0.0 ± 1.9 |\n"
        "| DMAT [PGD-5, OM-PGD-5] | 85.0 ± 5.6 | **60.5** ± 6.9 |\n"
        "| Failed | – | – |\n"
        "\n"
        "Accuracy in percent on 200 test images: one seed, ± the longer arm of Wilson's 95 % interval over "
        "test images.\n"
    )


def test_wilson_by_hand():
    n, p, z = 200, 0.9, 1.959964
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    arm = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    entry = Entry.of(correct(180))
    assert entry.low == pytest.approx(100 * (centre - arm), abs=1e-3)
    assert entry.high == pytest.approx(100 * (centre + arm), abs=1e-3)


def test_several_seeds_give_students_interval():
    entry = Entry.of(correct(160, 170, 180))
    assert entry.values == (80.0, 85.0, 90.0)
    assert entry.mean == pytest.approx(85)
    # 4.302653 is Student's 97.5 % point for two degrees of freedom.
    assert entry.margin == pytest.approx(4.302653 * 5 / np.sqrt(3), abs=1e-4)


def test_interval_stays_within_percent():
    entry = Entry.of(correct(0, 30, 0))
    assert entry.low == 0
    assert Entry.of(correct(200, 190, 200)).high == 100


@pytest.mark.parametrize(("width", "first"), [(140, "Method"), (44, "Attack")])
def test_terminal_table_turns_where_narrow(table, width, first):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table.to_rich(width))
    text = console.export_text()
    lines = [line.split() for line in text.splitlines()]
    assert any(line[:1] == [first] for line in lines)
    assert "90.0 ±4.9" in text
    assert "60.5 ±6.9" in text
    assert "…" not in text


def test_best_of_column_needs_a_rival():
    alone = Table.of(["A"], ["standard"], {("A", "standard"): correct(100)})
    assert "**" not in alone.to_markdown()
