"""The command line: quick help, clear errors, exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from onmanifold import build_classifier, save_classifier
from onmanifold.catalogue import KINDS, catalogue
from onmanifold.cli import app
from onmanifold.experiments import fits as fits  # registers "fitted", which only experiments know
from onmanifold.foundation import registry

TINY = {
    "name": "tiny",
    "dataset": {"type": "fonts", "train": 60, "test": 20, "folder": "embedded"},
    "classifier": {"type": "mlp", "hidden": [8]},
    "threats": {
        "image": {"type": "image_ball", "norm": "linf", "radius": 0.1},
        "latent": {"type": "latent_ball", "norm": "linf", "radius": 0.3},
    },
    "training": {"epochs": 1, "batch_size": 20, "validation_fraction": 0.2},
    "methods": {
        "Normal": "normal",
        "AT": {"type": "adversarial", "attack": {"type": "pgd", "threat": "image", "steps": 1}},
    },
    "attacks": {
        "FGSM": {"type": "fgsm", "threat": "image"},
        "OM-FGSM": {"type": "fgsm", "threat": "latent"},
    },
    "evaluation": {"batch_size": 10},
}


@pytest.fixture
def experiment(tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY, sort_keys=False))
    return path


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    model = build_classifier("mlp", image_shape=(1, 28, 28), hidden=[8], seed=0)
    return save_classifier(model, tmp_path / "mlp.safetensors")


def call(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def fails(*arguments: object) -> str:
    """The one line on standard error of a call that must end with exit code 1."""
    result = call(*arguments)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.exit_code == 1, result.output
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.output
    return lines[0]


LIGHT = """
import sys
from onmanifold.cli import app
try:
    app(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "numpy", "pandas", "matplotlib", "scipy", "pyarrow", "lightning_fabric"}
print("heavy:", sorted(heavy & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["list"], ["list", "attack"], ["run", "--help"], ["--version"]]
)
def test_help_and_list_import_nothing_heavy(arguments):
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, *arguments], capture_output=True, text=True, check=True
    )
    assert "heavy: []" in done.stdout


def test_list_is_what_is_registered():
    listed = {
        kind: sorted(item.name for item in catalogue() if item.kind == kind)
        for kind in KINDS.values()
    }
    for name, kind in KINDS.items():
        if hasattr(registry, name):
            assert listed[kind] == getattr(registry, name).names(), kind
    assert all(item.summary for item in catalogue())


def test_list_shows_fields_and_refuses_unknown_kinds():
    output = call("list", "attacks").stdout
    assert "pgd" in output
    assert "threat*" in output
    assert "Valid: dataset" in fails("list", "atack")


def test_usage_errors_have_exit_code_2():
    assert call("run").exit_code == 2
    assert call("nonsense").exit_code == 2
    assert call("demo", "--device", "abacus").exit_code == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["atacks.x=1"], "Did you mean 'attacks'"),
        (["training.epoch=3"], "Did you mean 'epochs'"),
        (["training.epochs=many"], "training: epochs"),
        (["attacks.FGSM.step=3"], "attacks.FGSM: "),
        (["attacks.FGSM.type=fgms"], "Did you mean 'fgsm'"),
        (["attacks.FGSM.threat=imagee"], "Did you mean 'image'"),
        (["threats.image.radius=-1"], "threats.image: "),
        (["threats.image.norm=l3"], "threats.image: "),
        (["methods.AT.attack.restarts=0"], "methods.AT: "),
        (["methods.Normal=nrmal"], "Did you mean 'normal'"),
        (["classifier.type=mpl"], "Did you mean 'mlp'"),
        (["classifier.hiden=[3]"], "Did you mean 'hidden'"),
        (["dataset.siz=3"], "dataset 'fonts'"),
        (["dataset=font"], "Did you mean 'fonts'"),
        (["dataset.folder=/no/such/folder"], "/no/such/folder"),
        (["evaluation.batch_size=0"], "batch_size: expected at least 1"),
        (["seeds"], "expected key=value"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(experiment, tmp_path, settings, message):
    assert message in fails("run", experiment, *settings, "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "store").exists()


def test_latent_threat_without_a_manifold_says_so(experiment, tmp_path, monkeypatch):
    folder = tmp_path / "pictures"
    _pictures(folder)
    message = fails(
        "run",
        experiment,
        f"dataset={{type: imagefolder, folder: {folder}}}",
        "--out",
        tmp_path / "out",
    )
    assert "threats.latent" in message
    assert "manifold" in message


def _pictures(folder: Path) -> None:
    from PIL import Image

    for split in ("train", "test"):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            Image.new("L", (8, 8), 100).save(folder / split / name / "1.png")


def test_missing_experiment_file():
    assert "none.yaml" in fails("run", "none.yaml")


def test_output_that_is_a_file(experiment, tmp_path):
    (tmp_path / "out").write_text("")
    assert "is a file" in fails("run", experiment, "--out", tmp_path / "out")


def test_truncated_font(experiment, tmp_path):
    from onmanifold.data.fonts import embedded_folder

    folder = tmp_path / "fonts"
    folder.mkdir()
    whole = (embedded_folder() / "DejaVuSans.ttf").read_bytes()
    (folder / "half.ttf").write_bytes(whole[: len(whole) // 2])
    message = fails("run", experiment, f"dataset.folder={folder}", "--out", tmp_path / "out")
    assert "half.ttf" in message


def test_truncated_parquet(experiment, tmp_path, monkeypatch):
    folder = tmp_path / "data" / "mnist"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        (folder / f"{split}-0.parquet").write_bytes(b"PAR1 and then nothing")
    monkeypatch.setenv("ONMANIFOLD_DATA", str(tmp_path / "data"))
    settings = ["dataset=mnist", "threats.latent.type=transformation_ball"]
    message = fails("run", experiment, *settings, "--out", tmp_path / "out")
    assert "-0.parquet" in message


def test_checkpoint_that_is_missing_truncated_foreign_or_of_another_model(
    experiment, tmp_path, checkpoint
):
    def refused(path: Path) -> str:
        return fails("evaluate", path, "--experiment", experiment)

    assert "does not exist" in refused(tmp_path / "none.safetensors")
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(checkpoint.read_bytes()[:100])
    assert "truncated" in refused(truncated)
    other = save_classifier(
        build_classifier("mlp", image_shape=(3, 32, 32), seed=0), tmp_path / "o.safetensors"
    )
    assert "(3, 32, 32)" in refused(other)
    foreign = save_classifier(torch.nn.Linear(2, 2), tmp_path / "foreign.safetensors")
    assert "model of your own" in refused(foreign)


def test_no_cuda(experiment, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert "CUDA" in fails("run", experiment, "--device", "cuda", "--out", tmp_path / "out")


def test_report_of_a_folder_without_results(tmp_path):
    assert "holds no results" in fails("report", tmp_path)


def test_debug_shows_where(experiment):
    result = call("run", experiment, "trainig.epochs=1", "--debug")
    assert type(result.exception).__name__ == "ConfigError"


def test_full_disk_keeps_what_was_computed(experiment, tmp_path, monkeypatch):
    from onmanifold.foundation import files

    out = tmp_path / "out"
    real = os.replace

    def full(source, target):
        if "evaluation" in str(target):
            raise OSError(28, "No space left on device")
        return real(source, target)

    monkeypatch.setattr(files.os, "replace", full)
    message = fails("run", experiment, "--out", out)
    assert "No space left on device" in message
    monkeypatch.undo()
    result = call("run", experiment, "--out", out)
    assert result.exit_code == 0, result.output
    assert "Normal, seed 0: trained before" in result.stderr


def test_interrupt_says_how_to_go_on(experiment, tmp_path, monkeypatch):
    from onmanifold.experiments import runner

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "evaluate", interrupted)
    result = call("run", experiment, "--out", tmp_path / "out")
    assert result.exit_code == 130
    assert "the same command goes on from there" in result.stderr


def test_a_failed_method_does_not_lose_the_others(experiment, tmp_path, monkeypatch):
    from onmanifold.experiments import runner
    from onmanifold.foundation.errors import DivergenceError

    real = runner.train

    def train(method, *arguments, **options):
        if method.registered_name == "normal":
            raise DivergenceError("The training loss became NaN in epoch 1.")
        return real(method, *arguments, **options)

    monkeypatch.setattr(runner, "train", train)
    out = tmp_path / "out"
    result = call("run", experiment, "--out", out)
    assert result.exit_code == 1
    assert "error: Normal, seed 0: DivergenceError: The training loss became NaN" in result.stderr
    rows = (out / "table.csv").read_text().splitlines()
    assert rows[1] == "Normal,,,,"
    assert rows[2].startswith("AT,")
    assert rows[2] != "AT,,,,"
    assert "The training loss became NaN" in (out / "report.html").read_text()


def test_commands_on_a_checkpoint(experiment, tmp_path, checkpoint):
    result = call("evaluate", checkpoint, "-e", experiment, "--out", tmp_path / "evaluated")
    assert result.exit_code == 0, result.output
    assert "OM-FGSM" in result.stdout
    assert (tmp_path / "evaluated" / "ledger.parquet").is_file()
    result = call(
        "attack",
        checkpoint,
        "-e",
        experiment,
        "-n",
        "FGSM",
        "--count",
        8,
        "-o",
        tmp_path / "attacked",
    )
    assert result.exit_code == 0, result.output
    assert "FGSM on 8 images" in result.stdout
    assert (tmp_path / "attacked" / "attack.png").is_file()
    assert "Did you mean 'OM-FGSM'" in fails(
        "attack", checkpoint, "-e", experiment, "-n", "OM-FGMS"
    )


def test_projection_of_clean_and_of_attacked_images(experiment, tmp_path, checkpoint):
    result = call("project", "-e", experiment, "--count", 5)
    assert result.exit_code == 0, result.output
    assert "5 clean test images projected onto fonts" in result.stdout
    attacked = tmp_path / "attacked"
    assert call("attack", checkpoint, "-e", experiment, "--count", 5, "-o", attacked).exit_code == 0
    result = call("project", attacked / "attack.safetensors", "-e", experiment)
    assert "L2 distance to the manifold" in result.stdout
    assert "does not exist" in fails("project", tmp_path / "none.safetensors", "-e", experiment)
    assert "no codes" in fails("project", checkpoint, "-e", experiment)


def test_train_only_then_run_repeats_no_training(experiment, tmp_path):
    out = tmp_path / "out"
    result = call("train", experiment, "--method", "Normal", "--out", out)
    assert result.exit_code == 0, result.output
    assert Path(result.stdout.strip().rpartition(": ")[2]).is_file()
    result = call("run", experiment, "--out", out)
    assert "Normal, seed 0: trained before" in result.stderr
    assert "AT, seed 0: trained in" in result.stderr
    assert "Did you mean 'Normal'" in fails("train", experiment, "--method", "Norml", "--out", out)


def test_fonts_names_each_font_left_out_and_why(tmp_path):
    from onmanifold.data.fonts import embedded_folder

    good = embedded_folder() / "DejaVuSans.ttf"
    (tmp_path / "good.ttf").write_bytes(good.read_bytes())
    (tmp_path / "cut.ttf").write_bytes(good.read_bytes()[:1000])
    result = call("fonts", tmp_path)
    assert result.exit_code == 0, result.output
    assert "cut.ttf: unreadable" in result.stdout
    assert "1 fonts; left out: 1 unreadable" in result.stdout
    assert "missing" in fails("fonts", tmp_path / "missing")
