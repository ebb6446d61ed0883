"""The examples of a step without a training: those that the training sees, and nothing else is touched."""

from dataclasses import dataclass

import pytest
import torch

from onmanifold.attacks import PGD
from onmanifold.classifiers import build_classifier
from onmanifold.data import load_dataset
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.weights import weights_digest
from onmanifold.threats import ImageBall
from onmanifold.training import (
    ATLD,
    RLAT,
    AdversarialTraining,
    FeatureScattering,
    Method,
    Normal,
    Staged,
    TrainingConfig,
    train,
    training_examples,
)

BALL = ImageBall("linf", 0.05)
ATTACK = PGD(BALL, steps=3)
METHODS = {
    "adversarial": AdversarialTraining(ATTACK),
    "feature_scattering": FeatureScattering(BALL, smoothing=0.2),
    "atld": ATLD(PGD(BALL, steps=1, step_size=0.05), smoothing=0.2, discriminator_width=8),
    "atld_logits": ATLD(
        PGD(BALL, steps=1, step_size=0.05), invariance="logits", discriminator_width=8
    ),
}
CONFIG = TrainingConfig(epochs=2, batch_size=40, validation_fraction=0)


@pytest.fixture(scope="module")
def data():
    return load_dataset("two_moons", "train", size=80)


def trained(method, data):
    classifier = {"type": "mlp", "hidden": [8, 8], "mean": 0.5, "std": 0.25}
    return train(method, classifier, data, CONFIG)


@pytest.mark.parametrize("name", METHODS)
def test_examples_are_in_the_ball_and_nothing_is_touched(name, data):
    found = trained(METHODS[name], data)
    batch = data.batch(torch.arange(60))
    modules = [found.classifier, *found.players.values()]
    for module in modules:
        module.zero_grad()
    before = [weights_digest(module) for module in modules]
    state = torch.random.get_rng_state()
    options = {"players": found.players, "indices": batch.indices, "seed": 3}
    one, two = (
        training_examples(METHODS[name], found.classifier, batch.images, batch.labels, **options)
        for _ in range(2)
    )
    assert [weights_digest(module) for module in modules] == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(module.training for module in modules)
    assert all(parameter.grad is None for part in modules for parameter in part.parameters())
    assert len(one) == 1
    assert torch.equal(one[0], two[0])
    moved = (one[0] - batch.images).abs()
    assert 0 < float(moved.max()) <= 0.05 + 1e-6
    assert not one[0].requires_grad


def test_they_are_those_of_the_attack(data):
    model = build_classifier({"type": "mlp", "hidden": [8]}, 2, (1, 1, 2), seed=0).eval()
    batch = data.batch(torch.arange(10))
    method = AdversarialTraining(ATTACK, variant="half")
    (found,) = training_examples(method, model, batch.images, batch.labels, seed=5)
    wanted = PGD(BALL, steps=3, early_stop=False).examples(
        model, batch.images[5:], batch.labels[5:], seed=5, indices=torch.arange(5, 10)
    )
    torch.testing.assert_close(found, wanted)


def test_they_are_those_of_a_step_in_training(data):
    """What a method makes in the first step of a training, caught on the way."""
    caught = []

    @dataclass(frozen=True)
    class Watched(Method):
        def loss(self, step):
            loss = METHODS["feature_scattering"].loss(step)
            caught.append((step, step.made[0]))
            return loss

    model = build_classifier({"type": "mlp", "hidden": [8]}, 2, (1, 1, 2), seed=0)
    train(Watched(), model, data, TrainingConfig(epochs=1, validation_fraction=0))
    step, made = caught[0]
    (found,) = training_examples(
        METHODS["feature_scattering"],
        model,
        step.images,
        step.labels,
        indices=step.indices,
        seed=step.seed,
    )
    torch.testing.assert_close(found, made)


def test_rlat_makes_images_and_what_it_does_to_layers_is_none(data):
    model = build_classifier({"type": "mlp", "hidden": [8]}, 2, (1, 1, 2), seed=0)
    batch = data.batch(torch.arange(10))
    (found,) = training_examples(RLAT(0.01), model, batch.images, batch.labels)
    lengths = (found - batch.images).flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full((10,), 0.01))


def test_methods_without_examples_and_early_epochs(data):
    model = build_classifier({"type": "mlp", "hidden": [8]}, 2, (1, 1, 2), seed=0)
    batch = data.batch(torch.arange(10))
    assert training_examples(Normal(), model, batch.images, batch.labels) == []
    staged = Staged(epochs=2, then=METHODS["adversarial"])
    counts = [
        len(training_examples(staged, model, batch.images, batch.labels, epoch=epoch))
        for epoch in (1, 2)
    ]
    assert counts == [0, 1]


def test_wrong_images(data):
    model = build_classifier({"type": "mlp", "hidden": [8]}, 2, (1, 1, 2), seed=0)
    with pytest.raises(InputError, match="images"):
        training_examples(Normal(), model, torch.full((2, 1, 1, 2), 2.0), torch.zeros(2).long())
