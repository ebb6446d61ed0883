"""Whole experiments, tiny: results on disk, nothing repeated, kill -9 at any moment."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from onmanifold.experiments import summary
from onmanifold.experiments.runner import report_only, run
from onmanifold.experiments.spec import load_experiment
from onmanifold.foundation.files import write_atomically

TINY = {
    "name": "tiny",
    "title": "Tiny",
    "seeds": [0, 1],
    "dataset": {"type": "fonts", "train": 100, "test": 30, "folder": "embedded"},
    "classifier": {"type": "mlp", "hidden": [16]},
    "threats": {
        "image": {"type": "image_ball", "norm": "linf", "radius": 0.1},
        "latent": {"type": "latent_ball", "norm": "linf", "radius": 0.3},
    },
    "training": {"epochs": 2, "batch_size": 20, "validation_fraction": 0.2},
    "methods": {
        "Normal": "normal",
        "DMAT": {
            "type": "dual_manifold",
            "image_attack": {"type": "pgd", "threat": "image", "steps": 2},
            "latent_attack": {"type": "pgd", "threat": "latent", "steps": 2},
        },
    },
    "attacks": {
        "PGD-3": {"type": "pgd", "threat": "image", "steps": 3},
        "OM-FGSM": {"type": "fgsm", "threat": "latent"},
    },
    "evaluation": {"batch_size": 10},
    "claims": [{"claim": "DMAT helps", "lhs": ["DMAT", "PGD-3"], "rhs": ["Normal", "PGD-3"]}],
}


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    """The results of an undisturbed run."""
    out = tmp_path_factory.mktemp("first")
    results = run(load_experiment(TINY), out, device="cpu")
    assert not results.failures
    return out


def told(content, out, *overrides) -> list[str]:
    lines: list[str] = []
    run(load_experiment(content, overrides), out, device="cpu", say=lines.append)
    return lines


def test_results_on_disk(first):
    rows = list(csv.reader((first / "table.csv").open()))
    assert rows[0] == ["method", "standard", "PGD-3", "OM-FGSM", "worst case"]
    assert [row[0] for row in rows[1:]] == ["Normal", "DMAT"]
    for row in rows[1:]:
        standard, *attacked, worst = (float(value) for value in row[1:])
        assert 0 <= worst <= min(attacked) <= max(attacked) <= standard <= 100
    page = (first / "report.html").read_text()
    assert "DMAT helps" in page
    assert "http://" not in page
    assert {path.suffix for path in (first / "figures").iterdir()} == {".svg", ".png"}


def test_robust_overfitting_is_a_column_for_claims(tmp_path, first):
    claims = [{"claim": "falls", "lhs": ["DMAT", "robust overfitting"], "relation": "<", "rhs": 3}]
    experiment = load_experiment({**TINY, "claims": claims})
    results = run(experiment, tmp_path, store=first / "store", device="cpu")
    falls = []
    for file in (first / "store" / "training").glob("dmat-*/result.json"):
        robust = [e["validation_robust_accuracy"] for e in json.loads(file.read_text())["history"]]
        falls.append(100 * (max(robust) - robust[-1]))
    assert len(falls) == 2
    assert results.judgements[0].findings[0].lhs == pytest.approx(sum(falls) / 2)


def test_a_claim_is_judged_by_the_seeds_of_its_own_methods(tmp_path, first):
    store = tmp_path / "store"
    shutil.copytree(first / "store", store)
    # A report needs no classifiers, but for pictures.
    for file in (
        *store.glob("evaluation/dmat-s1-*/result.json"),
        *store.rglob("best.safetensors"),
    ):
        file.unlink()
    alone = {"claim": "c", "lhs": ["Normal", "standard"], "relation": ">", "rhs": 0}
    content = {**TINY, "claims": [*TINY["claims"], alone]}
    write_atomically(tmp_path / "experiment.yaml", yaml.safe_dump(content).encode())
    results = report_only(tmp_path, store)
    assert "OM-FGSM" in (tmp_path / "report.html").read_text()
    assert not list(tmp_path.glob("figures/examples*"))
    # DMAT has finished one seed, normal training both.
    rows, attack = results.table.rows, results.table.columns.index("PGD-3")
    with_dmat, without = (judgement.findings[0] for judgement in results.judgements)
    assert with_dmat.rhs == pytest.approx(rows["Normal"][attack].values[0])
    assert without.lhs == pytest.approx(sum(rows["Normal"][0].values) / 2)


def test_pictures_show_a_few_of_many_methods(tmp_path, first, monkeypatch):
    monkeypatch.setattr(summary, "_SHOWN_METHODS", 1)
    run(load_experiment(TINY), tmp_path, store=first / "store", device="cpu")
    assert "The first 1 of 2 methods." in (tmp_path / "report.html").read_text()
    assert "of 2 methods" not in (first / "report.html").read_text()


def test_ledger_has_a_row_per_method_seed_sample_and_attack(first):
    ledger = pq.read_table(first / "ledger.parquet")
    assert ledger.num_rows == 2 * 2 * 30 * 2
    keys = ledger.select(["method", "seed", "sample", "attack"]).to_pandas()
    assert not keys.duplicated().any()
    table = {row["method"]: row for row in csv.DictReader((first / "table.csv").open())}
    frame = ledger.to_pandas()
    frame["right"] = (frame.clean_prediction == frame.label) & (
        frame.adversarial_prediction == frame.label
    )
    accuracy = 100 * frame.groupby(["method", "attack"]).right.mean()
    for (method, attack), value in accuracy.items():
        assert float(table[method][attack]) == pytest.approx(value, abs=0.006)


def test_second_time_nothing_is_repeated_and_the_table_is_the_same(first):
    before = (first / "table.csv").read_bytes()
    lines = told(TINY, first)
    assert sum("trained before" in line for line in lines) == 4
    assert sum("evaluated before" in line for line in lines) == 4
    assert not any("trained in" in line or "evaluated in" in line for line in lines)
    assert (first / "table.csv").read_bytes() == before


def shards(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.rglob("shards/*/*.parquet")}


def test_an_edited_attack_is_evaluated_anew_and_nothing_else(first, tmp_path):
    store = first / "store"
    before = shards(store)
    experiment = load_experiment(TINY, ["attacks.PGD-3.steps=4"])
    lines: list[str] = []
    run(experiment, tmp_path, store=store, device="cpu", say=lines.append)
    assert sum("trained before" in line for line in lines) == 4
    assert sum("evaluated in" in line for line in lines) == 4
    after = shards(store)
    assert all(after[path] == written for path, written in before.items())
    # Three batches of the edited attack for each of the four classifiers.
    assert len(after) - len(before) == 3 * 4


def test_an_edited_method_trains_only_that_method(first, tmp_path):
    lines: list[str] = []
    experiment = load_experiment(TINY, ["methods.DMAT.image_weight=0.7"])
    run(experiment, tmp_path, store=first / "store", device="cpu", say=lines.append)
    assert sum("Normal" in line and "trained before" in line for line in lines) == 2
    assert sum("DMAT" in line and "trained in" in line for line in lines) == 2


def test_threads_and_names_are_no_part_of_the_key(first, tmp_path):
    lines: list[str] = []
    experiment = load_experiment(TINY, ["training.threads=1", "title=Other", "name=other"])
    run(experiment, tmp_path, store=first / "store", device="cpu", say=lines.append)
    assert sum("trained before" in line for line in lines) == 4


def test_report_of_what_is_finished_so_far(first, tmp_path):
    content = deepcopy(TINY) | {"seeds": [0]}
    content["methods"] = {
        "Normal": "normal",
        "DMAT": {**TINY["methods"]["DMAT"], "image_weight": 0.6},
    }
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    results = report_only(tmp_path, store=first / "store")
    assert [(run.method, run.error) for run in results.runs] == [
        ("Normal", ""),
        ("DMAT", "not finished"),
    ]
    assert "DMAT,,,," in (tmp_path / "table.csv").read_text()
    assert results.judgements[0].verdict == "not measured"


def start(file: Path, out: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "onmanifold.cli",
        "run",
        str(file),
        "--out",
        str(out),
        "--device",
        "cpu",
    ]
    command += options
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no kill -9 here")
def test_killed_runs_end_with_the_same_table(first, tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY, sort_keys=False))
    out = tmp_path / "out"
    # In the middle of a training, then in the middle of an evaluation.
    for sign in (
        "store/training/*/last.ckpt",
        "store/training/*/evaluation/shards/*/000000.parquet",
    ):
        process = start(file, out)
        seen = len(list(out.glob(sign)))
        deadline = time.monotonic() + 60
        while len(list(out.glob(sign))) == seen and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert start(file, out).wait(120) == 0
    for name in ("table.csv", "table.md"):
        assert (out / name).read_bytes() == (first / name).read_bytes()
    assert pq.read_table(out / "ledger.parquet").equals(pq.read_table(first / "ledger.parquet"))


def test_processes_share_the_work(first, tmp_path):
    lines: list[str] = []
    results = run(load_experiment(TINY), tmp_path, device="cpu", jobs=2, say=lines.append)
    assert not results.failures
    assert (tmp_path / "table.csv").read_bytes() == (first / "table.csv").read_bytes()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_helpers_end_with_a_killed_process(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(
        yaml.safe_dump(TINY | {"training": {**TINY["training"], "epochs": 500}}, sort_keys=False)
    )
    process = start(file, tmp_path / "out", "--jobs", "2")

    def helpers() -> list[Path]:
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = entry.read_bytes().split(b"\0")
            except OSError:
                continue
            if (
                b"onmanifold.experiments.worker" in words
                and str(tmp_path / "out").encode() in words
            ):
                found.append(entry)
        return found

    def wait_until(condition) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    wait_until(helpers)
    process.kill()
    process.wait()
    wait_until(lambda: not helpers())
