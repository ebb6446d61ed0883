"""Stopped at any moment and started again, a training ends with the same bits."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import onmanifold as om
from onmanifold.foundation.errors import CheckpointError
from onmanifold.training import AWP, SAM, AdversarialTraining, AdvProp, TrainingConfig, train
from onmanifold.training.checkpoint import Checkpoint
from onmanifold.training.loop import Training

CONFIG = TrainingConfig(
    epochs=3,
    batch_size=20,
    learning_rate=0.02,
    ema=0.9,
    gradient_clip=5.0,
    validation_fraction=0.2,
    checkpoint_minutes=0.0,
    threads=1,
)
METHOD = AdversarialTraining(om.PGD(om.ImageBall(radius=0.1), steps=2), "half")

# Trains as `CONFIG` and `METHOD` say, and kills itself: before a step, or before a file is renamed.
KILLED = """
import importlib.util, os, signal, sys
from dataclasses import replace

where, directory, moment, count = sys.argv[1:]

def load(name):
    spec = importlib.util.spec_from_file_location(name, f"{where}/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

problem, test = load("conftest"), load("test_resume")
left = int(count)

def counted(function):
    def call(*arguments):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return call

if moment == "step":
    test.Training._step = counted(test.Training._step)
else:
    os.replace = counted(os.replace)
network, dataset = problem.make_network(), problem.make_dataset()
test.train(test.METHOD, network, dataset, test.CONFIG, directory=directory)
"""


def killed(directory, moment, count):
    arguments = [
        sys.executable,
        "-c",
        KILLED,
        str(Path(__file__).parent),
        str(directory),
        moment,
        count,
    ]
    ended = subprocess.run(arguments, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    assert ended.returncode == -signal.SIGKILL


def timeless(history):
    return [
        {key: value for key, value in entry.items() if "second" not in key} for entry in history
    ]


def assert_same_runs(one, other):
    best = [load_file(folder / "best.safetensors") for folder in (one, other)]
    for name, tensor in best[0].items():
        assert torch.equal(tensor, best[1][name]), name
    metadata = [
        om.classifiers.read_metadata(folder / "best.safetensors") for folder in (one, other)
    ]
    assert metadata[0] == metadata[1]
    first, second = Checkpoint.read(one / "last.ckpt"), Checkpoint.read(other / "last.ckpt")
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name]), name
    assert first.identity == second.identity
    histories = []
    for folder, checkpoint in ((one, first), (other, second)):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == checkpoint.progress["history"]
        histories.append(timeless(checkpoint.progress["history"]))
    assert histories[0] == histories[1]


@pytest.fixture
def undisturbed(network, dataset, tmp_path):
    train(METHOD, network, dataset, CONFIG, directory=tmp_path / "undisturbed")
    return tmp_path / "undisturbed"


def test_killed_again_and_again(network, dataset, tmp_path, undisturbed):
    directory = tmp_path / "killed"
    killed(directory, "step", "4")  # inside the first epoch
    assert json.loads(json.dumps(Checkpoint.read(directory / "last.ckpt").progress))["step"] == 3
    killed(directory, "rename", "9")  # while a file is written
    result = train(METHOD, network, dataset, CONFIG, directory=directory)
    assert_same_runs(directory, undisturbed)
    assert len(result.history) == 3


def interrupting(monkeypatch, number, signals=1):
    """Ctrl-C in the middle of a step."""
    real, calls = Training._step, []

    def step(self, positions):
        calls.append(None)
        if len(calls) == number:
            for _ in range(signals):
                os.kill(os.getpid(), signal.SIGINT)
        real(self, positions)

    monkeypatch.setattr(Training, "_step", step)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_ctrl_c_saves_and_ends(network, dataset, tmp_path, monkeypatch, optimizer):
    config = replace(CONFIG, optimizer=optimizer, checkpoint_minutes=60.0)
    handler = signal.getsignal(signal.SIGINT)
    interrupting(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        train(METHOD, network, dataset, config, directory=tmp_path / "stopped")
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.undo()
    progress = Checkpoint.read(tmp_path / "stopped" / "last.ckpt").progress
    assert (progress["epoch"], progress["step"]) == (1, 2)
    train(METHOD, network, dataset, config, directory=tmp_path / "stopped")
    train(METHOD, network, dataset, config, directory=tmp_path / "undisturbed")
    assert_same_runs(tmp_path / "stopped", tmp_path / "undisturbed")


@pytest.mark.parametrize(
    "method", [SAM(METHOD, 0.1), AWP(METHOD, 0.05, after_epoch=1), AdvProp(METHOD.attack)]
)
def test_methods_that_perturb_weights_or_bring_networks(
    network, dataset, tmp_path, monkeypatch, method
):
    config = replace(CONFIG, checkpoint_minutes=60.0)
    for number in (3, 5):
        # In the middle of the first epoch, then in that of the second one.
        interrupting(monkeypatch, number)
        with pytest.raises(KeyboardInterrupt):
            train(method, network, dataset, config, directory=tmp_path / "stopped")
        monkeypatch.undo()
    train(method, network, dataset, config, directory=tmp_path / "stopped")
    train(method, network, dataset, config, directory=tmp_path / "undisturbed")
    assert_same_runs(tmp_path / "stopped", tmp_path / "undisturbed")


def test_a_second_ctrl_c_ends_at_once(network, dataset, tmp_path, monkeypatch):
    config = replace(CONFIG, checkpoint_minutes=60.0)
    interrupting(monkeypatch, 7, signals=2)
    with pytest.raises(KeyboardInterrupt):
        train(METHOD, network, dataset, config, directory=tmp_path)
    progress = Checkpoint.read(tmp_path / "last.ckpt").progress
    assert (progress["epoch"], progress["step"]) == (1, 0)


def test_without_a_directory_ctrl_c_ends_too(network, dataset, monkeypatch):
    interrupting(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        train(METHOD, network, dataset, CONFIG)


def test_a_finished_training_is_not_repeated(network, dataset, undisturbed, monkeypatch):
    first = train(METHOD, network, dataset, CONFIG, directory=undisturbed)
    monkeypatch.setattr(Training, "_step", None)
    (undisturbed / "metrics.jsonl").unlink()
    # How often is saved changes nothing, so another value is the same run.
    config = replace(CONFIG, checkpoint_minutes=5.0, checkpoint_epochs=2)
    again = train(METHOD, network, dataset, config, directory=undisturbed)
    assert again.history == first.history
    assert again.best_epoch == first.best_epoch
    for name, tensor in again.classifier.state_dict().items():
        assert torch.equal(tensor, first.classifier.state_dict()[name])
    assert len((undisturbed / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"config": replace(CONFIG, learning_rate=0.5)},
            "training.learning_rate was 0.02, now it is 0.5",
        ),
        ({"config": replace(CONFIG, epochs=9)}, "training.epochs was 3, now it is 9"),
        ({"method": replace(METHOD, variant="full")}, "method.variant was half, now it is full"),
        ({"seed": 1}, "seed was 0, now it is 1"),
    ],
)
def test_a_checkpoint_of_another_configuration(network, dataset, undisturbed, changed, message):
    given = {"method": METHOD, "classifier": network, "dataset": dataset, "config": CONFIG}
    before = (undisturbed / "last.ckpt").read_bytes()
    with pytest.raises(CheckpointError, match=message):
        train(**{**given, **changed}, directory=undisturbed)
    assert (undisturbed / "last.ckpt").read_bytes() == before


def test_a_checkpoint_of_another_model_or_data(fresh_network, fresh_dataset, undisturbed):
    with pytest.raises(CheckpointError, match=r"classifier\.weights"):
        train(METHOD, fresh_network(seed=1), fresh_dataset(), CONFIG, directory=undisturbed)
    with pytest.raises(CheckpointError, match="dataset was toy-120-0"):
        train(METHOD, fresh_network(), fresh_dataset(seed=1), CONFIG, directory=undisturbed)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:100], lambda data: b"", lambda data: b"x" * 999]
)
def test_a_damaged_checkpoint(network, dataset, undisturbed, damage):
    last = undisturbed / "last.ckpt"
    last.write_bytes(damage(last.read_bytes()))
    with pytest.raises(CheckpointError, match="Delete it to start the training anew"):
        train(METHOD, network, dataset, CONFIG, directory=undisturbed)


def test_a_foreign_safetensors_file(network, dataset, undisturbed):
    (undisturbed / "last.ckpt").write_bytes((undisturbed / "best.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="no checkpoint of a training"):
        train(METHOD, network, dataset, CONFIG, directory=undisturbed)
