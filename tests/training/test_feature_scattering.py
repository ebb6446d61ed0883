"""Feature scattering and label smoothing against plain, slow references written out here."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

import onmanifold as om
from onmanifold.foundation.errors import ConfigError, InputError
from onmanifold.foundation.registry import METHODS, describe
from onmanifold.training import Step, TrainingConfig, train
from onmanifold.training.methods import FeatureScattering, LabelSmoothing
from onmanifold.training.smoothing import smoothed, smoothed_cross_entropy

BALL = om.ImageBall(radius=0.1)


def make_step(network, dataset, seed=5, count=12):
    images, labels, codes, indices = dataset.batch(torch.arange(count))
    network = network.double().train()
    codes = None if codes is None else codes.double()
    return Step(network, network, images.double(), labels, codes, indices, 0, seed)


def plain_distance(clean, perturbed, regularisation=0.01, iterations=100, tolerance=0.1):
    """The cost of the plan, which is found with exponentials as they stand and held fixed."""
    rows = []
    for one in clean:
        cosines = [one @ other / (one.norm() * other.norm()) for other in perturbed]
        rows.append(torch.stack([torch.clamp(1 - cosine, min=0) for cosine in cosines]))
    costs = torch.stack(rows)
    with torch.no_grad():
        kernel, count = torch.exp(-costs / regularisation), len(costs)
        right = torch.ones(count).double()
        u = torch.zeros(count).double()
        for _ in range(iterations):
            left = 1 / count / (kernel @ right)
            right = 1 / count / (kernel.T @ left)
            before, u = u, regularisation * left.log()
            if (u - before).abs().sum() < tolerance:
                break
        plan = left[:, None] * kernel * right[None]
    return (plan * costs).sum()


def plain_examples(network, images, start, step_size, radius, steps=1):
    network = copy.deepcopy(network).eval()
    clean, point = network(images).detach(), start
    for _ in range(steps):
        point = point.detach().requires_grad_()
        distance = plain_distance(clean, network(images + point))
        (slope,) = torch.autograd.grad(distance, point)
        point = (point + step_size * slope.sign()).clamp(-radius, radius)
        point = (images + point).clamp(0, 1) - images
    return (images + point).detach()


def plain_smoothed_loss(logits, labels, amount):
    """−Σ t log p, sample by sample, with the formula of the released code."""
    classes, total = logits.shape[1], 0
    for row, label in zip(logits, labels.tolist(), strict=True):
        for k in range(classes):
            one_hot = float(k == label)
            target = (1 - amount - amount / (classes - 1)) * one_hot + amount / (classes - 1)
            total = total - target * torch.log_softmax(row, 0)[k]
    return total / len(logits)


def gradients(network, loss):
    return torch.autograd.grad(loss, list(network.parameters()))


def assert_same_gradients(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


# Label smoothing.


def test_smoothed_labels_are_distributions():
    found = smoothed(torch.tensor([3, 0]), 10, 0.5)
    torch.testing.assert_close(found.sum(1), torch.ones(2))
    assert torch.equal(smoothed(torch.tensor([1]), 3, 0.0), torch.tensor([[0.0, 1.0, 0.0]]))


def test_smoothed_labels_against_those_of_torch():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.tensor([0, 1, 2, 3, 3, 1])
    expected = functional.cross_entropy(logits, labels, label_smoothing=0.3 * 4 / 3)
    torch.testing.assert_close(smoothed_cross_entropy(logits, labels, 0.3), expected)


@pytest.mark.parametrize("amount", [0.0, 0.3, 0.5])
def test_label_smoothing_equals_the_reference(network, dataset, amount):
    step = make_step(network, dataset)
    reference = copy.deepcopy(network)
    expected = plain_smoothed_loss(reference(step.images), step.labels, amount)
    loss = LabelSmoothing(amount).loss(step)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert_same_gradients(gradients(network, loss), gradients(reference, expected))
    assert step.counted == 12


# Feature scattering.


@pytest.mark.parametrize(("step_size", "steps"), [(None, 1), (0.04, 1), (0.04, 3)])
def test_feature_scattering_equals_the_reference(network, dataset, step_size, steps):
    step = make_step(network, dataset)
    reference = copy.deepcopy(network)
    start = BALL.around(step.images, step.labels).random("uniform", step.seed, step.indices)
    examples = plain_examples(
        reference, step.images, start["image"], step_size or 0.1, 0.1, steps=steps
    )
    expected = plain_smoothed_loss(reference(examples), step.labels, 0.5)

    loss = FeatureScattering(BALL, step_size, steps).loss(step)

    torch.testing.assert_close(step.made[0], examples, rtol=0, atol=1e-12)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    assert_same_gradients(gradients(network, loss), gradients(reference, expected))
    assert step.counted == 12


def test_the_defaults_are_those_of_the_released_code():
    method = METHODS.build("feature_scattering")
    assert method == FeatureScattering(om.ImageBall("linf", 8 / 255))
    assert (method.steps, method.start, method.smoothing) == (1, "uniform", 0.5)
    assert (method.regularisation, method.iterations, method.tolerance) == (0.01, 100, 0.1)
    assert METHODS.build(describe(method)) == method
    assert method.attacks == (om.PGD(om.ImageBall("linf", 8 / 255), steps=10),)


def test_examples_scatter_the_features(network, dataset):
    step = make_step(network, dataset)
    method = FeatureScattering(om.ImageBall(radius=0.05), step_size=0.02, steps=5)
    method.loss(step)
    frozen = copy.deepcopy(network).eval()
    start = method.threat.around(step.images, step.labels).random(
        "uniform", step.seed, step.indices
    )
    with torch.no_grad():
        clean = frozen(step.images)
        before = plain_distance(clean, frozen(step.images + start["image"]))
        after = plain_distance(clean, frozen(step.made[0]))
    assert after > 1.5 * before
    change = (step.made[0] - step.images).abs()
    assert change.max() <= 0.05 + 1e-12
    assert change.amax((1, 2, 3)).min() > 0.01


@pytest.mark.parametrize("joint", [False, True])
def test_other_threat_models(network, coded, tint, joint):
    latent = om.LatentBall(tint, norm="linf", radius=0.3)
    threat = om.JointBall(om.ImageBall(radius=0.05), latent) if joint else latent
    step = make_step(network, coded)
    frozen = copy.deepcopy(network).eval()
    region = threat.around(step.images, step.labels, step.codes)
    leaves = {
        name: tensor.requires_grad_()
        for name, tensor in region.random("uniform", step.seed, step.indices).items()
    }
    distance = plain_distance(frozen(step.images).detach(), frozen(region.render(leaves)))
    slopes = torch.autograd.grad(distance, list(leaves.values()))
    radii = {"latent": 0.3, "image": 0.05}
    moved = {
        name: (leaf + radii[name] * slope.sign()).clamp(-radii[name], radii[name]).detach()
        for (name, leaf), slope in zip(leaves.items(), slopes, strict=True)
    }
    expected = region.render(moved).clamp(0, 1)
    FeatureScattering(threat).loss(step)
    torch.testing.assert_close(step.made[0], expected, rtol=0, atol=1e-12)


def test_an_example_depends_on_the_others_of_its_batch(network, dataset):
    whole, part = make_step(network, dataset), make_step(network, dataset, count=5)
    method = FeatureScattering(BALL)
    method.loss(whole)
    method.loss(part)
    assert not torch.equal(whole.made[0][:5], part.made[0])
    # Where each starts does not.
    still = FeatureScattering(BALL, step_size=0.0)
    starts = [make_step(network, dataset, count=count) for count in (12, 5)]
    for step in starts:
        still.loss(step)
    assert torch.equal(starts[0].made[0][:5], starts[1].made[0])


def test_a_step_looked_at_again_has_the_same_examples(network, dataset):
    step = make_step(network, dataset)
    method = FeatureScattering(BALL)
    seen = []
    step.model = lambda images: seen.append(images) or network(images)
    method.loss(step)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1)
    again = step.again()
    method.loss(again)
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])
    assert len(step.made) == 1
    assert again.made == []
    with pytest.raises(StopIteration):
        next(again.given)


def test_examples_are_the_same_again_and_leave_the_model_untouched(network, dataset):
    before = copy.deepcopy(network.double().state_dict())
    made = []
    for _ in range(2):
        step = make_step(network, dataset)
        method = FeatureScattering(BALL)
        method._examples(step)
        made.append(step.made[0])
    assert torch.equal(*made)
    assert not made[0].requires_grad
    assert all(part.training for part in network.modules())
    assert all(parameter.requires_grad for parameter in network.parameters())
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    other = make_step(network, dataset, seed=6)
    FeatureScattering(BALL)._examples(other)
    assert not torch.equal(other.made[0], made[0])


@pytest.mark.parametrize("fields", [{}, {"attack_precision": "bf16", "precision": "bf16-mixed"}])
def test_it_trains(network, dataset, fields):
    config = TrainingConfig(epochs=4, batch_size=30, threads=1, **fields)
    results = [train(FeatureScattering(BALL), network, dataset, config) for _ in range(2)]
    assert results[0].history[-1]["train_accuracy"] > 0.8
    assert results[0].history[0]["validation_robust_accuracy"] is not None
    # Smoothed to one half, the loss cannot fall below the entropy of (1/2, 1/4, 1/4).
    assert results[0].history[-1]["train_loss"] > 1.5 * math.log(2) - 1e-6
    for one, other in zip(*(result.classifier.parameters() for result in results), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"threat": 3}, "threat: expected the threat's name .*found 3"),
        ({"start": "zero"}, r"start: expected one of \['uniform', .*found 'zero'"),
        ({"smoothing": 1.0}, r"smoothing: expected a number in \[0, 1\), found 1.0"),
        ({"smoothing": -0.1}, "smoothing"),
        ({"regularisation": 0.0}, "regularisation: expected a finite number > 0, found 0.0"),
        ({"iterations": 0}, "iterations: expected at least 1, found 0"),
        ({"tolerance": -1.0}, "tolerance: expected a number >= 0"),
        ({"tolerance": float("nan")}, "tolerance"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ConfigError, match=message):
        replace(FeatureScattering(), **fields)


def test_wrong_steps():
    for fields in ({"steps": 0}, {"step_size": -0.1}):
        with pytest.raises(InputError, match=next(iter(fields))):
            FeatureScattering(**fields)
    with pytest.raises(ConfigError, match="smoothing"):
        METHODS.build({"type": "label_smoothing", "smoothing": 1.5})
