"""The analyses that show images: maps, levels, snapshots, traversals; each in small, from file to page."""

import json

import numpy as np
import pandas as pd
import pytest

from onmanifold.attacks import PGD
from onmanifold.experiments.analyses.activation_maps import OTHER_IMAGE
from onmanifold.experiments.analyses.run import load_analysis, run_analysis
from onmanifold.experiments.runner import run
from onmanifold.experiments.spec import load_experiment
from onmanifold.foundation.errors import ConfigError

IMAGE = {"type": "image_ball", "radius": 0.1}
EXPERIMENT = {
    "name": "tiny",
    "dataset": {"type": "fonts", "train": 60, "test": 12, "folder": "embedded"},
    "classifier": {"type": "conv_net", "channels": [4]},
    "training": {
        "epochs": 3,
        "batch_size": 20,
        "validation_fraction": 0.2,
        "snapshot_epochs": 2,
    },
    "methods": {
        "Normal": "normal",
        "AT": {"type": "adversarial", "attack": {"type": "pgd", "threat": IMAGE, "steps": 1}},
    },
    "attacks": {
        "PGD": {"type": "pgd", "threat": IMAGE, "steps": 2},
        "OM-PGD": {"type": "pgd", "threat": {"type": "latent_ball", "radius": 0.3}, "steps": 2},
    },
    "evaluation": {"batch_size": 5},
}
GLOW = {"type": "glow", "image_shape": [1, 28, 28], "levels": 2, "steps": 1, "width": 4}


def analysed(out, analysis, experiment=EXPERIMENT):
    return run_analysis(
        load_analysis({"name": "a", "analysis": analysis, "experiment": experiment}), out
    )


def test_activation_maps(tmp_path):
    settings = {"type": "activation_maps", "attacks": ["PGD"], "shown": 2, "foreground": 0.1}
    found = analysed(tmp_path, settings | {"batch_size": 7})
    movement, samples = found.tables["movement"], found.tables["samples"]
    assert movement.attack.tolist() == ["standard", "PGD", OTHER_IMAGE] * 2
    assert (movement.images == 12).all()
    clean = samples[samples.attack == "standard"]
    # A map that says something is the same as itself, and the object has a share of it.
    np.testing.assert_allclose(clean.cosine.dropna(), 1)
    assert clean.on_object.dropna().between(0, 1).all()
    assert clean.object_area.between(0.01, 0.99).all()
    attacked = samples[(samples.method == "AT") & (samples.attack == "PGD")]
    row = movement[(movement.method == "AT") & (movement.attack == "PGD")].iloc[0]
    assert row.cosine == pytest.approx(attacked.cosine.mean())
    assert row.accuracy == pytest.approx(attacked.right.mean())
    assert {path.name for path in (tmp_path / "figures").glob("*.png")} == {
        "maps.png",
        "movement.png",
    }
    assert [statement.source.split(",")[0] for statement in found.statements] == ["IJSAT"] * 2
    again = analysed(tmp_path, settings | {"batch_size": 100}).tables["samples"]
    columns = ["cosine", "rank", "on_object"]
    kept = samples.sort_values(["method", "attack", "sample"])[columns].to_numpy(float)
    other = again.sort_values(["method", "attack", "sample"])[columns].to_numpy(float)
    np.testing.assert_allclose(kept, other, atol=1e-4)


def test_over_several_seeds_intervals_are_over_seeds(tmp_path):
    experiment = EXPERIMENT | {"seeds": [0, 1]}
    found = analysed(tmp_path, {"type": "activation_maps", "attacks": ["PGD"]}, experiment)
    samples = found.tables["samples"]
    part = samples[(samples.method == "Normal") & (samples.attack == "PGD")]
    means = part.groupby("seed").cosine.mean()
    row = found.tables["movement"].query("method == 'Normal' and attack == 'PGD'").iloc[0]
    assert row.cosine == pytest.approx(means.mean())
    # Student's interval of two values: 12.706 standard errors.
    half = 12.7062 * means.std() / np.sqrt(2)
    assert row.cosine_high - row.cosine == pytest.approx(half, rel=1e-4)
    assert "2 seeds" in found.statements[0].numbers
    curves = analysed(tmp_path, {"type": "snapshots", "attacks": ["PGD"]}, experiment)
    assert (curves.tables["snapshots"].seeds == 2).all()
    assert "over 2 seeds" in curves.statements[0].numbers


def test_flow_levels(tmp_path):
    settings = {"type": "flow_levels", "manifold": GLOW, "radii": [0.1, 1.0], "steps": 2}
    found = analysed(tmp_path, settings)
    table = found.tables["levels"]
    assert table.level.tolist() == ["level 1"] * 2 + ["level 2"] * 2 + ["all levels"] * 2
    assert table.success.between(0, 1).all()
    assert (table.l2 >= table.linf).all()
    assert (tmp_path / "figures" / "levels.png").is_file()
    assert len(found.statements) == 4
    with pytest.raises(ConfigError, match="found fonts with one"):
        analysed(tmp_path, {"type": "flow_levels"})


def test_snapshots_are_evaluated_once(tmp_path, monkeypatch):
    settings = {"type": "snapshots", "images": 10}
    found = analysed(tmp_path, settings)
    table = found.tables["snapshots"]
    assert table.epoch.tolist() == [2, 3] * 6
    assert table.attack.tolist() == (["standard"] * 2 + ["PGD"] * 2 + ["OM-PGD"] * 2) * 2
    assert (table.images == 10).all()
    assert ((table.low <= table.accuracy) & (table.accuracy <= table.high)).all()
    assert len(found.statements) == 4
    monkeypatch.setattr(PGD, "search", None)
    pd.testing.assert_frame_equal(analysed(tmp_path, settings).tables["snapshots"], table)


def test_the_last_snapshot_is_what_an_evaluation_of_the_last_weights_gives(tmp_path):
    training = EXPERIMENT["training"] | {"validation_fraction": 0.0}
    experiment = EXPERIMENT | {"training": training}
    table = analysed(tmp_path, {"type": "snapshots"}, experiment).tables["snapshots"]
    results = run(load_experiment(experiment), tmp_path / "experiment").table
    last = table[table.epoch == 3].set_index(["method", "attack"]).accuracy
    assert len(last) == 6
    for (method, attack), accuracy in last.items():
        entry = results.rows[method][results.columns.index(attack)]
        assert accuracy == pytest.approx(entry.mean / 100)


def test_snapshots_that_are_not_there(tmp_path):
    training = {key: value for key, value in EXPERIMENT["training"].items() if "snap" not in key}
    without = EXPERIMENT | {"training": training}
    with pytest.raises(ConfigError, match=r"snapshot_epochs: expected a number of epochs"):
        analysed(tmp_path, "snapshots", without)
    analysed(tmp_path, "training_curves", without)
    with pytest.raises(ConfigError, match="no snapshot of epoch 2: Normal, seed 0, was trained"):
        analysed(tmp_path, "snapshots")


def test_traversal_of_letters(tmp_path):
    dataset = EXPERIMENT["dataset"]
    settings = {"type": "traversal", "dataset": dataset, "steps": 3}
    found = run_analysis(load_analysis({"name": "t", "analysis": settings}), tmp_path)
    table = found.tables["traversal"]
    assert table.direction.tolist()[-2:] == ["scale", "rotation"]
    assert (table.change > 0).all()
    assert set(found.drawings) == {"traversal-0", "traversal-1", "changes"}
    titles = json.loads((tmp_path / "findings.json").read_text())["figures"]
    assert titles["traversal-0"]["title"] == "Latent traversal: A"


def test_traversal_along_principal_directions_of_encoded_images(tmp_path):
    settings = {"type": "traversal", "dataset": EXPERIMENT["dataset"], "manifold": GLOW}
    settings |= {"kind": "principal", "directions": 2, "steps": 3, "span": 1.0, "shown": 1}
    found = run_analysis(load_analysis({"name": "t", "analysis": settings}), tmp_path)
    assert found.tables["traversal"].direction.tolist() == ["direction 1", "direction 2"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "activation_maps", "images": 0}, "images: expected at least 2"),
        ({"type": "activation_maps", "foreground": 2.0}, "foreground"),
        ({"type": "activation_maps", "baseline": "normal"}, "Did you mean 'Normal'"),
        ({"type": "activation_maps", "attacks": ["PDG"]}, "Did you mean 'PGD'"),
        ({"type": "flow_levels", "radii": [0.2, 0.1]}, "radii: expected rising numbers"),
        ({"type": "flow_levels", "steps": 0}, "steps: expected at least 1"),
        ({"type": "snapshots", "images": 1}, "images: expected at least 2"),
        ({"type": "traversal", "steps": 1}, "steps: expected at least 2"),
        ({"type": "traversal", "dataset": EXPERIMENT["dataset"], "directions": 7}, "at most 6"),
    ],
)
def test_wrong_settings(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        analysed(tmp_path, settings)
