"""Sweeps over training-set sizes: each training once, kill -9 at any moment, and what is judged from them."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from onmanifold.analysis.generalisation import POOLED, Relation, correlate, relate
from onmanifold.evaluation import Evaluation
from onmanifold.experiments.analyses.base import ANALYSES, Findings, Workplace
from onmanifold.experiments.analyses.generalisation_claims import (
    essentially_generalisation,
    not_contradicting,
)
from onmanifold.experiments.analyses.run import load_analysis, run_analysis
from onmanifold.experiments.runner import open_session, run_all
from onmanifold.experiments.spec import load_experiment
from onmanifold.foundation.errors import ConfigError, OnManifoldError

EXPERIMENT = {
    "name": "tiny",
    "seeds": [0, 1],
    "dataset": {"type": "fonts", "train": 60, "test": 40, "folder": "embedded"},
    "classifier": {"type": "mlp", "hidden": [16]},
    "threats": {
        "image": {"type": "image_ball", "radius": 0.05},
        "latent": {"type": "latent_ball", "radius": 0.1},
    },
    "training": {"epochs": 6, "batch_size": 20, "validation_fraction": 0},
    "methods": {
        "Normal": "normal",
        "AT": {"type": "adversarial", "attack": {"type": "fgsm", "threat": "image"}},
    },
    "attacks": {
        "FGSM": {"type": "fgsm", "threat": "image"},
        "OM-FGSM": {"type": "fgsm", "threat": "latent"},
    },
    # A claim of the experiment as it is, which the sweep leaves alone.
    "claims": [{"claim": "AT helps", "lhs": ["AT", "FGSM"], "rhs": ["Normal", "FGSM"]}],
}
SWEEP = {"type": "generalisation", "sizes": [60, 120], "steps": 30}


def content(analysis=(), **changes):
    return {
        "name": "sweep",
        "analysis": {**SWEEP, **dict(analysis)},
        "experiment": {**EXPERIMENT, **changes},
    }


def swept(out: Path, analysis=(), **changes) -> tuple[list[str], Findings]:
    """What is told and found; without writing figures and a page, which takes most of the time."""
    lines: list[str] = []
    spec = content(analysis, **changes)
    experiment = load_experiment(spec["experiment"])
    session = open_session(experiment, out / "experiment", device="cpu", say=lines.append)
    place = Workplace(out, "cpu", lines.append, session=session)
    return lines, ANALYSES.build(spec["analysis"]).run(place)


def told(out: Path, analysis=(), **changes) -> tuple[list[str], pd.DataFrame]:
    """What is told and measured."""
    lines, found = swept(out, analysis, **changes)
    return lines, found.tables["trainings"]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """An undisturbed sweep."""
    out = tmp_path_factory.mktemp("first")
    lines: list[str] = []
    spec = load_analysis(content())
    found = run_analysis(spec, out, device="cpu", say=lines.append)
    assert sum("trained in" in line for line in lines) == 8
    return out, found.tables["trainings"]


def test_a_row_for_each_training_with_the_ledgers_numbers(first):
    out, trainings = first
    assert trainings.groupby(["method", "size", "seed"]).size().tolist() == [1] * 8
    # At least 30 steps of 20 images: 60 images need 10 epochs; 120 need 5, and 6 are the experiment's own.
    assert dict(zip(trainings["size"], trainings.epochs, strict=True)) == {60: 10, 120: 6}
    ledgers = [
        Evaluation.load(path) for path in (out / "experiment/store/evaluation").glob("*/*.parquet")
    ]
    assert len(ledgers) == 8
    for column, measured in (
        ("test_error", [1 - ledger.accuracy() for ledger in ledgers]),
        ("FGSM", [ledger.success_rate("FGSM") for ledger in ledgers]),
        ("OM-FGSM", [ledger.success_rate("OM-FGSM") for ledger in ledgers]),
    ):
        assert sorted(trainings[column]) == pytest.approx(sorted(measured))


def test_tables_statements_and_figures(first):
    out, trainings = first
    table = pd.read_csv(out / "correlations.csv")
    assert table.attack.drop_duplicates().tolist() == ["OM-FGSM", "FGSM"]
    assert table.method.drop_duplicates().tolist() == ["Normal", "AT", "all methods"]
    row = table[(table.attack == "FGSM") & (table.method == "all methods")].iloc[0]
    expected = correlate(trainings.test_error, trainings.FGSM)
    assert (row.pearson, row.fisher_low, row.trainings) == pytest.approx(
        (expected.coefficient, expected.low, 8)
    )
    statements = json.loads((out / "findings.json").read_text())["statements"]
    assert [entry["source"].split(",")[1] for entry in statements] == [
        " section 3.4",
        " section 3.5",
    ]
    assert {path.stem for path in (out / "figures").glob("*.svg")} == {
        "by_size",
        "on_manifold",
        "regular",
    }


def test_the_second_time_nothing_is_trained_and_all_is_the_same(first):
    out, trainings = first
    lines, again = told(out, {"jobs": 2})
    assert not any("trained in" in line or "evaluated in" in line for line in lines)
    pd.testing.assert_frame_equal(trainings, again)


def test_one_size_more_trains_that_alone_and_equal_runs_are_shared(first):
    lines, trainings = told(first[0], {"sizes": [60, 80], "seeds": [1], "methods": ["Normal"]})
    assert sum("trained in" in line for line in lines) == 1
    assert sum("trained before" in line for line in lines) == 1
    kept = first[1].query("size == 60 and seed == 1 and method == 'Normal'")
    assert trainings.iloc[0].FGSM == kept.iloc[0].FGSM


def test_killed_at_any_moment_it_goes_on_also_with_a_helper(first, tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(json.dumps(content()))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "onmanifold.cli", "analyse", str(file), "--out", str(out)]
    nowhere = subprocess.DEVNULL
    process = subprocess.Popen([*command, "--device", "cpu"], stdout=nowhere, stderr=nowhere)
    store = out / "experiment/store/training"
    deadline = time.monotonic() + 120
    while len(list(store.glob("*/result.json"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = len(list(store.glob("*/result.json")))
    lines, trainings = told(out, {"jobs": 2})
    assert sum("trained in" in line for line in lines) <= 8 - done
    pd.testing.assert_frame_equal(trainings, first[1])


def test_none_waits_for_another_process_while_there_is_work_in_any_part(tmp_path):
    sessions, waited = [], []

    def told(line: str) -> None:
        if "Waiting for another process" in line:
            waited.append([job.evaluation.finished for one in sessions for job in one.jobs()])
            other.close()

    for size in (40, 60):
        experiment = load_experiment(EXPERIMENT, [f"dataset.train={size}", "training.epochs=1"])
        sessions.append(
            open_session(experiment, tmp_path / str(size), store=tmp_path, device="cpu", say=told)
        )
    with ExitStack() as other:
        # Another process, here another open file, holds the first run of the first part.
        assert other.enter_context(sessions[0].jobs()[0].training.locked())
        jobs = run_all(sessions)
    assert waited == [[False] + [True] * 7]
    assert all(job.evaluation.finished for own in jobs for job in own)


def test_networks_other_attacks_and_more_images_for_the_test_error(tmp_path):
    changes = {
        "sizes": [60, 120],
        "seeds": [0],
        "classifiers": {"wide": {"type": "mlp", "hidden": [12]}, "deep": "mlp"},
        "attacks": {
            "l2": {"type": "fgsm", "threat": {"type": "image_ball", "norm": "l2", "radius": 1}}
        },
        "error_images": 50,
        "steps": 1,
    }
    _, trainings = told(tmp_path, changes)
    assert trainings.classifier.unique().tolist() == ["wide", "deep"]
    assert "l2" in trainings
    assert "FGSM" not in trainings
    assert (trainings.test_error * 50).map(lambda count: math.isclose(count, round(count))).all()
    folders = list((tmp_path / "experiment/store/training").glob("*/test error/ledger.parquet"))
    assert {len(Evaluation.load(path)) for path in folders} == {50}


def test_images_of_a_training_apart_are_shown_to_all(tmp_path):
    source = {"method": "Normal", "size": 80, "seed": 7}
    lines, trainings = told(tmp_path, {"sizes": [60, 120], "held_out": source}, seeds=[0])
    assert any("held out" in line and "seed 7: trained in" in line for line in lines)
    store = tmp_path / "experiment/store/training"
    (made,) = [Evaluation.load(path) for path in store.glob("*/held out/ledger.parquet")]
    rates = []
    for path in store.glob("*/transferred/ledger.parquet"):
        tried = Evaluation.load(path)
        both = made.correct() & tried.correct()
        rates.append((both & ~tried.correct("FGSM")).sum() / both.sum())
    assert sorted(trainings["FGSM, transferred"]) == pytest.approx(sorted(rates))
    lines, _ = told(tmp_path, {"sizes": [60, 120], "held_out": source}, seeds=[0])
    assert not any("trained in" in line for line in lines)


def test_a_training_that_fails_is_told_and_left_out(tmp_path):
    attack = {"type": "pgd", "threat": "image", "steps": 1, "start": "uniform"}
    broken = {"type": "trades", "attack": attack, "weight": 1e9}
    methods = {"Normal": "normal", "Broken": broken}
    training = {**EXPERIMENT["training"], "loss_limit": 100.0}
    lines, found = swept(tmp_path, {"seeds": [0]}, methods=methods, training=training, claims=[])
    trainings = found.tables["trainings"]
    for statement in found.statements:
        assert "Broken: no trainings with numbers (not measured)" in statement.numbers
    assert any("Broken, seed 0 failed: DivergenceError" in line for line in lines)
    assert trainings[trainings.method == "Broken"].error.str.contains("DivergenceError").all()
    assert trainings[trainings.method == "Normal"].FGSM.notna().all()
    with pytest.raises(OnManifoldError, match="All trainings failed; the first: DivergenceError"):
        told(
            tmp_path,
            {"seeds": [0], "methods": ["Broken"]},
            methods=methods,
            training=training,
            claims=[],
        )


@pytest.mark.parametrize(
    ("analysis", "changes", "message"),
    [
        ({"sizes": [60]}, {}, "sizes: expected two or more different numbers"),
        ({"sizes": [60, 60]}, {}, "sizes: expected two or more different numbers"),
        ({"sizes": [0, 60]}, {}, "sizes: expected two or more different numbers"),
        ({"classifiers": {}}, {}, "classifiers: expected at least one"),
        ({"classifiers": {"a b": "mlp", "A-b": "mlp"}}, {}, "classifiers: .* found 'A-b' beside 'a b'"),
        ({"classifiers": {"Held out": "mlp"}}, {}, "found 'Held out' beside 'held out'"),
        ({"steps": 0}, {}, "steps: expected at least 1"),
        ({"tolerance": -1}, {}, "tolerance: expected a number >= 0"),
        ({"confidence": 1}, {}, r"confidence: expected a number in \(0, 1\)"),
        ({"size": [60, 120]}, {}, "sizes"),
        ({"methods": ["AD"]}, {}, "analysis: methods: unknown method 'AD'. Did you mean 'AT'"),
        ({"regular": ["FGS"]}, {}, "analysis: regular: unknown attack 'FGS'. Did you mean 'FGSM'"),
        ({"held_out": {"method": "X"}}, {}, "analysis: held_out: unknown method 'X'"),
        ({"held_out": {"method": "AT", "seed": 1}}, {}, r"held_out: seed: expected none of \[0, 1\]"),
        ({"on_manifold": [], "regular": []}, {}, "expected an attack in an image ball or a latent ball"),
        ({"attacks": {"size": {"type": "fgsm", "threat": "image"}}}, {}, "cannot be an attack's name here"),
    ],
)  # fmt: skip
def test_wrong_settings(tmp_path, analysis, changes, message):
    with pytest.raises(ConfigError, match=message):
        told(tmp_path, analysis, **changes)


def test_more_error_images_than_there_are_are_noticed_before_any_training(tmp_path):
    shades = np.random.default_rng(0).integers(0, 255, (70, 8, 8), dtype=np.uint8)
    for number, pixels in enumerate(shades):
        folder = tmp_path / "images" / ("test" if number < 10 else "train") / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    dataset = {"type": "imagefolder", "folder": str(tmp_path / "images"), "grey": True}
    changes = {"dataset": {**dataset, "train": 60, "test": 6}, "methods": {"Normal": "normal"}}
    attacks = {
        "threats": {"image": EXPERIMENT["threats"]["image"]},
        "attacks": {"FGSM": {"type": "fgsm", "threat": "image"}},
        "claims": [],
    }
    settings = {"sizes": [40, 60], "error_images": 11}
    message = "analysis: error_images: dataset.test: imagefolder has 10 images, 11 are asked for"
    with pytest.raises(ConfigError, match=message):
        told(tmp_path, settings, **changes, **attacks)
    assert not list(tmp_path.glob("experiment/store/training/*"))


PLACES = [(100, 0.4), (100, 0.42), (200, 0.3), (200, 0.28), (400, 0.1), (400, 0.12)]


def relations(slopes: dict[str, float], noise: float = 0.01) -> dict[str, Relation]:
    rows = [
        {
            "method": name,
            "size": size,
            "test_error": error,
            "PGD": 0.5 + slope * error + sign * noise,
        }
        for name, slope in slopes.items()
        for (size, error), sign in zip(PLACES, [1, -1, 1, -1, 1, -1], strict=True)
    ]
    return relate(pd.DataFrame(rows), "PGD", resamples=200)


@pytest.mark.parametrize(
    ("slopes", "noise", "third", "fourth"),
    [
        ({"Normal": 0.8, "AT": 0.5}, 0.01, "holds", "holds"),
        ({"Normal": 0.8, "AT": -0.5}, 0.01, "does not hold", "does not hold"),
        ({"Normal": 0.8, "AT": 0.0}, 0.2, "within noise", "within noise"),
        # A constant rate says nothing, neither of a correlation nor of what rises.
        ({"Normal": 0.0}, 0.0, "not measured", "not measured"),
        # One method that is not measured keeps a claim of all from holding, but does not save it.
        ({"Normal": 0.0, "AT": 0.8}, 0.0, "not measured", "not measured"),
        ({"Normal": 0.0, "AT": -0.5}, 0.0, "does not hold", "does not hold"),
        # It rises by less than is tolerated.
        ({"Normal": -0.05}, 0.0, "does not hold", "holds"),
    ],
)
def test_verdicts(slopes, noise, third, fourth):
    found = relations(slopes, noise)
    assert essentially_generalisation("PGD", found).verdict == third
    assert not_contradicting("PGD", found, 0.1).verdict == fourth


def test_the_pooled_relation_does_not_decide():
    falling, rising = relations({"Normal": -0.5})["Normal"], relations({"X": 0.8})["X"]
    found = {"Normal": falling, POOLED: rising}
    assert essentially_generalisation("PGD", found).verdict == "does not hold"
    assert not_contradicting("PGD", found, 0.1).verdict == "does not hold"
    assert essentially_generalisation("PGD", {"Normal": rising, POOLED: falling}).verdict == "holds"


def of_rates(rates: list[float]) -> dict[str, Relation]:
    rows = [
        {"method": "Normal", "size": size, "test_error": error, "PGD": rate}
        for (size, error), rate in zip(PLACES, rates, strict=False)
    ]
    return relate(pd.DataFrame(rows), "PGD", resamples=200)


@pytest.mark.parametrize(
    ("rates", "reason"),
    [
        ([1.0] * 6, "always 100 % fooled, at the ceiling (not measured)"),
        ([0.99, 1.0, 0.995, 0.995, 1.0, 1.0], "99 to 100 % fooled, all at the ceiling (not measured)"),
        ([0.5] * 6, "always 50 % fooled (not measured)"),
        ([0.0] * 6, "always 0 % fooled (not measured)"),
        ([0.5, 0.6], "2 trainings with numbers, too few (not measured)"),
    ],
)  # fmt: skip
def test_rates_that_could_not_rise_measure_nothing_and_say_why(rates, reason):
    statement = not_contradicting("PGD", of_rates(rates), 0.1)
    assert statement.verdict == "not measured"
    assert f"Normal: {reason}" in statement.numbers


def test_rates_that_reach_the_ceiling_from_below_are_measured():
    rising = not_contradicting("PGD", of_rates([0.5, 0.52, 0.7, 0.69, 0.98, 1.0]), 0.1)
    assert rising.verdict == "does not hold"


def test_a_method_whose_trainings_failed_is_not_left_out_of_a_claim_of_all():
    found = relations({"Normal": 0.8})
    for statement in (
        essentially_generalisation("PGD", found, ["Normal", "AT"]),
        not_contradicting("PGD", found, 0.1, ["Normal", "AT"]),
    ):
        assert statement.verdict == "not measured"
        assert "AT: no trainings with numbers" in statement.numbers
