"""The area under the curve and its interval."""

import numpy as np
import pytest

from onmanifold.analysis.separation import separation
from onmanifold.foundation.errors import InputError


def test_area_is_that_of_the_curve():
    from scipy.stats import mannwhitneyu

    random = np.random.default_rng(0)
    for _ in range(20):
        cases, controls = random.normal(0.5, 1, 30).round(1), random.normal(0, 1, 40).round(1)
        found = separation(cases, controls)
        expected = mannwhitneyu(cases, controls).statistic / (30 * 40)
        assert found.area == pytest.approx(expected, abs=1e-12)
        swapped = separation(controls, cases)
        assert (swapped.area, swapped.low) == pytest.approx((1 - found.area, 1 - found.high))


def test_delong_by_hand():
    """Of independent numbers the variance is the sum of those of the components over their numbers."""
    cases, controls = np.array([1.0, 3.0, 4.0, 6.0]), np.array([0.0, 2.0, 5.0])
    above = (cases[:, None] > controls).astype(float)
    variance = above.mean(1).var(ddof=1) / 4 + above.mean(0).var(ddof=1) / 3
    found = separation(cases, controls)
    half = np.log(found.high / (1 - found.high)) - np.log(found.area / (1 - found.area))
    assert half == pytest.approx(
        1.959964 * np.sqrt(variance) / (found.area * (1 - found.area)), rel=1e-5
    )


@pytest.mark.parametrize("paired", [False, True])
def test_intervals_cover(paired):
    """Of 400 draws about 95 % of the intervals hold the true area; of pairs that move together too."""
    from scipy.stats import norm

    random = np.random.default_rng(1)
    true, hits, widths = norm.cdf(1 / np.sqrt(2)), 0, []
    for _ in range(400):
        controls = random.normal(0, 1, 60)
        cases = 1 + (
            0.9 * controls + np.sqrt(0.19) * random.normal(0, 1, 60)
            if paired
            else random.normal(0, 1, 60)
        )
        samples = np.arange(60)
        found = (
            separation(cases, controls, samples, samples) if paired else separation(cases, controls)
        )
        hits += found.low <= true <= found.high
        widths.append(found.high - found.low)
    assert 0.92 <= hits / 400 <= 0.98
    # Pairs that move together say more: an interval that took them for independent would be twice as wide.
    assert (np.mean(widths) < 0.12) == paired


def test_groups_apart_are_not_certain():
    found = separation(np.arange(20) + 100.0, np.arange(30.0))
    assert (found.area, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(1 / (1 + 1.959964**2 / 20), rel=1e-5)
    nothing = separation([], [1.0])
    assert np.isnan(nothing.area)
    assert (nothing.low, nothing.high) == (0.0, 1.0)


@pytest.mark.parametrize(
    "arguments",
    [
        ([np.nan], [1.0]),
        ([1.0], [1.0], [0], None),
        ([1.0], [1.0], [0, 1], [0]),
        ([1.0], [1.0], None, None, 1.0),
    ],
)
def test_wrong_input(arguments):
    with pytest.raises(InputError):
        separation(*arguments)
