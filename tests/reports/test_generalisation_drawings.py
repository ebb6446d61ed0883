"""The figures of sweeps and transferred attacks: what is drawn is what was measured."""

import numpy as np
import pandas as pd
import pytest

from onmanifold.analysis.generalisation import POOLED, relate
from onmanifold.reports import figures
from onmanifold.reports.drawings.generalisation import draw_by_size, draw_relations, draw_transfer


@pytest.fixture
def trainings() -> pd.DataFrame:
    generator = np.random.default_rng(0)
    rows = [
        {"method": method, "size": size, "seed": seed, "test_error": error, "PGD": rate}
        for method in ("Normal", "AT", "OM-AT")
        for size in (100, 1000, 5000)
        for seed in (0, 1)
        for error, rate in [generator.uniform(size=2)]
    ]
    return pd.DataFrame(rows)


def drawn_points(pane) -> np.ndarray:
    return np.concatenate(
        [np.asarray(item.get_offsets()) for item in pane.collections if len(item.get_offsets()) > 1]
    )


def test_each_training_is_a_point_of_the_relation(trainings):
    found = relate(trainings, "PGD")
    figure = draw_relations({"PGD": found, "PGD again": found}, POOLED)
    first, second = figure.axes
    expected = 100 * trainings[["test_error", "PGD"]].to_numpy()
    points = drawn_points(first)
    assert points[np.lexsort(points.T)] == pytest.approx(expected[np.lexsort(expected.T)])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Normal", "AT", "OM-AT"]
    assert f"{found[POOLED].pearson.coefficient:.2f}".lstrip("-") in first.texts[0].get_text()
    assert second.get_title() == "PGD again"
    line = found["AT"].line
    heights = [
        100 * line.at(np.array(item.get_xdata()) / 100)
        for item in first.lines
        if len(item.get_xdata()) == 60
    ]
    drawn = [item.get_ydata() for item in first.lines if len(item.get_xdata()) == 60]
    assert sum(np.allclose(one, two) for one, two in zip(drawn, heights, strict=True)) == 1


def test_a_method_whose_rate_is_constant_has_no_correlation_and_is_drawn(trainings):
    trainings.loc[:, "PGD"] = 1.0
    figure = draw_relations({"PGD": relate(trainings, "PGD")}, POOLED)
    assert "r not defined" in figure.axes[0].texts[0].get_text()
    assert "<svg" in figures.to_svg(figure)


def test_means_over_seeds_by_size(trainings):
    points = {
        method: list(zip(part["size"], part.test_error, strict=True))
        for method, part in trainings.groupby("method", sort=False)
    }
    figure = draw_by_size({"test error": points})
    pane = figure.axes[0]
    means = trainings.groupby(["method", "size"], sort=False).test_error.mean()
    for line, method in zip(pane.lines, ("Normal", "AT", "OM-AT"), strict=True):
        assert line.get_xdata().tolist() == [100, 1000, 5000]
        assert line.get_ydata() == pytest.approx(100 * means[method].to_numpy())
    assert [text.get_text() for text in pane.get_xticklabels()] == ["100", "1,000", "5,000"]
    assert len({line.get_marker() for line in pane.lines}) == 3


def test_cells_of_the_heat_map_are_the_table():
    table = pd.DataFrame(
        [[1.0, 0.43], [0.36, np.nan]], index=["itself", "Normal"], columns=["Normal", "AT"]
    )
    figure = draw_transfer({"PGD": table, "OM-PGD": table})
    pane = figure.axes[0]
    assert [text.get_text() for text in pane.texts] == ["100", "43", "36", "–"]
    assert [text.get_text() for text in pane.get_yticklabels()] == ["itself", "Normal"]
    # The white-box attacks, which are no model, are set apart.
    assert len(pane.lines) == 1
    assert not draw_transfer({"PGD": table.loc[["Normal"]]}).axes[0].lines
