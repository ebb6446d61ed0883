import math

import numpy as np
import pytest
from scipy import stats

from onmanifold.evaluation import compare_paired, mean_interval, verdict, wilson_interval
from onmanifold.foundation.errors import InputError


# Newcombe 1998, Statistics in Medicine 17:857, table I, method 3 (score without continuity correction).
@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_of_the_literature(successes, count, low, high):
    assert wilson_interval(successes, count) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_of_nothing_is_everything():
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_wilson_interval_widens_with_confidence():
    narrow, wide = wilson_interval(50, 100, 0.8), wilson_interval(50, 100, 0.99)
    assert wide.low < narrow.low < 0.5 < narrow.high < wide.high


@pytest.mark.parametrize("arguments", [(-1, 5), (6, 5), (1, 5, 0.0), (1, 5, 1.0)])
def test_wilson_interval_refuses(arguments):
    with pytest.raises(InputError, match="expected"):
        wilson_interval(*arguments)


def outcomes(both, first_only, second_only, neither):
    first = [True] * (both + first_only) + [False] * (second_only + neither)
    second = [True] * both + [False] * first_only + [True] * second_only + [False] * neither
    return np.array(first), np.array(second)


# Newcombe 1998, Statistics in Medicine 17:2635, method 10; the last row: Fagerland, Lydersen and Laake 2014,
# Statistics in Medicine 33:2850, airway hyper-responsiveness.
@pytest.mark.parametrize(
    ("cells", "low", "high", "tolerance"),
    [
        ((36, 12, 2, 0), 0.0569, 0.3404, 5e-5),
        ((18, 12, 2, 18), 0.0562, 0.3290, 5e-5),
        ((53, 0, 0, 1), -0.0729, 0.0729, 5e-5),
        ((1, 1, 7, 12), -0.507, -0.026, 5e-4),
    ],
)
def test_paired_interval_of_the_literature(cells, low, high, tolerance):
    found = compare_paired(*outcomes(*cells))
    assert (found.low, found.high) == pytest.approx((low, high), abs=tolerance)
    assert found.difference == pytest.approx((cells[1] - cells[2]) / sum(cells))
    assert found.samples == sum(cells)


def test_mcnemar_by_hand():
    # 9 against 1: 2 · (C(10,0) + C(10,1)) / 2^10.
    assert compare_paired(*outcomes(20, 9, 1, 5)).p_value == pytest.approx(22 / 1024)


def test_paired_comparison_turned_round():
    first, second = outcomes(10, 6, 2, 4)
    there, back = compare_paired(first, second), compare_paired(second, first)
    assert back.difference == -there.difference
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low))
    assert back.p_value == pytest.approx(there.p_value)


def test_paired_comparison_of_equals():
    found = compare_paired(*outcomes(5, 0, 0, 0))
    assert found.difference == 0
    assert found.low < 0 < found.high
    assert found.p_value == 1.0


@pytest.mark.parametrize(
    ("first", "second"),
    [([True], [True, False]), ([], []), ([1, 0], [0, 1])],
)
def test_paired_comparison_refuses(first, second):
    with pytest.raises(InputError, match="bool arrays"):
        compare_paired(first, second)


def test_mean_interval_is_students():
    values = [0.61, 0.66, 0.63]
    found = mean_interval(values)
    expected = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected)
    assert found.runs == 3
    # With two degrees of freedom the quantile is 4.303 (any table of the t distribution).
    assert found.high - found.mean == pytest.approx(
        4.303 * np.std(values, ddof=1) / math.sqrt(3), rel=1e-4
    )


def test_one_seed_tells_nothing_of_the_spread():
    found = mean_interval([0.5])
    assert (found.mean, found.low, found.high) == (0.5, -math.inf, math.inf)
    assert verdict(found.low, found.high) == "within noise"


def test_mean_of_nothing_is_refused():
    with pytest.raises(InputError, match="at least one"):
        mean_interval([])
