"""Learning rates against values computed by hand."""

import math

import pytest

from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.registry import describe
from onmanifold.training.schedules import SCHEDULES, Constant, Cosine, Cyclic, Exponential, Step


@pytest.mark.parametrize(
    ("schedule", "progress", "factor"),
    [
        (Constant(), 7.3, 1.0),
        (Exponential(decay=0.95), 0.99, 1.0),
        (Exponential(decay=0.95), 19.5, 0.95**19),
        (Step(milestones=(75, 90)), 74.99, 1.0),
        (Step(milestones=(75, 90)), 75.01, 0.1),
        (Step(milestones=(75, 90)), 119.0, 0.01),
        (Cyclic(), 0.25, 0.25),
        (Cyclic(), 1.0, 1.0),
        (Cyclic(), 6.0, 0.1),
        (Cyclic(), 9.0, 0.055),
        (Cyclic(), 17.5, (0.001 + 0.00025) / 2),
        (Cyclic(), 19.999999, 0.00025),
        (Cosine(), 5.0, (1 + math.cos(math.pi / 4)) / 2),
        (Cosine(warmup=2, final=0.1), 1.0, 0.5),
        (Cosine(warmup=2, final=0.1), 11.0, 0.55),
        (Cosine(warmup=2, final=0.1), 20.0, 0.1),
    ],
)
def test_factor(schedule, progress, factor):
    epochs = 120 if isinstance(schedule, Step) else 20
    assert schedule.factor(progress, epochs) == pytest.approx(factor, rel=1e-5, abs=1e-12)


def test_cyclic_stretches_to_the_length_of_training():
    assert Cyclic().factor(3.0, epochs=10) == pytest.approx(Cyclic().factor(6.0, epochs=20))


def test_cyclic_gives_the_learning_rates_of_dmat():
    rates = [0.4 * Cyclic().factor(epoch, 20) for epoch in (1, 6, 12, 15, 20)]
    assert rates == pytest.approx([0.4, 0.04, 0.004, 0.0004, 0.0001])


def test_every_schedule_is_rebuilt_from_its_description():
    for schedule in (
        Constant(),
        Exponential(),
        Step(milestones=(1.5, 2)),
        Cyclic(),
        Cosine(warmup=1),
    ):
        assert SCHEDULES.build(describe(schedule)) == schedule


@pytest.mark.parametrize(
    "make",
    [
        lambda: Exponential(decay=0.0),
        lambda: Step(milestones=(3, 2)),
        lambda: Step(milestones=(3,), decay=2.0),
        lambda: Cyclic(epochs=(1, 2), factors=(0, 1)),
        lambda: Cyclic(epochs=(0, 1), factors=(0, 1, 2)),
        lambda: Cosine(warmup=-1),
        lambda: Cosine(final=2),
    ],
)
def test_bad_fields(make):
    with pytest.raises(ConfigError, match="expected"):
        make()
