"""The faster gradient to the image is the library's own."""

import copy

import pytest
import torch
from torch import nn

from onmanifold.attacks import PGD, Engine
from onmanifold.attacks.engine import frozen
from onmanifold.attacks.input_convolution import InputConvolution
from onmanifold.threats import ImageBall


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [
        (4, 2, 1),
        (3, 2, 1),
        (5, 2, 2),
        (7, 2, 3),
        (2, 2, 0),
        (3, 2, 0),
        (4, 4, 0),
        (1, 2, 0),
        (3, 3, 2),
        (5, 4, 0),
    ],
)
@pytest.mark.parametrize("sides", [(8, 8), (9, 13), (28, 23)])
def test_the_gradient_is_that_of_the_layer(channels, kernel, stride, padding, sides):
    layer = nn.Conv2d(channels, 6, kernel, stride, padding).double()
    assert InputConvolution.suits(layer)
    fast = InputConvolution(layer)
    one = torch.randn(3, channels, *sides).double().requires_grad_()
    two = one.detach().clone().requires_grad_()
    expected, found = layer(one), fast(two)
    assert torch.equal(found, expected)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    torch.testing.assert_close(two.grad, one.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(8, 4, 4, stride=2),
        nn.Conv2d(2, 4, 3, stride=2, groups=2),
        nn.Conv2d(2, 4, 3, stride=2, dilation=2),
        nn.Conv2d(1, 4, (3, 4), stride=2),
        nn.Conv2d(1, 4, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.Linear(3, 3),
    ],
    ids=["stride 1", "wide", "groups", "dilation", "oblong", "reflected", "linear"],
)
def test_other_layers_stay_as_they_are(layer):
    assert not InputConvolution.suits(layer)


def test_a_changed_weight_is_seen_at_the_next_attack():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    ).eval()
    images, labels = torch.rand(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1])
    attack = PGD(ImageBall("linf", 0.1), 4, early_stop=False)
    plain = PGD(ImageBall("linf", 0.1), 4, early_stop=False, engine=Engine(fold=False))
    for _ in range(2):
        with frozen(net, images, attack.engine) as network:
            assert any(isinstance(m, InputConvolution) for m in network._forward.modules())
        found, expected = attack(net, images, labels), plain(copy.deepcopy(net), images, labels)
        torch.testing.assert_close(found.objective, expected.objective, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            net[0].weight.neg_()
