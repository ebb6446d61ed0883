"""What perturbations do to points, where that is known: a line as boundary, sets that move or trade place."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from onmanifold.analysis.playground import (
    distribution_shift,
    grid_logits,
    margins,
    measure_perturbation,
)
from onmanifold.foundation.errors import InputError


class Line(nn.Module):
    """Class 1 where the first pixel is above 0.5; its logits are ± 4 (x - 0.5)."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(4.0, dtype=torch.float64))

    def forward(self, images):
        above = self.slope * (images[:, 0, 0, 0] - 0.5)
        return torch.stack([-above, above], dim=1)


def points(*places):
    return torch.tensor(places, dtype=torch.float64).view(-1, 1, 1, 2)


def test_the_grid_holds_the_logits_at_its_points():
    model = Line()
    grid = grid_logits(model, (0.2, 0.0), (0.8, 1.0), resolution=7)
    assert grid.across.tolist() == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    assert grid.up.tolist()[::6] == pytest.approx([0.0, 1.0])
    for row, column in itertools.product((0, 3, 6), (0, 2, 5)):
        place = points([float(grid.across[column]), float(grid.up[row])])
        torch.testing.assert_close(grid.logits[row, column], model(place)[0].detach())
    assert model.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 1}, "resolution"),
        ({"low": (0.5, 0.0), "high": (0.5, 1.0)}, "corners"),
        ({"high": (1.0, 1.5)}, "corners"),
    ],
)
def test_wrong_grids(options, message):
    with pytest.raises(InputError, match=message):
        grid_logits(Line(), **options)


@settings(max_examples=50)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=5))
def test_margins_against_their_definition(logits):
    found = margins(torch.tensor([logits], dtype=torch.float64))[0].tolist()
    for number, value in enumerate(logits):
        others = logits[:number] + logits[number + 1 :]
        assert found[number] == pytest.approx(value - max(others), abs=1e-12)


def test_measures_of_known_moves():
    images = points([0.3, 0.5], [0.45, 0.5], [0.6, 0.5], [0.7, 0.2])
    labels = torch.tensor([0, 0, 1, 1])
    # Towards the boundary, across it, along it, and nowhere.
    perturbed = points([0.4, 0.5], [0.55, 0.5], [0.6, 0.7], [0.7, 0.2])
    reference = points([0.2, 0.5], [0.3, 0.4], [0.6, 0.5], [0.8, 0.2])
    model = Line()
    found = measure_perturbation(
        model, images, perturbed, labels, reference, torch.tensor([0, 0, 1, 1])
    )
    assert found.length.tolist() == pytest.approx([0.1, 0.1, 0.2, 0.0])
    assert found.cosine.tolist()[:3] == pytest.approx([1.0, 1.0, 0.0])
    assert math.isnan(found.cosine[3])
    assert found.crosses.tolist() == [False, True, False, False]
    assert found.strays.tolist() == [False, True, False, False]
    wanted = [math.hypot(0.1, 0.1), math.hypot(0.25, 0.1), 0.2, 0.1]
    assert found.distance.tolist() == pytest.approx(wanted)
    assert model.slope.grad is None
    assert model.training


def test_the_cosine_of_a_sure_classifier():
    """The gradient underflows nearly, its direction does not."""
    model = Line()
    model.slope.data *= 150
    found = measure_perturbation(
        model,
        points([0.1, 0.5]),
        points([0.2, 0.6]),
        torch.tensor([0]),
        points([0.1, 0.5]),
        torch.tensor([0]),
    )
    assert found.cosine.tolist() == pytest.approx([math.sqrt(0.5)])


def test_wrong_sets():
    images, labels = points([0.1, 0.2]), torch.tensor([1])
    with pytest.raises(InputError, match="of every class"):
        measure_perturbation(Line(), images, images, labels, images, torch.tensor([0]))
    with pytest.raises(InputError, match="perturbed, reference"):
        measure_perturbation(Line(), images, points([0.1, 0.2], [0.3, 0.4]), labels, images, labels)
    with pytest.raises(InputError, match="second, labels"):
        distribution_shift(images, images, torch.tensor([0, 1]))


@settings(max_examples=30)
@given(
    move=st.tuples(st.floats(-0.2, 0.2), st.floats(-0.2, 0.2)),
    count=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_a_set_that_moves_as_one_has_moved_by_that_much(move, count, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, 1, 2, generator=generator).double()
    labels = torch.arange(count) % 2
    moved = images + points(move)
    assert distribution_shift(images, moved, labels) == pytest.approx(math.hypot(*move), abs=1e-9)


@settings(max_examples=30)
@given(seed=st.integers(0, 99))
def test_points_that_trade_places_within_their_class_have_not_moved(seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(10, 1, 1, 2, generator=generator).double()
    labels = torch.tensor([0] * 5 + [1] * 5)
    order = torch.cat([torch.randperm(5, generator=generator) + start for start in (0, 5)])
    assert distribution_shift(images, images[order], labels) == pytest.approx(0.0, abs=1e-12)
    assert distribution_shift(images, images.roll(5, 0), labels) > 0


def test_the_shift_against_all_matchings():
    generator = torch.Generator().manual_seed(1)
    first, second = torch.rand(2, 6, 1, 1, 2, generator=generator).double()
    costs = [
        sum(float((first[i] - second[j]).square().sum()) for i, j in enumerate(order))
        for order in itertools.permutations(range(6))
    ]
    found = distribution_shift(first, second, torch.zeros(6).long())
    assert found == pytest.approx(math.sqrt(min(costs) / 6))
