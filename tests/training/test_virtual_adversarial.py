"""VAT: its loss by hand, its direction against the exact eigenvector."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.registry import METHODS
from onmanifold.training import SAM, VAT, Step, TrainingConfig, train


def make_step(network, dataset, images=None):
    own, labels, _, indices = dataset.batch(torch.arange(20))
    network = network.double().train()
    images = own.double() if images is None else images
    return Step(network, network, images, labels, None, indices, 0, 5)


def test_the_loss_is_cross_entropy_plus_the_divergence(network, dataset):
    step, method = make_step(network, dataset), VAT(radius=0.7, weight=0.3)
    reference = copy.deepcopy(network)
    loss = method.loss(step)
    (moved,) = step.made
    clean = reference(step.images)
    fixed, changed = clean.softmax(1).detach(), reference(moved).softmax(1)
    divergence = (fixed * (fixed / changed).log()).sum() / len(step.labels)
    expected = functional.cross_entropy(clean, step.labels) + 0.3 * divergence

    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    assert divergence > 0
    found = torch.autograd.grad(loss, list(network.parameters()))
    wanted = torch.autograd.grad(expected, list(reference.parameters()))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    for name, buffer in network.named_buffers():
        torch.testing.assert_close(buffer, reference.get_buffer(name))
    assert step.counted == 20
    assert step.correct == (clean.argmax(1) == step.labels).sum()


def test_the_direction_is_the_dominant_eigenvector_of_a_linear_model(dataset):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    # Grey, so that nothing is clipped.
    images = 0.4 + 0.2 * torch.rand(20, 1, 8, 8).double()
    step = make_step(network, dataset, images)
    VAT(radius=0.01, iterations=200, difference=1e-5).loss(step)
    (moved,) = step.made
    weight = network[1].weight.detach()
    for image, found, logits in zip(images, moved - images, network(images), strict=True):
        p = logits.softmax(0).detach()
        fisher = torch.diag(p) - torch.outer(p, p)
        values, vectors = torch.linalg.eigh(weight.T @ fisher @ weight)
        assert values[-1] > 1.01 * values[-2]
        assert found.norm().item() == pytest.approx(0.01, rel=1e-10)
        assert abs(found.flatten() @ vectors[:, -1]).item() == pytest.approx(0.01, rel=1e-4), image


def test_more_iterations_change_the_prediction_more(network, dataset):
    def divergence(iterations):
        step = make_step(copy.deepcopy(network), dataset)
        VAT(radius=0.1, iterations=iterations, difference=1e-4).loss(step)
        net = network.double().eval()
        logs = [net(images).log_softmax(1) for images in (step.made[0], step.images)]
        return functional.kl_div(*logs, reduction="batchmean", log_target=True)

    one, ten = divergence(1), divergence(10)
    noise = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    step = make_step(network, dataset)
    noise *= 0.1 / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    net = network.eval()
    logs = [net(images).log_softmax(1) for images in (step.images + noise, step.images)]
    random = functional.kl_div(*logs, reduction="batchmean", log_target=True)
    assert ten > one > 2 * random


def test_examples_stay_within_bounds_and_labels_play_no_part(network, dataset):
    step = make_step(network, dataset)
    VAT(radius=3.0).loss(step)
    (moved,) = step.made
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert ((moved - step.images).flatten(1).norm(dim=1) <= 3 + 1e-12).all()
    other = make_step(network, dataset)
    other.labels = (other.labels + 1) % 3
    # The first loss has changed the statistics.
    network[1].reset_running_stats()
    VAT(radius=3.0).loss(other)
    third = make_step(network, dataset)
    network[1].reset_running_stats()
    VAT(radius=3.0).loss(third)
    assert torch.equal(other.made[0], third.made[0])


def test_a_sample_does_not_depend_on_its_batch(network, dataset):
    whole = make_step(network, dataset)
    state = copy.deepcopy(network.state_dict())
    VAT().loss(whole)
    network.load_state_dict(state)
    few = make_step(network, dataset)
    rows = slice(3, 9)
    few.images, few.labels, few.indices = few.images[rows], few.labels[rows], few.indices[rows]
    VAT().loss(few)
    torch.testing.assert_close(few.made[0], whole.made[0][rows], rtol=0, atol=1e-10)


def test_radius_0_and_a_flat_model(network, dataset):
    step = make_step(network, dataset)
    expected = functional.cross_entropy(copy.deepcopy(network)(step.images), step.labels)
    torch.testing.assert_close(VAT(radius=0.0).loss(step), expected)
    with torch.no_grad():
        network[-1].weight.zero_()
    step = make_step(network, dataset)
    loss = VAT().loss(step)
    assert loss.isfinite()
    assert step.made[0].isfinite().all()


def test_the_classifier_is_left_in_train_mode(network, dataset):
    VAT().loss(make_step(network, dataset))
    assert all(part.training for part in network.modules())
    assert all(part.requires_grad for part in network.parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"radius": -1}, "radius: expected a finite number >= 0, found -1"),
        ({"weight": float("nan")}, "weight: expected a finite number >= 0, found nan"),
        ({"iterations": 0}, "iterations: expected at least 1, found 0"),
        ({"difference": 0}, "difference: expected a finite number > 0, found 0"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ConfigError, match=message):
        VAT(**fields)


@pytest.mark.parametrize("perturbed", [False, True])
def test_training_runs(network, dataset, perturbed):
    config = TrainingConfig(epochs=4, batch_size=30, learning_rate=0.01, threads=1)
    method = METHODS.build({"type": "virtual_adversarial", "radius": 0.3})
    method = SAM(method) if perturbed else method
    result = train(method, network, dataset, config)
    losses = [entry["train_loss"] for entry in result.history]
    assert losses[-1] < losses[0]
    assert result.history[-1]["train_accuracy"] > 0.8
