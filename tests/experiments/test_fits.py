"""Learning a manifold from a file or by name, on the command line, and inside an experiment."""

import json

import pytest
import torch
import yaml
from typer.testing import CliRunner

import onmanifold as om
from onmanifold.cli import app
from onmanifold.experiments.fits import load_fit, run_fit
from onmanifold.experiments.setup import prepare
from onmanifold.experiments.spec import load_experiment
from onmanifold.foundation.errors import CheckpointError, ConfigError, DataError

LETTERS = {"type": "fonts", "train": 60, "test": 20, "folder": "embedded"}
FILE = {
    "name": "tiny",
    "dataset": LETTERS,
    "manifold": {"type": "ppca", "latent_size": 5, "conditional": False},
    "quality": {"count": 0},
}
TRAINED = {
    **FILE,
    "manifold": {"type": "cvae", "latent_size": 2},
    "training": {"epochs": 1, "batch_size": 30, "threads": 1},
}


@pytest.fixture
def write(tmp_path):
    def to_file(content, name="fit.yaml"):
        path = tmp_path / name
        path.write_text(yaml.safe_dump(content))
        return path

    return to_file


def test_a_file_is_read_and_checked(write):
    spec = load_fit(write(FILE), overrides=["manifold.latent_size=3", "seed=4"])
    assert spec.manifold == {"type": "ppca", "latent_size": 3, "conditional": False}
    assert (spec.dataset.type, spec.dataset.train, spec.seed) == ("fonts", 60, 4)
    named = load_fit("glow", "mnist", ["dataset.train=50", "manifold.levels=2"])
    assert named.name == "glow-mnist"
    assert named.dataset.train == 50
    assert named.manifold == {"type": "glow", "levels": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"manifolds": 1}, "unknown key 'manifolds'. Did you mean 'manifold'"),
        ({"manifold": None}, "manifold"),
        ({"quality": {"count": -1}}, "count: expected a number of images >= 0, found -1"),
        ({"quality": {"clasifier": "x"}}, "Did you mean 'classifier'"),
        ({"name": "a/b"}, "name: expected a folder's name"),
        ({"dataset": {"type": "fonts", "train": 0}}, "expected a number of images, found 0"),
    ],
)
def test_mistakes_in_a_file(write, change, message):
    with pytest.raises(ConfigError, match=message):
        load_fit(write({**FILE, **change}))


def test_mistakes_in_a_name():
    with pytest.raises(
        ConfigError, match=r"neither a YAML file nor a manifold\. Did you mean 'glow'"
    ):
        load_fit("glwo", "mnist")
    with pytest.raises(ConfigError, match="which dataset"):
        load_fit("glow")
    with pytest.raises(DataError, match="Could not read"):
        load_fit("absent.yaml")


def test_what_is_fitted_is_kept_and_not_repeated(tmp_path, write):
    lines = []
    found = run_fit(load_fit(write(TRAINED)), tmp_path / "out", device="cpu", say=lines.append)
    assert found.best == tmp_path / "out" / "best.safetensors"
    assert any(str(found.best) in line for line in lines)
    history = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(history[0])["epoch"] == 1
    assert (tmp_path / "out" / "pictures" / "epoch-0001.png").is_file()
    again = run_fit(load_fit(write(TRAINED)), tmp_path / "out", device="cpu")
    assert again.manifold.fingerprint == found.manifold.fingerprint
    with pytest.raises(CheckpointError, match=r"training\.epochs was 1, now it is 2"):
        run_fit(load_fit(write(TRAINED), overrides=["training.epochs=2"]), tmp_path / "out")


def test_the_command(tmp_path, write):
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["fit", str(write(FILE)), "--out", str(out)])
    assert result.exit_code == 0, result.output
    manifold = om.load_manifold(out / "best.safetensors")
    assert manifold.latent_size == 5
    options = ["dataset.folder=embedded", "dataset.train=60", "dataset.test=20", "quality.count=0"]
    arguments = [
        "fit",
        "ppca",
        "-d",
        "fonts",
        "manifold.conditional=false",
        *options,
        "-o",
        str(tmp_path / "named"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    wrong = CliRunner().invoke(app, ["fit", "ppca", "-d", "fontz"])
    assert wrong.exit_code == 1
    assert "Did you mean 'fonts'" in wrong.stderr


def test_an_experiment_on_a_fitted_manifold(tmp_path, write):
    out = tmp_path / "out"
    manifold = {"type": "fitted", "file": str(write(FILE)), "out": str(out)}
    experiment = {
        "name": "on_it",
        "dataset": LETTERS,
        "manifold": manifold,
        "classifier": {"type": "mlp", "hidden": [8]},
        "methods": {"Normal": "normal"},
        "threats": {"latent": {"type": "latent_ball", "radius": 0.1}},
        "attacks": {"OM-FGSM": {"type": "fgsm", "threat": "latent"}},
    }
    setup = prepare(load_experiment(experiment))
    assert setup.manifold.name == "ppca"
    # What is saved is the same manifold, so that runs are keyed alike.
    saved = {"type": "saved", "path": str(out / "best.safetensors")}
    other = prepare(load_experiment({**experiment, "manifold": saved}))
    assert other.manifold.fingerprint == setup.manifold.fingerprint
    key = setup.training_key("Normal", 0)
    assert setup.evaluation_key(key) == other.evaluation_key(key)
    images, labels, *_ = setup.test.batch(torch.arange(4))
    result = setup.attacks["OM-FGSM"](setup.classifier(0).eval(), images, labels)
    assert bool(result.size["latent"].le(0.1 + 1e-6).all())
