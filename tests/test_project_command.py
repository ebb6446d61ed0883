"""`onmanifold project --manifold`: a dataset onto a saved manifold, killed and started again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import onmanifold as om
from onmanifold.cli import app
from onmanifold.data.fonts import embedded_folder


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """One cache folder for these tests, also for the processes they start: the fonts are rendered once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONMANIFOLD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def fonts():
    return om.fonts_manifold(embedded_folder())


@pytest.fixture(scope="module")
def saved(fonts, tmp_path_factory) -> Path:
    return om.save_manifold(fonts, tmp_path_factory.mktemp("manifold") / "fonts.safetensors")


def arguments(saved: Path, out: Path, *more: object, count: int = 12) -> list[str]:
    given = ["project", "--manifold", saved, "--dataset", "fonts", "--count", count, "--out", out]
    settings = ["dataset.folder=embedded", "search=encode", "shard_size=1"]
    options = [item for setting in settings for item in ("--set", setting)]
    return [str(item) for item in (*given, *options, "--threads", 1, *more)]


def call(*items: object):
    return CliRunner().invoke(app, [str(item) for item in items])


def fails(*items: object) -> str:
    """The one line on standard error of a call that must end with exit code 1."""
    result = call(*items)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.exit_code == 1, result.output
    assert len(lines) == 1, result.stderr
    return lines[0]


def contents(folder: Path) -> dict[str, object]:
    """What each file holds; safetensors writes its header in any order."""
    return {
        path.name: om.load_manifold(path).fingerprint
        if path.suffix == ".safetensors"
        else path.read_bytes()
        for path in sorted(folder.iterdir())
    }


def killed(items: list[str], out: Path, files: int, wait: float) -> None:
    """Start the command, and kill it some time after it has finished a number of files."""
    command = [sys.executable, "-m", "onmanifold.cli", *items]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        patience = time.monotonic() + 120
        while len(list(out.glob("*.parquet"))) < files and time.monotonic() < patience:
            assert process.poll() is None, "ended before it could be killed"
            time.sleep(0.005)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def test_killed_at_any_moment_it_ends_with_the_same_files(fonts, saved, tmp_path):
    result = call(*arguments(saved, tmp_path / "undisturbed"))
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"On-manifold dataset: {tmp_path / 'undisturbed'}"
    whole = contents(tmp_path / "undisturbed")
    assert len([name for name in whole if name.endswith(".parquet")]) == 12
    out, times = tmp_path / "killed", {}
    moments = random.Random(7)
    for files in (1, 5):
        killed(arguments(saved, out), out, files, moments.uniform(0, 0.1))
        now = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
        assert files <= len(now) < 12
        assert {path: now[path] for path in times} == times  # what was finished was not made again
        times = now
    (out / "test-00000-of-00012.parquet").write_bytes(b"PAR1")
    result = call(*arguments(saved, out))
    assert result.exit_code == 0, result.output
    assert contents(out) == whole
    loaded = om.load_dataset("on_manifold", "test", folder=out)
    assert len(loaded) == 12
    assert torch.equal(loaded.images, fonts.decode(loaded.codes))


def test_settings_reach_the_search(saved, tmp_path):
    more = ("--set", "search=l2", "--set", "encoder=own", "--set", "config.steps=3", "--seed")
    items = [*arguments(saved, tmp_path, count=4), *more[:-1], "--set", "seed=5"]
    result = call(*items, "--set", "config.restarts=0", "--split", "train")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    assert [row[0] for row in rows[1:-1]] == ["A", "B", "C", "D", "all"]
    facts = json.loads((tmp_path / "manifest.json").read_text())["splits"]["train"]
    assert facts["search"] == "l2"
    assert facts["encoder"] == "own"
    assert facts["seed"] == 5
    assert (facts["config"]["steps"], facts["config"]["restarts"]) == (3, 0)
    assert facts["config"]["candidates"] == 128  # the preset's
    overall = facts["reconstruction"]["overall"]
    assert rows[-2] == [
        "all",
        "4",
        *(f"{overall[name]:.4f}" for name in ("l1", "l2", "perceptual", "mean_image_l1")),
        f"{overall['l1'] / overall['mean_image_l1']:.2f}",
    ]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("serch=l2", "Did you mean 'search'"),
        ("search=find", "project: search"),
        ("config.step=3", "Did you mean 'steps'"),
        ("config.steps=many", "config: steps"),
        ("preset=slow", "preset: expected one of fonts, w_plus, quick, found 'slow'"),
        ("shard_size=0", "shard_size: expected an integer of at least 1"),
        ("dataset.fold=x", "unknown key 'fold'"),
        ("measure=features", "classifier"),
    ],
)
def test_wrong_settings_are_named(saved, tmp_path, setting, message):
    more = ("--set", "search=perceptual", "--set", setting)
    assert message in fails(*arguments(saved, tmp_path / "out", *more, count=2))
    assert not (tmp_path / "out").exists()


def test_what_does_not_go_together(saved, tmp_path):
    whole = arguments(saved, tmp_path / "out", count=2)
    assert "needs --manifold, --dataset and --out" in fails(*whole[:3])
    assert "needs --manifold, --dataset and --out" in fails("project", "--dataset", "fonts")
    assert "either a whole dataset, or images" in fails(*whole, "-e", "demo.yaml")
    assert "does not exist" in fails(*arguments(tmp_path / "none.safetensors", tmp_path / "out"))
    (tmp_path / "cut.safetensors").write_bytes(saved.read_bytes()[:1000])
    assert "truncated" in fails(*arguments(tmp_path / "cut.safetensors", tmp_path / "out"))


def test_a_folder_of_another_projection_is_refused(saved, tmp_path):
    items = arguments(saved, tmp_path, count=2)
    assert call(*items).exit_code == 0
    before = contents(tmp_path)
    message = fails(*items, "--set", "seed=1")
    assert "belongs to another projection: seed of test was 0, now it is 1" in message
    assert contents(tmp_path) == before


def test_distances_of_some_images_as_before():
    result = call("project", "--count", 3, "--set", "dataset.test=3", "--set", "dataset.train=10")
    assert result.exit_code == 0, result.output
    assert "3 clean test images projected onto fonts" in result.stdout
    assert "L2 distance to the manifold" in result.stdout
