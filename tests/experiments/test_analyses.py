"""An analysis from its file to tables, figures and a page."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from onmanifold.experiments.analyses.base import ANALYSES, Findings, Statement
from onmanifold.experiments.analyses.run import load_analysis, run_analysis
from onmanifold.experiments.spec import read_yaml
from onmanifold.foundation.errors import ConfigError, DataError

TINY = {
    "name": "tiny",
    "dataset": {"type": "fonts", "train": 60, "test": 10, "folder": "embedded"},
    "classifier": {"type": "mlp", "hidden": [8]},
    "training": {"epochs": 2, "batch_size": 20, "validation_fraction": 0.2},
    "methods": {"Normal": "normal"},
    "attacks": {"FGSM": {"type": "fgsm", "threat": {"type": "image_ball", "radius": 0.1}}},
}
FILES = sorted((Path(__file__).parents[2] / "experiments" / "analyses").rglob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_file_is_an_analysis(path):
    spec = load_analysis(path)
    analysis = ANALYSES.build(spec.analysis)
    assert (spec.experiment is not None) >= analysis.needs_experiment
    if isinstance(spec.experiment, str):
        assert "methods" in read_yaml(Path(spec.experiment))


def test_curves_of_an_experiment(tmp_path):
    spec = load_analysis({"name": "c", "analysis": "training_curves", "experiment": TINY})
    found = run_analysis(spec, tmp_path)
    table = pd.read_csv(tmp_path / "epochs.csv")
    assert table.method.tolist() == ["Normal"] * 2
    assert table.train_loss.tolist() == pytest.approx(found.tables["epochs"].train_loss.tolist())
    assert {file.suffix for file in (tmp_path / "figures").iterdir()} == {".svg", ".png"}
    page = (tmp_path / "analysis.html").read_text()
    assert "train_loss" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert json.loads((tmp_path / "findings.json").read_text())["figures"]["curves"]["title"]


def test_statements_stand_on_the_page(tmp_path, monkeypatch):
    spec = load_analysis({"name": "c", "analysis": "training_curves", "experiment": TINY})
    statement = Statement("Two < three", "2 against 3", "does not hold", "Euclid")
    monkeypatch.setattr(
        ANALYSES.get("training_curves"), "run", lambda self, place: Findings({}, {}, [statement])
    )
    run_analysis(spec, tmp_path)
    page = (tmp_path / "analysis.html").read_text()
    assert "Two &lt; three" in page
    assert 'class="verdict not"' in page
    assert json.loads((tmp_path / "findings.json").read_text())["statements"][0]["source"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("training_curve", "neither a YAML file nor an analysis. Did you mean 'training_curves'"),
        ({"name": "a/b", "analysis": "training_curves"}, "name: expected a folder's name"),
        ({"name": "a", "analysis": "x", "methods": 1}, "methods"),
    ],
)
def test_wrong_files(source, message):
    with pytest.raises(ConfigError, match=message):
        load_analysis(source)


def test_an_analysis_of_classifiers_wants_an_experiment(tmp_path):
    with pytest.raises(ConfigError, match="looks at the classifiers of an experiment"):
        run_analysis(load_analysis("training_curves"), tmp_path)


def test_the_command(tmp_path):
    path = tmp_path / "curves.yaml"
    path.write_text(json.dumps({"name": "c", "analysis": "training_curves", "experiment": TINY}))
    command = [sys.executable, "-m", "onmanifold.cli", "analyse", str(path)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert "analysis.html" in done.stdout
    assert "Normal" in done.stdout


def test_a_file_where_the_results_should_go_is_met_before_the_work(tmp_path, monkeypatch):
    place = tmp_path / "file"
    place.write_text("mine")
    spec = load_analysis({"name": "c", "analysis": "training_curves", "experiment": TINY})
    monkeypatch.setattr(ANALYSES.get("training_curves"), "run", lambda self, place: 1 / 0)
    with pytest.raises(DataError, match="is a file; the results need a folder"):
        run_analysis(spec, place)
    assert place.read_text() == "mine"
