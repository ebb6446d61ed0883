"""Building by name: seeds, specifications, errors."""

import json

import pytest
import torch

from onmanifold.classifiers import build_classifier
from onmanifold.foundation.errors import ConfigError


def same(first, second):
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = build_classifier("conv_net", seed=3)
    torch.manual_seed(2)
    torch.rand(10)
    assert same(first, build_classifier("conv_net", seed=3))
    assert not same(first, build_classifier("conv_net", seed=4))
    assert not same(build_classifier("conv_net"), build_classifier("conv_net"))


@pytest.mark.parametrize("seed", [None, 0])
def test_global_random_state_is_left_as_found(seed):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    build_classifier("resnet32", seed=seed)
    assert torch.equal(torch.rand(3), expected)


def test_global_random_state_is_left_as_found_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(ConfigError):
        build_classifier("wide_resnet", depth=11)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [None, 7])
def test_spec_rebuilds_after_a_trip_through_json(seed):
    classifier = build_classifier("conv_net", 4, (1, 28, 28), seed, channels=(8, 16), mean=[0.5])
    spec = json.loads(json.dumps(classifier.spec))
    assert spec["type"] == "conv_net"
    assert spec["norm_first"] is True
    again = build_classifier(spec)
    assert same(classifier, again)
    assert again.spec == classifier.spec
    assert again.image_shape == (1, 28, 28)


def test_specification_wins_over_arguments():
    classifier = build_classifier({"type": "mlp", "num_classes": 3}, num_classes=10, seed=5)
    assert classifier.num_classes == 3
    assert classifier.spec["seed"] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet81"}, "Unknown classifier 'resnet81'.*Did you mean 'resnet18'"),
        ({"name": "conv_net", "chanels": (8,)}, "unknown key 'chanels'.*Did you mean 'channels'"),
        ({"name": "resnet18", "width": "wide"}, "classifier 'resnet18': width: .*'wide'"),
        ({"name": "resnet18", "stem": "cifer"}, "classifier 'resnet18': stem: .*'cifer'"),
        ({"name": "wide_resnet", "depth": 27}, r"depth: expected 6 n \+ 4 .* found 27"),
        ({"name": "conv_net", "image_shape": (1, 4, 4)}, "image_shape: .* 8 x 8 pixels, found"),
        ({"name": "conv_net", "image_shape": (32, 32)}, "classifier 'conv_net': .*image_shape"),
        ({"name": "lenet5", "mean": (0.1, 0.2)}, "mean: expected 1 or 3 numbers"),
        ({"name": "mlp", "std": 0.0}, "std: expected positive"),
        ({"name": "mlp", "num_classes": 1}, "num_classes: expected at least 2, found 1"),
        ({"name": "mlp", "seed": "one"}, "expected an integer seed, found 'one'"),
        ({"name": {"width": 3}}, "needs the key 'type'"),
    ],
)
def test_errors_name_what_is_wrong(arguments, message):
    with pytest.raises(ConfigError, match=message):
        build_classifier(**arguments)
