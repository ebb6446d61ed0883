"""What the figures of the plane show: boundaries where margins are 0, points by class, arrows of true length."""

import numpy as np
import pytest

from onmanifold.reports import figures
from onmanifold.reports.drawings.playground import Boundary, Panel, draw_fields, draw_points

POINTS = np.array([[0.2, 0.3], [0.4, 0.6], [0.7, 0.5]])
LABELS = np.array([0, 1, 1])
AXIS = np.linspace(0, 1, 21)


def boundary(place, classes=2):
    """A vertical line; a third class never wins."""
    above = np.broadcast_to(AXIS - place, (21, 21))
    others = [np.full_like(above, -2.0)] * (classes - 2)
    return Boundary(AXIS, AXIS, np.stack([-2 * above, 2 * above, *others], axis=-1))


def contours(pane):
    return [found for found in pane.collections if type(found).__name__ == "QuadContourSet"]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_panel_for_each_title(count):
    panels = {f"panel {number}": Panel(POINTS, LABELS) for number in range(count)}
    figure = draw_points(panels, ["left", "right"], boundary(0.5))
    assert [pane.get_title() for pane in figure.axes if pane.axison] == list(panels)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["left", "right", "boundary", "boundary of normal training"]


def test_the_boundary_lies_where_the_margin_is_nought():
    figure = draw_points({"one": Panel(POINTS, LABELS, boundary(0.43))}, ["left", "right"])
    (found,) = contours(figure.axes[0])
    across = np.concatenate([path.vertices[:, 0] for path in found.get_paths()])
    np.testing.assert_allclose(across, 0.43, atol=1e-9)


def test_each_class_has_its_boundary_where_there_are_more_than_two():
    figure = draw_points({"one": Panel(POINTS, LABELS, boundary(0.43, 3))}, ["a", "b", "c"])
    assert len(contours(figure.axes[0])) == 3


def test_arrows_have_their_true_length():
    moved = POINTS + np.array([[0.1, 0.0], [0.0, -0.05], [0.02, 0.02]])
    panel = Panel(POINTS, LABELS, boundary(0.5), moved)
    figure = draw_fields({"one": panel}, ["left", "right"])
    arrows = [found for found in figure.axes[0].collections if type(found).__name__ == "Quiver"]
    moves = np.concatenate([np.stack([found.U, found.V], axis=1) for found in arrows])
    np.testing.assert_allclose(moves, moved - POINTS)
    assert all(found.scale == 1 for found in arrows)
    assert "<svg" in figures.to_svg(figure)
