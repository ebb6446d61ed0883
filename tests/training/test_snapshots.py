"""Snapshots: the weights as they were after an epoch, whatever happened in between."""

from dataclasses import replace

import pytest
import torch

import onmanifold as om
from onmanifold.classifiers import load_classifier, read_metadata
from onmanifold.training import (
    AdversarialTraining,
    AdvProp,
    Normal,
    TrainingConfig,
    snapshots_of,
    train,
)
from onmanifold.training.loop import Training

# The learning rate of an epoch does not depend on how many follow.
CONFIG = TrainingConfig(
    epochs=5, batch_size=25, validation_fraction=0.0, snapshot_epochs=2, threads=1
)
METHOD = AdversarialTraining(om.PGD(om.ImageBall(radius=0.1), steps=2))


def same_weights(one, other):
    return all(
        torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items()
    )


@pytest.mark.parametrize("average", [None, 0.9])
def test_a_snapshot_is_what_a_training_of_so_many_epochs_keeps(
    fresh_network, dataset, tmp_path, average
):
    config = replace(CONFIG, ema=average)
    train(METHOD, fresh_network(), dataset, config, directory=tmp_path)
    files = snapshots_of(tmp_path)
    assert list(files) == [2, 4, 5]
    assert files[4] == tmp_path / "snapshots" / "epoch-0004.safetensors"
    for epoch, path in files.items():
        shorter = replace(config, epochs=epoch, snapshot_epochs=None)
        expected = train(METHOD, fresh_network(), dataset, shorter).classifier
        assert same_weights(load_classifier(path, fresh_network(seed=1)), expected)
        assert read_metadata(path)["epoch"] == epoch


@pytest.mark.parametrize("number", [7, 12, 18])
def test_a_training_that_is_stopped_and_goes_on_has_the_same_snapshots(
    network, dataset, tmp_path, monkeypatch, number
):
    config = replace(CONFIG, checkpoint_epochs=3)
    train(METHOD, network, dataset, config, directory=tmp_path / "undisturbed")
    real, calls = Training._step, []

    def step(self, positions):
        calls.append(None)
        if len(calls) == number:
            raise RuntimeError("the power is gone")
        real(self, positions)

    monkeypatch.setattr(Training, "_step", step)
    with pytest.raises(RuntimeError):
        train(METHOD, network, dataset, config, directory=tmp_path / "stopped")
    monkeypatch.undo()
    train(METHOD, network, dataset, config, directory=tmp_path / "stopped")
    expected, found = (snapshots_of(tmp_path / name) for name in ("undisturbed", "stopped"))
    assert {epoch: path.read_bytes() for epoch, path in found.items()} == {
        epoch: path.read_bytes() for epoch, path in expected.items()
    }


def test_snapshots_change_nothing_of_what_is_trained(network, dataset, tmp_path):
    without = replace(CONFIG, snapshot_epochs=None)
    assert without.identity == CONFIG.identity
    plain = train(Normal(), network, dataset, without, directory=tmp_path / "without")
    kept = train(Normal(), network, dataset, CONFIG, directory=tmp_path / "with")
    assert same_weights(plain.classifier, kept.classifier)
    assert snapshots_of(tmp_path / "without") == {}


def test_without_a_directory_nothing_is_kept(network, dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(Normal(), network, dataset, CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_snapshots_hold_the_classifier_alone(network, dataset, tmp_path):
    train(AdvProp(METHOD.attack), network, dataset, CONFIG, directory=tmp_path)
    assert {path.suffix for path in (tmp_path / "snapshots").iterdir()} == {".safetensors"}
    assert len(list((tmp_path / "snapshots").iterdir())) == 3


def test_a_fit_has_snapshots_too(coded, tmp_path):
    config = {"epochs": 2, "batch_size": 40, "snapshot_epochs": 1, "validation_fraction": 0.0}
    spec = {"type": "cvae", "latent_size": 2}
    fitted = om.fit(spec, coded, config, directory=tmp_path)
    files = snapshots_of(tmp_path)
    assert list(files) == [1, 2]
    assert om.load_manifold(files[2]).fingerprint == fitted.manifold.fingerprint
    assert om.load_manifold(files[1]).fingerprint != fitted.manifold.fingerprint
