"""Each method's loss and gradient against a plain, slow reference written out here."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

import onmanifold as om
from onmanifold.foundation import randomness
from onmanifold.foundation.errors import ConfigError
from onmanifold.training import (
    DMAT,
    SAM,
    AdversarialTraining,
    Cutout,
    Normal,
    RandomPerturbationTraining,
    Step,
)
from onmanifold.training.methods.base import persistent

STEP_SIZE = 0.05
STEPS = 4


def plain_pgd(network, images, labels, start, radius, first_success):
    """Sign-gradient ascent, one sample after the other: best loss, or the first success."""
    network = copy.deepcopy(network).eval()
    found = []
    for image, label, point in zip(images, labels, start, strict=True):
        best, best_loss = None, -float("inf")
        for step in range(STEPS + 1):
            point = point.detach().requires_grad_()
            logits = network((image + point).unsqueeze(0))
            loss = functional.cross_entropy(logits, label.unsqueeze(0))
            if loss.item() > best_loss:
                best, best_loss = point.detach(), loss.item()
            if first_success and logits.argmax() != label:
                best = point.detach()
                break
            if step < STEPS:
                (gradient,) = torch.autograd.grad(loss, point)
                moved = (point + STEP_SIZE * gradient.sign()).detach().clamp(-radius, radius)
                point = (image + moved).clamp(0, 1) - image
        found.append(image + best)
    return torch.stack(found)


def make_step(network, dataset, seed=5):
    images, labels, codes, indices = dataset.batch(torch.arange(20))
    network = network.double().train()
    codes = None if codes is None else codes.double()
    return Step(network, network, images.double(), labels, codes, indices, 0, seed)


def attack_on(threat):
    return om.PGD(threat, steps=STEPS, step_size=STEP_SIZE)


def gradients(network, loss):
    return torch.autograd.grad(loss, list(network.parameters()))


def assert_same_gradients(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", ["full", "half", "weak"])
def test_adversarial_training_equals_the_reference(network, dataset, variant):
    threat = om.ImageBall(radius=0.1)
    step = make_step(network, dataset)
    reference = copy.deepcopy(network)
    clean = 0 if variant == "full" else 10
    region = threat.around(step.images, step.labels)
    start = region.random("uniform", step.seed, step.indices)["image"]
    examples = plain_pgd(
        reference,
        step.images[clean:],
        step.labels[clean:],
        start[clean:],
        0.1,
        first_success=variant == "weak",
    )
    mixed = torch.cat([step.images[:clean], examples])
    expected = functional.cross_entropy(reference(mixed), step.labels)

    loss = AdversarialTraining(attack_on(threat), variant).loss(step)

    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    assert_same_gradients(gradients(network, loss), gradients(reference, expected))
    assert step.counted == 20
    assert step.correct == (reference(mixed).argmax(1) == step.labels).sum()


def test_weak_and_half_differ(network, dataset):
    threat = om.ImageBall(radius=0.1)
    losses = [
        AdversarialTraining(attack_on(threat), variant).loss(make_step(network, dataset)).item()
        for variant in ("half", "weak")
    ]
    assert losses[0] > losses[1]


@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.0, 1.0), (0.2, 0.8)])
def test_dmat_equals_the_reference(network, coded, tint, weights):
    image, latent = om.ImageBall(radius=0.1), om.LatentBall(tint, radius=0.2)
    step = make_step(network, coded)
    reference = copy.deepcopy(network)
    off, on = (
        persistent(attack_on(threat)).examples(
            reference, step.images, step.labels, step.codes, seed=step.seed, indices=step.indices
        )
        for threat in (image, latent)
    )
    expected = weights[0] * functional.cross_entropy(reference(off), step.labels)
    expected = expected + weights[1] * functional.cross_entropy(reference(on), step.labels)

    loss = DMAT(attack_on(image), attack_on(latent), *weights).loss(step)

    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert_same_gradients(gradients(network, loss), gradients(reference, expected))
    assert not torch.equal(off, on)
    assert step.counted == 40


def test_normal_training_is_cross_entropy(network, dataset):
    step = make_step(network, dataset)
    reference = copy.deepcopy(network)
    expected = functional.cross_entropy(reference(step.images), step.labels)
    torch.testing.assert_close(Normal().loss(step), expected, rtol=0, atol=0)


def test_cutout_equals_the_reference(network, dataset):
    step = make_step(network, dataset)
    reference = copy.deepcopy(network)
    height, width = step.images.shape[2:]
    places = [
        randomness.integers(step.seed, step.indices, size, stream=f"cutout/{name}/0").tolist()
        for name, size in (("rows", height), ("columns", width))
    ]
    images = step.images.clone()
    for image, row, column in zip(images, *places, strict=True):
        image[:, max(row - 2, 0) : row + 2, max(column - 2, 0) : column + 2] = 0
    assert not torch.equal(images, step.images)
    expected = functional.cross_entropy(reference(images), step.labels)

    loss = Cutout(side=4).loss(step)
    torch.testing.assert_close(loss, expected)
    assert_same_gradients(gradients(network, loss), gradients(reference, expected))
    assert step.counted == 20


def test_cutout_moves_with_the_seed_and_not_within_a_step(network, dataset):
    def seen_with(seed, method):
        step, seen = make_step(network, dataset, seed=seed), []
        step.model = lambda images: seen.append(images) or network(images)
        for turn in method.turns(step):
            assert turn["classifier"].isfinite()
        return seen

    (first,), (other,) = seen_with(1, Cutout(side=3)), seen_with(2, Cutout(side=3))
    assert not torch.equal(first, other)
    before, after = seen_with(1, SAM(Cutout(side=3)))
    assert torch.equal(before, first)
    assert torch.equal(after, first)


def test_cutout_needs_a_square():
    with pytest.raises(ConfigError, match="side: expected at least 1, found 0"):
        Cutout(side=0)


@pytest.mark.parametrize(("variant", "clean"), [("full", 0), ("half", 10)])
@pytest.mark.parametrize("start", ["uniform", "distance"])
def test_random_perturbations_are_in_the_ball_and_not_optimised(
    network, dataset, variant, clean, start
):
    threat = om.ImageBall(radius=0.1)
    step = make_step(network, dataset)
    seen = []
    step.model = lambda images: seen.append(images) or network(images)
    RandomPerturbationTraining(threat, variant, start).loss(step)
    (images,) = seen
    change = images - step.images
    assert torch.equal(images[:clean], step.images[:clean])
    assert (change.abs() <= 0.1 + 1e-12).all()
    assert (change[clean:].abs().amax((1, 2, 3)) > 0).all()
    expected = threat.around(step.images[clean:], step.labels[clean:]).random(
        start, step.seed, step.indices[clean:]
    )["image"]
    torch.testing.assert_close(change[clean:], expected, rtol=0, atol=1e-12)


def test_random_transformations_lie_around_the_identity(network, dataset):
    # The released code of this baseline samples the scale around 0, so that it is clipped at its bound.
    threat = om.TransformationBall()
    step = make_step(network, dataset)
    region = threat.around(step.images.repeat(200, 1, 1, 1), step.labels.repeat(200))
    points = region.random("uniform", 0, torch.arange(4000))["transformation"]
    assert points.mean(0).abs().max() < 0.05
    assert points.abs().amax(0).min() > 0.99
    seen = []
    step.model = lambda images: seen.append(images) or network(images)
    RandomPerturbationTraining(threat).loss(step)
    assert not torch.equal(seen[0], step.images)


def test_examples_leave_the_model_in_train_mode_and_untouched(network, dataset):
    step = make_step(network, dataset)
    before = copy.deepcopy(network.state_dict())
    examples = step.examples(persistent(attack_on(om.ImageBall(radius=0.1))))
    assert network.training
    assert all(part.training for part in network.modules())
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not examples.requires_grad
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_training_does_all_steps_whatever_the_attack_says():
    stopping = om.PGD(om.ImageBall(), early_stop=True)
    assert persistent(stopping) == replace(stopping, early_stop=False)
    assert persistent(replace(stopping, early_stop=False), early_stop=True) == stopping


@pytest.mark.parametrize(
    "make", [RandomPerturbationTraining, lambda threat: om.training.FeatureScattering(threat)]
)
def test_perceptual_balls_of_the_models_own_features(network, dataset, make):
    step = make_step(network, dataset)
    seen, before = [], copy.deepcopy(network).eval()
    step.model = lambda images: seen.append(images) or network(images)
    make(om.PerceptualBall(radius=0.1)).loss(step)
    threat = om.PerceptualBall(radius=0.1).facing(before, step.images)
    region = threat.around(step.images, step.labels)
    sizes = region.size({"image": seen[0] - step.images})["image"]
    assert sizes.max() <= 0.1 * (1 + 1e-3)
    assert sizes.max() > 0.01
    assert network.training
