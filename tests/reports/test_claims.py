"""Claims: what they say, and what the numbers say about them."""

from __future__ import annotations

import numpy as np
import pytest

from onmanifold.foundation.errors import ConfigError
from onmanifold.reports.claims import Claim, Side, judge


def correct(share: float, count: int = 1000) -> np.ndarray:
    """The first ``share`` of the images is classified correctly."""
    return np.arange(count) < round(share * count)


OUTCOMES = {
    ("A", "standard"): [correct(0.9)],
    ("B", "standard"): [correct(0.8)],
    ("A", "PGD"): [correct(0.1)],
    ("B", "PGD"): [correct(0.5)],
}


def verdict(outcomes=OUTCOMES, **comparison):
    claim = Claim.parse({"claim": "c", **comparison}, "claims.0")
    return judge([claim], outcomes)[0]


@pytest.mark.parametrize(
    ("lhs", "relation", "rhs", "margin", "expected"),
    [
        (["A", "standard"], ">", ["B", "standard"], 0, "holds"),
        (["A", "standard"], "<", ["B", "standard"], 0, "does not hold"),
        (["B", "standard"], "<", ["A", "standard"], 0, "holds"),
        (["A", "standard"], ">", ["A", "standard"], 0, "within noise"),
        (["A", "standard"], ">", ["B", "standard"], 20, "does not hold"),
        (["B", "standard"], ">", ["A", "standard"], -20, "holds"),
        (["A", "standard"], ">", 85, 0, "holds"),
        (["A", "standard"], ">", 90, 0, "within noise"),
    ],
)
def test_verdict_follows_relation_and_margin(lhs, relation, rhs, margin, expected):
    assert verdict(lhs=lhs, relation=relation, rhs=rhs, margin=margin).verdict == expected


def test_numbers_are_percent_and_excess_counts_from_the_margin():
    finding = verdict(lhs=["A", "standard"], rhs=["B", "standard"], margin=4).findings[0]
    assert finding.lhs == pytest.approx(90)
    assert finding.rhs == pytest.approx(80)
    assert finding.excess == pytest.approx(6)
    assert finding.low < 6 < finding.high
    assert finding.statement == "A · standard is more than 4 points above B · standard"


def test_share_of_the_way_between_two_accuracies():
    way = {"from": ["A", "PGD"], "to": ["B", "PGD"], "share": 0.25}
    finding = verdict(lhs=15, relation="<", rhs=way).findings[0]
    assert finding.rhs == pytest.approx(20)
    assert finding.verdict == "holds"


def test_same_cell_on_both_ends_of_the_way_counts_once():
    side = Side.parse({"from": ["A", "x"], "to": ["A", "x"], "share": 0.3}, "p")
    assert side.weights == {("A", "x"): pytest.approx(1.0)}


def test_seeds_judge_by_the_spread_between_trainings():
    small = {
        ("A", "standard"): [correct(0.90), correct(0.91), correct(0.92)],
        ("B", "standard"): [correct(0.89), correct(0.90), correct(0.91)],
    }
    paired = verdict(small, lhs=["A", "standard"], rhs=["B", "standard"])
    assert paired.verdict == "holds"
    noisy = {**small, ("B", "standard"): [correct(0.95), correct(0.80), correct(0.88)]}
    assert verdict(noisy, lhs=["A", "standard"], rhs=["B", "standard"]).verdict == "within noise"


def test_one_share_of_one_seed_says_nothing_and_of_several_their_spread():
    comparison = {"lhs": ["A", "fell"], "relation": "<", "rhs": ["B", "fell"]}
    one = {("A", "fell"): [np.array([0.02])], ("B", "fell"): [np.array([0.1])]}
    finding = verdict(one, **comparison).findings[0]
    assert (finding.lhs, finding.rhs, finding.excess) == pytest.approx((2, 10, 8))
    assert finding.verdict == "within noise"
    three = {
        ("A", "fell"): [np.array([fall]) for fall in (0.02, 0.03, 0.02)],
        ("B", "fell"): [np.array([fall]) for fall in (0.1, 0.1, 0.11)],
    }
    assert verdict(three, **comparison).verdict == "holds"


def test_claim_holds_only_if_all_comparisons_do():
    good = {"lhs": ["A", "standard"], "rhs": ["B", "standard"]}
    bad = {"lhs": ["B", "standard"], "rhs": ["A", "standard"]}
    even = {"lhs": ["A", "standard"], "rhs": ["A", "standard"]}
    cases = [
        ([good, good], "holds"),
        ([good, bad, even], "does not hold"),
        ([good, even], "within noise"),
    ]
    for comparisons, expected in cases:
        assert verdict(all=comparisons).verdict == expected


def test_missing_numbers_are_said_to_be_missing():
    finding = verdict(lhs=["A", "standard"], rhs=["failed", "standard"])
    assert finding.verdict == "not measured"


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        ("text", "expected a mapping with the key 'claim'"),
        ({"claim": "c", "lhs": ["A", "x"], "rsh": 3}, "Did you mean 'rhs'"),
        ({"claim": "c", "lhs": ["A", "x"]}, "'rhs' is missing"),
        ({"claim": "c", "lhs": "A", "rhs": 3}, r"lhs: expected \[method, attack\]"),
        (
            {"claim": "c", "lhs": ["A", "x"], "rhs": {"from": ["A", "x"], "share": 0.5}},
            "rhs.to: expected",
        ),
        ({"claim": "c", "lhs": ["A", "x"], "rhs": {"form": 1}}, "Did you mean 'from'"),
        ({"claim": "c", "lhs": ["A", "x"], "rhs": 1, "relation": "=="}, "relation"),
        ({"claim": "c", "all": []}, "expected a list of comparisons"),
        ({"claim": "c", "all": [{"lhs": 1, "rhs": 2}], "margin": 1}, "unknown key 'margin'"),
        ({"claim": "c", "lhs": ["A", "x"], "rhs": 1, "margin": "wide"}, "margin"),
        ({"claim": "c", "lhs": "__import__('os').getcwd()", "rhs": 1}, "expected"),
    ],
)
def test_malformed_claims_say_where(specification, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Claim.parse(specification, "claims.7")
    assert str(caught.value).startswith("claims.7")


def test_several_columns_stand_for_their_mean():
    finding = verdict(lhs=["A", ["standard", "PGD"]], relation="<", rhs=["B", ["standard", "PGD"]])
    found = finding.findings[0]
    assert (found.lhs, found.rhs) == (pytest.approx(50), pytest.approx(65))
    # Per image: A has 1, 1/2 and 0 of two, B as well; the interval is Student's over the images' differences.
    differences = 50 * (correct(0.8) * 1.0 + correct(0.5)) - 50 * (
        correct(0.9) * 1.0 + correct(0.1)
    )
    half = 1.962 * differences.std(ddof=1) / 1000**0.5
    assert found.low == pytest.approx(15 - half, abs=0.01)
    assert found.statement == "A · mean of standard, PGD is below B · mean of standard, PGD"
    assert finding.claim.cells() == set(OUTCOMES)
    for wrong in ([], ["PGD", "PGD"]):
        with pytest.raises(ConfigError, match="expected different columns"):
            Side.parse(["A", wrong], "p")
