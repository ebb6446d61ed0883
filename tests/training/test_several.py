"""Several threat models at once, and stages."""

import copy

import pytest
import torch
from torch.nn import functional

import onmanifold as om
from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.registry import METHODS
from onmanifold.training import (
    AdversarialTraining,
    JointAdversarialTraining,
    Normal,
    Staged,
    Step,
)
from onmanifold.training.methods.base import persistent


def make_step(network, dataset, epoch=0):
    images, labels, codes, indices = dataset.batch(torch.arange(20))
    codes = None if codes is None else codes.double()
    network = network.double().train()
    return Step(network, network, images.double(), labels, codes, indices, epoch, 5)


@pytest.fixture
def attacks(tint):
    threats = om.ImageBall("l1", 2.0), om.ImageBall("linf", 0.05), om.LatentBall(tint, radius=0.3)
    return tuple(om.PGD(threat, steps=3) for threat in threats)


def losses_of(network, step, attacks):
    """Of each attack's examples, per sample: as the network judges in train mode, and in eval mode."""
    examples = [
        persistent(attack).examples(
            copy.deepcopy(network),
            *(step.images, step.labels, step.codes),
            seed=step.seed,
            indices=step.indices,
        )
        for attack in attacks
    ]
    judge = copy.deepcopy(network).eval()
    judged = [
        functional.cross_entropy(judge(images), step.labels, reduction="none")
        for images in examples
    ]
    return examples, torch.stack(judged)


@pytest.mark.parametrize("combine", ["mean", "sum", "worst"])
def test_combinations_equal_the_reference(network, coded, attacks, combine):
    step = make_step(network, coded)
    reference = copy.deepcopy(network)
    examples, judged = losses_of(network, step, attacks)
    if combine == "worst":
        rows = zip(judged.argmax(0).tolist(), range(20), strict=True)
        worst = torch.stack([examples[which][row] for which, row in rows])
        expected = functional.cross_entropy(reference(worst), step.labels)
        assert len(judged.argmax(0).unique()) > 1
    else:
        expected = sum(
            functional.cross_entropy(reference(images), step.labels) for images in examples
        )
        expected = expected / 3 if combine == "mean" else expected
    loss = JointAdversarialTraining(attacks, combine).loss(step)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    found = torch.autograd.grad(loss, list(network.parameters()))
    wanted = torch.autograd.grad(expected, list(reference.parameters()))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_the_first_stage_ends_after_its_epochs(network, dataset):
    attack = om.PGD(om.ImageBall(radius=0.2), steps=3)
    method = Staged(AdversarialTraining(attack), epochs=2)
    for epoch, plain in [(0, Normal()), (1, Normal()), (2, method.then), (9, method.then)]:
        loss = method.loss(make_step(copy.deepcopy(network), dataset, epoch))
        expected = plain.loss(make_step(copy.deepcopy(network), dataset, epoch))
        torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    assert method.attacks == (attack,)


def test_specifications_and_errors(attacks):
    pgd = {"type": "pgd", "threat": {"type": "image_ball", "radius": 0.1}}
    spec = {"type": "joint", "against": [pgd, {**pgd, "steps": 3}], "combine": "worst"}
    built = METHODS.build({"type": "staged", "then": spec, "epochs": 3})
    assert built.then.attacks[1].steps == 3
    assert built.first == Normal()
    with pytest.raises(ConfigError, match="against: expected two or more attacks, found 1"):
        JointAdversarialTraining(attacks[:1])
    with pytest.raises(ConfigError, match=r"combine: .*found 'both'"):
        JointAdversarialTraining(attacks, "both")
    with pytest.raises(ConfigError, match="epochs: expected a number >= 0"):
        Staged(Normal(), -1)
    with pytest.raises(ConfigError, match=r"then: .*found 3"):
        Staged(3, 1)


def test_a_second_look_has_the_same_worst_examples(network, coded, attacks):
    step = make_step(network, coded)
    method = JointAdversarialTraining(attacks, "worst")
    method.loss(step)
    chosen = step.made[-1]
    with torch.no_grad():
        for weight in network.parameters():
            weight += torch.randn_like(weight)
    seen = []
    again = step.again()
    again.model = lambda images: seen.append(images) or network(images)
    method.loss(again)
    assert torch.equal(seen[0], chosen)
