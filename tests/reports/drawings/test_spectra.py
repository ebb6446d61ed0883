"""What the figures of spectra show: the numbers given, and nothing of those that are 0."""

import numpy as np
import pytest

from onmanifold.reports import figures
from onmanifold.reports.drawings.spectra import draw_all_spectra, draw_ratios, draw_spectra

CLEAN = np.array([[4.0, 2.0, 1.0, 0.5, 0.25, 0.0], [8.0, 4.0, 2.0, 1.0, 0.0, 0.0]])
SPECTRA = {"clean": CLEAN, "PGD": 2 * CLEAN}


def lines(pane):
    return {line.get_label(): line.get_xydata() for line in pane.get_lines()}


def test_a_row_for_each_class_parted_at_the_leading_ones():
    figure = draw_spectra(SPECTRA, ["A", "B"], leading=2)
    panes = figure.axes
    assert [pane.get_title() for pane in panes] == [
        "A: the first 2",
        "A: from 3 on",
        "B: the first 2",
        "B: from 3 on",
    ]
    assert all(pane.get_yscale() == "log" for pane in panes)
    assert lines(panes[2])["PGD"].tolist() == [[1, 16], [2, 8]]
    rest = lines(panes[1])["clean"]
    assert rest[:3].tolist() == [[3, 1], [4, 0.5], [5, 0.25]]
    assert np.isnan(rest[3, 1])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["clean", "PGD"]


@pytest.mark.parametrize("classes", [2, 7])
def test_small_multiples_for_any_number_of_classes(classes):
    spectra = {name: np.repeat(values[:1], classes, axis=0) for name, values in SPECTRA.items()}
    figure = draw_all_spectra(spectra, [f"class {number}" for number in range(classes)], leading=2)
    titles = [pane.get_title() for pane in figure.axes if pane.axison]
    assert titles == [f"class {number}" for number in range(classes)]
    assert "<svg" in figures.to_svg(figure)


def test_ratios_stand_in_the_middle_of_their_groups():
    groups = np.array([0, 1, 4, 9])
    ratios = np.array([[0.5, 0.4, 0.6], [2.0, 1.5, 2.5], [np.inf, np.inf, np.inf]])
    (pane,) = draw_ratios(groups, {"PGD": ratios}, leading=2).axes
    found = lines(pane)["PGD"]
    np.testing.assert_allclose(found[:, 0], [1, np.sqrt(8), np.sqrt(45)])
    np.testing.assert_allclose(found[:2, 1], [0.5, 2.0])
    assert np.isnan(found[2, 1])
