"""The analysis of transferred attacks: its matrix, its table, and what is told of gradients."""

import numpy as np
import pandas as pd
import pytest

from onmanifold.analysis.generalisation import success_rate
from onmanifold.evaluation import Evaluation
from onmanifold.evaluation.transfer import folder_name
from onmanifold.experiments.analyses.base import ANALYSES
from onmanifold.experiments.analyses.run import load_analysis, run_analysis
from onmanifold.experiments.analyses.transferring import WHITE_BOX
from onmanifold.foundation.errors import ConfigError

EXPERIMENT = {
    "name": "tiny",
    "seeds": [0, 1],
    "dataset": {"type": "fonts", "train": 200, "test": 60, "folder": "embedded"},
    "classifier": {"type": "mlp", "hidden": [16]},
    "threats": {
        "image": {"type": "image_ball", "radius": 0.05},
        "latent": {"type": "latent_ball", "radius": 0.1},
    },
    "training": {"epochs": 4, "batch_size": 20, "validation_fraction": 0},
    "methods": {
        "Normal": "normal",
        "AT": {"type": "adversarial", "attack": {"type": "fgsm", "threat": "image"}},
    },
    "attacks": {
        "FGSM": {"type": "fgsm", "threat": "image"},
        "OM-FGSM": {"type": "fgsm", "threat": "latent"},
    },
}


def analysis(experiment=EXPERIMENT, **settings):
    return {
        "name": "shown",
        "analysis": {"type": "transfer", **settings},
        "experiment": experiment,
    }


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    out = tmp_path_factory.mktemp("transfer")
    return out, run_analysis(load_analysis(analysis()), out, device="cpu")


def test_each_pair_has_the_rate_of_what_both_see_correctly(first):
    out, found = first
    pairs = found.tables["pairs"]
    assert len(pairs) == 2 * 4 * 4

    def ledger(source, target):
        folder = out / "transfer" / folder_name(source)
        return Evaluation.load(
            (folder if source == target else folder / "on" / folder_name(target)) / "ledger.parquet"
        )

    for row in pairs.itertuples():
        source = f"{row.source}, seed {row.source_seed}"
        target = f"{row.target}, seed {row.target_seed}"
        tried = ledger(source, target)
        both = ledger(source, source).correct() & ledger(target, target).correct()
        expected = success_rate(both, tried.correct(row.attack) & both)
        assert row.success_rate == pytest.approx(expected)


def test_the_summary_keeps_white_boxes_apart(first):
    pairs, rates = first[1].tables["pairs"], first[1].tables["rates"]
    own = (pairs.source == pairs.target) & (pairs.source_seed == pairs.target_seed)
    for row in rates.itertuples():
        made = own if row.source == WHITE_BOX else (pairs.source == row.source) & ~own
        chosen = pairs[(pairs.attack == row.attack) & (pairs.target == row.target) & made]
        # Of one method: two seeds; between methods: two by two.
        assert row.pairs == (2 if row.source in (WHITE_BOX, row.target) else 4)
        assert row.success_rate == pytest.approx(chosen.success_rate.mean())
        assert (row.lowest, row.highest) == pytest.approx(
            (chosen.success_rate.min(), chosen.success_rate.max())
        )
    assert len(rates) == 2 * (2 + 4)


def test_statement_and_page(first):
    out, found = first
    assert [statement.text.split(",")[0] for statement in found.statements] == [
        "Under FGSM",
        "Under OM-FGSM",
    ]
    assert "Over 12 pairs" in found.statements[0].numbers
    assert (out / "figures" / "transfer.svg").is_file()
    pairs = found.tables["pairs"].query("attack == 'FGSM'")
    own = pairs[(pairs.source == pairs.target) & (pairs.source_seed == pairs.target_seed)]
    lead = min(
        row.accuracy - own[(own.target == row.target) & (own.target_seed == row.target_seed)].accuracy.item()
        for row in pairs.itertuples()
        if (row.source, row.source_seed) != (row.target, row.target_seed)
    )  # fmt: skip
    assert f"itself: {100 * lead:.1f} points" in found.statements[0].numbers


def test_the_second_time_nothing_is_attacked(first, monkeypatch):
    out, found = first
    monkeypatch.setattr(
        "onmanifold.attacks.base.Attack.__call__", lambda *_, **__: pytest.fail("attacked")
    )
    again = run_analysis(load_analysis(analysis()), out, device="cpu")
    pd.testing.assert_frame_equal(found.tables["pairs"], again.tables["pairs"])


def test_a_choice_of_methods_seeds_and_attacks_of_what_the_target_sees(tmp_path):
    chosen = analysis(methods=["Normal", "AT"], seeds=[1], attacks=["FGSM"], base="target")
    found = run_analysis(load_analysis(chosen), tmp_path, device="cpu")
    pairs = found.tables["pairs"]
    assert len(pairs) == 4
    assert pairs.success_rate.to_numpy() == pytest.approx(
        1 - (pairs.accuracy / pairs.clean_accuracy).to_numpy()
    )
    # A classifier of another seed is not there: nothing transfers within a method.
    assert not (
        (found.tables["rates"].source == "AT") & (found.tables["rates"].target == "AT")
    ).any()
    assert np.isfinite(found.tables["rates"].success_rate).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base": "source"}, "base"),
        ({"attacks": ["PGD"]}, "analysis: attacks: unknown attack 'PGD'"),
        ({"methods": ["X"]}, "Unknown method 'X'"),
        (
            {"seeds": [0, 5]},
            r"analysis: expected seeds of the experiment, \[0, 1\], found 5",
        ),
        ({"seeds": []}, "seeds: expected at least one, found none"),
        ({"methods": ["AT"], "seeds": [0]}, "expected two or more classifiers, found one"),
    ],
)
def test_wrong_settings(first, settings, message):
    with pytest.raises(ConfigError, match=message):
        run_analysis(load_analysis(analysis(**settings)), first[0], device="cpu")


def test_it_needs_an_experiment(tmp_path):
    assert ANALYSES.get("transfer").needs_experiment
    with pytest.raises(ConfigError, match="looks at the classifiers of an experiment"):
        run_analysis(load_analysis("transfer"), tmp_path)
