"""What is borrowed from a module is given back."""

import pytest
import torch
from torch import nn

from onmanifold.foundation.modules import with_parts, with_tensors


def make_network():
    torch.manual_seed(0)
    shared = nn.Linear(3, 3)
    return nn.Sequential(shared, nn.BatchNorm1d(3), nn.Sequential(shared, nn.Linear(3, 2)))


def places(network):
    return [
        (name, id(entry))
        for part in network.modules()
        for held in (part._parameters, part._buffers, part._modules)
        for name, entry in held.items()
    ]


def test_tensors_in_the_place_of_others_receive_the_gradient():
    network, images = make_network(), torch.rand(5, 3)
    before = places(network)
    weight, statistics = network[0].weight, network[1].running_mean
    moved, copied = (2 * weight.detach()).requires_grad_(), statistics.clone()
    with with_tensors(network, {weight: moved, statistics: copied}):
        assert network[2][0].weight is network[0].weight is moved
        loss = network(images).square().sum()
    assert places(network) == before
    loss.backward()
    assert weight.grad is None
    assert moved.grad.abs().sum() > 0
    assert torch.equal(statistics, torch.zeros(3))
    assert copied.abs().sum() > 0
    with torch.no_grad():
        weight.mul_(2)
    torch.testing.assert_close(network(images).square().sum(), loss)


def test_parts_in_the_place_of_others():
    network = make_network()
    before = places(network)
    with with_parts(network, {network[0]: nn.Identity()}):
        assert network[0] is network[2][0]
        assert isinstance(network[0], nn.Identity)
    assert places(network) == before


def test_both_are_given_back_after_an_interruption():
    network = make_network()
    before = places(network)
    tensors = {part: part.detach().clone() for part in network.parameters()}
    with (
        pytest.raises(KeyboardInterrupt),
        with_tensors(network, tensors),
        with_parts(network, {network[0]: nn.Identity()}),
    ):
        raise KeyboardInterrupt
    assert places(network) == before
