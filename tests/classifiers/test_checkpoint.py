"""Classifiers on disk: the round trip, and each way in which a file can be wrong."""

import json

import pytest
import safetensors.torch
import torch
from torch import nn

from onmanifold.classifiers import build_classifier, load_classifier, read_metadata, save_classifier
from onmanifold.foundation.errors import CheckpointError, InputError

IMAGES = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def classifier():
    """A small net whose batch norm has seen data, so that its buffers matter."""
    net = build_classifier("conv_net", 5, (1, 28, 28), seed=0, channels=(4, 8), mean=0.3, std=0.4)
    net(IMAGES)
    return net.eval()


def test_round_trip(classifier, tmp_path):
    path = save_classifier(
        classifier, tmp_path / "net.safetensors", {"accuracy": 0.5, "seeds": [0, 1]}
    )
    loaded = load_classifier(path)
    assert not loaded.training
    assert loaded.spec == classifier.spec
    assert torch.equal(loaded(IMAGES), classifier(IMAGES))
    assert read_metadata(path) == {"accuracy": 0.5, "seeds": [0, 1]}
    assert [file.name for file in tmp_path.iterdir()] == ["net.safetensors"]


def test_round_trip_from_channels_last_into_a_given_model(classifier, tmp_path):
    expected = classifier(IMAGES)
    path = save_classifier(classifier.to(memory_format=torch.channels_last), tmp_path / "net")
    into = build_classifier(classifier.spec | {"seed": 1})
    assert load_classifier(path, into) is into
    torch.testing.assert_close(into(IMAGES), expected)


def test_a_model_of_ones_own(tmp_path):
    def network():
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 3))

    own = network()
    path = save_classifier(own, tmp_path / "own.safetensors")
    with pytest.raises(CheckpointError, match="a model of your own: pass a `model`"):
        load_classifier(path)
    assert torch.equal(load_classifier(path, network())(IMAGES), own(IMAGES))


def test_loading_leaves_the_random_state(classifier, tmp_path):
    path = save_classifier(classifier, tmp_path / "net.safetensors")
    before = torch.get_rng_state()
    load_classifier(path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"channels": (4, 16)}, "of another model: .* has shape"),
        ({"hidden": 30}, "of another model: .* has shape"),
        ({"channels": (4, 8, 16)}, "of another model: it lacks the weight"),
    ],
)
def test_checkpoint_of_another_model(classifier, tmp_path, other, message):
    path = save_classifier(classifier, tmp_path / "net.safetensors")
    model = build_classifier(classifier.spec | other)
    before = [tensor.clone() for tensor in model.state_dict().values()]
    with pytest.raises(CheckpointError, match=message):
        load_classifier(path, model)
    unchanged = zip(before, model.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in unchanged)


def test_checkpoint_of_a_larger_model(tmp_path):
    path = save_classifier(build_classifier("mlp", hidden=(8, 8), seed=0), tmp_path / "net")
    with pytest.raises(
        CheckpointError, match=r"it has, beyond the model, the weight 'body\.1\.bias'"
    ):
        load_classifier(path, nn.Sequential())
    with pytest.raises(CheckpointError, match="of another model"):
        load_classifier(path, build_classifier("mlp", hidden=(8,)))


def test_damaged_missing_and_foreign_files(classifier, tmp_path):
    path = save_classifier(classifier, tmp_path / "net.safetensors")
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"is not a safetensors file, or is truncated"):
            load_classifier(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_classifier(tmp_path / "absent.safetensors")
    safetensors.torch.save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="not one of an onmanifold classifier"):
        load_classifier(path)
    with pytest.raises(CheckpointError, match="not one of an onmanifold classifier"):
        read_metadata(path)


def test_a_network_that_is_no_longer_known(classifier, tmp_path):
    classifier.spec = classifier.spec | {"type": "forgotten_net"}
    path = save_classifier(classifier, tmp_path / "net.safetensors")
    with pytest.raises(
        CheckpointError, match="cannot be rebuilt: Unknown classifier 'forgotten_net'"
    ):
        load_classifier(path)


def test_the_file_is_plain_safetensors_with_a_readable_header(classifier, tmp_path):
    path = save_classifier(classifier, tmp_path / "net.safetensors")
    with safetensors.safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["onmanifold"])["spec"] == classifier.spec
        assert set(file.keys()) == set(classifier.state_dict())


def test_metadata_that_json_cannot_hold(classifier, tmp_path):
    with pytest.raises(InputError, match="metadata: expected what JSON can hold"):
        save_classifier(classifier, tmp_path / "net.safetensors", {"weights": torch.zeros(1)})
    assert list(tmp_path.iterdir()) == []
