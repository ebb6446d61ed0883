"""Correlations, lines and success rates against references and cases with known answers."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from onmanifold.analysis.generalisation import (
    POOLED,
    correlate,
    correlations_table,
    regress,
    relate,
    slopes_table,
    success_rate,
)
from onmanifold.evaluation import Evaluation
from onmanifold.evaluation.ledger import ledger_of, outcome_table
from onmanifold.foundation.errors import InputError

GENERATOR = np.random.default_rng(5)
X = GENERATOR.uniform(size=20)
Y = 0.3 + 0.5 * X + GENERATOR.normal(scale=0.1, size=20)

# Numbers in hundredths, so that squares of differences never underflow.
shares = arrays(np.int64, 12, elements=st.integers(0, 100)).map(lambda values: values / 100)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_pearson_and_its_interval_are_scipys(confidence):
    reference = stats.pearsonr(X, Y)
    found = correlate(X, Y, confidence=confidence)
    assert found.coefficient == pytest.approx(reference.statistic)
    assert found[1:3] == pytest.approx(reference.confidence_interval(confidence))
    assert found.points == 20


def test_spearman_is_scipys_and_its_interval_bonett_and_wrights():
    found = correlate(X, Y, kind="spearman")
    rank = stats.spearmanr(X, Y).statistic
    assert found.coefficient == pytest.approx(rank)
    half = stats.norm.ppf(0.975) * math.sqrt((1 + rank**2 / 2) / (20 - 3))
    assert found.low == pytest.approx(math.tanh(math.atanh(rank) - half))
    assert found.high == pytest.approx(math.tanh(math.atanh(rank) + half))


@pytest.mark.parametrize("kind", ["pearson", "spearman"])
def test_bootstrap_is_the_percentiles_of_scipys_coefficients_of_the_same_draws(kind):
    measure = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}[kind]
    drawn = np.random.default_rng(7).integers(20, size=(200, 20))
    slow = [measure(X[rows], Y[rows]).statistic for rows in drawn]
    found = correlate(X, Y, kind=kind, interval="bootstrap", resamples=200, seed=7, confidence=0.9)
    assert found[1:3] == pytest.approx(np.quantile(slow, [0.05, 0.95]))


def test_bootstrap_covers_the_correlation_of_normal_quantities():
    # 95 % intervals of r = 0.6, 40 points: of 200 about 190 cover, at least 175 with near certainty.
    generator, covered = np.random.default_rng(0), 0
    for number in range(200):
        x = generator.normal(size=40)
        y = 0.6 * x + 0.8 * generator.normal(size=40)
        found = correlate(x, y, interval="bootstrap", resamples=300, seed=number)
        covered += found.low <= 0.6 <= found.high
    assert covered >= 175


def test_a_monotone_curve_has_rank_correlation_one():
    x = np.linspace(0, 1, 9)
    assert correlate(x, np.exp(5 * x), kind="spearman").coefficient == pytest.approx(1)
    assert correlate(x, np.exp(5 * x)).coefficient < 0.95
    assert correlate(x, -x)[:3] == pytest.approx((-1, -1, -1))


@pytest.mark.parametrize("interval", ["fisher", "bootstrap"])
@pytest.mark.parametrize(("x", "y"), [([1, 2, 3, 4], [1, 1, 1, 1]), ([1, 2], [1, 2]), ([], [])])
def test_what_is_not_defined_is_nan_with_the_whole_range(x, y, interval):
    found = correlate(x, y, interval=interval)
    assert math.isnan(found.coefficient)
    assert found[1:] == (-1.0, 1.0, len(x))


def test_three_points_leave_fishers_interval_open():
    assert correlate([1, 2, 3], [1, 2, 4])[1:3] == (-1.0, 1.0)


@given(shares, shares, st.floats(0.1, 10), st.floats(-5, 5))
def test_correlation_is_symmetric_and_blind_to_units(x, y, factor, shift):
    found = correlate(x, y).coefficient
    assert correlate(y, x).coefficient == pytest.approx(found, nan_ok=True)
    assert correlate(factor * x + shift, y).coefficient == pytest.approx(
        found, abs=1e-9, nan_ok=True
    )
    assert correlate(-x, y).coefficient == pytest.approx(-found, nan_ok=True)


def test_line_and_slope_are_scipys():
    reference = stats.linregress(X, Y)
    line = regress(X, Y)
    assert line.slope == pytest.approx(reference.slope)
    assert float(line.at(0.0)) == pytest.approx(reference.intercept)
    half = stats.t.ppf(0.975, 18) * reference.stderr
    assert (line.low, line.high) == pytest.approx((line.slope - half, line.slope + half))
    low, high = line.band(0.0)
    half = stats.t.ppf(0.975, 18) * reference.intercept_stderr
    assert (float(low), float(high)) == pytest.approx(
        (reference.intercept - half, reference.intercept + half)
    )


def test_band_is_that_of_the_normal_equations():
    # Var(a + b x) = s² (1, x) (AᵀA)⁻¹ (1, x)ᵀ, with A the rows (1, x_i).
    design = np.stack([np.ones_like(X), X], axis=1)
    solution, (rest,), *_ = np.linalg.lstsq(design, Y, rcond=None)
    covariance = rest / 18 * np.linalg.inv(design.T @ design)
    places = np.array([[1.0, -0.5], [1.0, 0.2], [1.0, 3.0]])
    errors = np.sqrt(np.einsum("ni,ij,nj->n", places, covariance, places))
    low, high = regress(X, Y, confidence=0.9).band(places[:, 1])
    middle, half = places @ solution, stats.t.ppf(0.95, 18) * errors
    assert low == pytest.approx(middle - half)
    assert high == pytest.approx(middle + half)


def test_points_on_a_line_give_it_back():
    line = regress([0.1, 0.2, 0.4, 0.8], [0.35, 0.4, 0.5, 0.7])
    assert (line.slope, line.low, line.high) == pytest.approx((0.5, 0.5, 0.5))
    assert line.at([0.0, 1.0]) == pytest.approx([0.3, 0.8])


@pytest.mark.parametrize(("x", "y"), [([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]), ([1.0, 2.0], [3.0, 4.0])])
def test_a_line_that_is_not_defined(x, y):
    line = regress(x, y)
    assert math.isnan(line.slope)
    assert (line.low, line.high) == (-math.inf, math.inf)


def test_success_rate_is_of_the_correctly_classified():
    clean = [True, True, True, False, False]
    attacked = [True, False, False, False, True]
    assert success_rate(clean, attacked) == pytest.approx(2 / 3)
    assert math.isnan(success_rate([False], [True]))
    with pytest.raises(InputError, match="two bool arrays"):
        success_rate([1, 0], [1, 0])


@given(arrays(bool, (2, 9)))
def test_success_rate_is_the_ledgers(outcomes):
    clean, attacked = outcomes

    def outcome(right):
        predictions = np.where(right, 0, 1)
        columns = {
            "sample": np.arange(9),
            "label": np.zeros(9, np.int64),
            "adversarial_prediction": predictions,
            "success": ~right,
            "found_by": None,
            "objective": None,
            "forwards": np.ones(9),
            "backwards": np.ones(9),
        }
        return outcome_table(columns, 9)

    evaluation = Evaluation(ledger_of(outcome(clean), {"PGD": outcome(attacked)}, {}))
    expected = evaluation.success_rate("PGD")
    assert success_rate(clean, attacked) == pytest.approx(expected, nan_ok=True)


@pytest.fixture
def trainings() -> pd.DataFrame:
    """Two methods whose success rate falls with test error each, and rises over both together."""
    rows = [
        {"method": method, "size": size, "seed": seed, "test_error": error, "PGD": rate}
        for method, offset in (("Normal", 0.0), ("AT", 0.4))
        for size, step in ((100, 0.1), (200, 0.05), (400, 0.0))
        for seed, noise in ((0, 0.0), (1, 0.01))
        for error, rate in [(0.1 + offset + step + noise, 0.3 + offset - 0.5 * (step + noise))]
    ]
    return pd.DataFrame(rows)


def test_pooled_and_single_methods_may_disagree(trainings):
    found = relate(trainings, "PGD")
    assert list(found) == ["Normal", "AT", POOLED]
    for name in ("Normal", "AT"):
        assert found[name].line.slope == pytest.approx(-0.5)
        assert found[name].pearson.coefficient == pytest.approx(-1)
        assert found[name].sizes.tolist() == [100, 100, 200, 200, 400, 400]
    assert found[POOLED].pearson.coefficient > 0.9
    assert found[POOLED].pearson == correlate(trainings.test_error, trainings.PGD)
    table = correlations_table(found)
    assert table.method.tolist() == list(found)
    assert table.trainings.tolist() == [6, 6, 12]
    assert slopes_table(found).highest_rate.tolist() == pytest.approx([0.3, 0.7, 0.7])


def test_failed_trainings_are_left_out_and_one_method_is_not_pooled(trainings):
    trainings.loc[0, ["test_error", "PGD"]] = np.nan
    found = relate(trainings[trainings.method == "Normal"], "PGD")
    assert {name: relation.pearson.points for name, relation in found.items()} == {"Normal": 5}
    with pytest.raises(InputError, match="expected a column 'OM-PGD'"):
        relate(trainings, "OM-PGD")


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([1, 2], [1]), {}, "of one length"),
        (([1, np.nan, 3], [1, 2, 3]), {}, "finite"),
        (([1, 2, 3], [1, 2, 3]), {"kind": "kendall"}, "kind: expected one of pearson, spearman"),
        (([1, 2, 3], [1, 2, 3]), {"interval": "t"}, "interval: expected one of"),
        (([1, 2, 3], [1, 2, 3]), {"confidence": 1.0}, "confidence"),
        (([1, 2, 3], [1, 2, 3]), {"resamples": 0}, "resamples"),
    ],
)
def test_wrong_arguments(arguments, options, message):
    with pytest.raises(InputError, match=message):
        correlate(*arguments, **options)
