"""TRADES and MART against plain, slow references; numbers worked out by hand are in tests/golden."""

import copy
import math

import pytest
import torch
from torch.nn import functional

import onmanifold as om
from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.registry import METHODS
from onmanifold.objectives import divergence
from onmanifold.training import MART, TRADES, Step
from onmanifold.training.methods.trades import boosted_cross_entropy


def make_step(network, dataset):
    images, labels, codes, indices = dataset.batch(torch.arange(20))
    codes = None if codes is None else codes.double()
    network = network.double().train()
    return Step(network, network, images.double(), labels, codes, indices, 0, 5)


def entropies(clean, perturbed):
    """KL of the two softmax distributions, one number after the other."""
    found = []
    for row, other in zip(clean.tolist(), perturbed.tolist(), strict=True):
        p = [math.exp(z) / sum(map(math.exp, row)) for z in row]
        q = [math.exp(z) / sum(map(math.exp, other)) for z in other]
        found.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    return found


def assert_same_gradients(network, loss, reference, expected):
    found = torch.autograd.grad(loss, list(network.parameters()))
    wanted = torch.autograd.grad(expected, list(reference.parameters()))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_divergence_number_by_number():
    clean, perturbed = torch.randn(6, 4).double(), torch.randn(6, 4).double()
    assert divergence(clean, perturbed).tolist() == pytest.approx(entropies(clean, perturbed))
    assert not divergence(clean, clean).abs().gt(1e-12).any()


def test_boosted_cross_entropy_of_the_sure_and_wrong_is_large_and_finite():
    assert boosted_cross_entropy(torch.tensor([[200.0, 0.0]]), torch.tensor([1])).isfinite()


def maximise(network, step, region, names, steps, size, value):
    """Steepest ascent by hand in eval mode, from the region's near start; the best point of each sample."""
    network = copy.deepcopy(network).eval()
    point = region.random("nearby", step.seed, step.indices)
    best, most = point, torch.full((len(step.images),), -torch.inf, dtype=torch.float64)
    for number in range(steps + 1):
        point = {name: tensor.detach().requires_grad_() for name, tensor in point.items()}
        values = value(network(region.render(point)), network(step.images).detach())
        better = values > most
        best = {
            name: torch.where(better.view(-1, *[1] * (t.ndim - 1)), t.detach(), best[name])
            for name, t in point.items()
        }
        most = torch.maximum(most, values.detach())
        if number < steps:
            slopes = torch.autograd.grad(values.sum(), [point[name] for name in names])
            moved = {
                name: point[name] + size * slope.sign()
                for name, slope in zip(names, slopes, strict=True)
            }
            point = region.project({name: tensor.detach() for name, tensor in moved.items()})
    return region.render(best).detach().clamp(0, 1)


def attack(threat, **options):
    options = {"steps": 3, "step_size": 0.04, "start": "nearby", **options}
    return om.PGD(threat, **options)


@pytest.mark.parametrize("kinds", [("image",), ("latent",), ("image", "latent")])
def test_trades_equals_the_reference(network, coded, tint, kinds):
    threats = {"image": om.ImageBall(radius=0.1), "latent": om.LatentBall(tint, radius=0.2)}
    step = make_step(network, coded)
    reference = copy.deepcopy(network)
    examples = [
        maximise(
            *(reference, step, threats[kind].around(step.images, step.labels, step.codes)),
            *([kind], 3, 0.04, lambda perturbed, clean: divergence(clean, perturbed)),
        )
        for kind in kinds
    ]
    clean = reference(step.images)
    expected = functional.cross_entropy(clean, step.labels)
    for weight, images in zip((2.0, 0.5), examples, strict=False):
        q = reference(images).log_softmax(1)
        p = clean.softmax(1)
        expected = expected + weight * (p * (p.log() - q)).sum(1).mean()

    attacks = [attack(threats[kind]) for kind in kinds]
    if len(kinds) == 1:
        method = TRADES(attacks[0], weight=2.0)
    else:
        method = TRADES(attacks[0], 2.0, latent_attack=attacks[1], latent_weight=0.5)
    loss = method.loss(step)

    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    assert_same_gradients(network, loss, reference, expected)
    assert step.counted == 20
    assert list(method.attacks) == attacks


def test_trades_on_a_joint_ball(network, coded, tint):
    threat = om.JointBall(om.ImageBall(radius=0.1), om.LatentBall(tint, radius=0.2))
    step = make_step(network, coded)
    reference = copy.deepcopy(network)
    examples = maximise(
        *(reference, step, threat.around(step.images, step.labels, step.codes)),
        *(["image", "latent"], 3, 0.04, lambda perturbed, clean: divergence(clean, perturbed)),
    )
    clean = reference(step.images)
    expected = functional.cross_entropy(clean, step.labels)
    expected = expected + 6 * divergence(clean, reference(examples)).mean()
    step_size = {"image": 0.04, "latent": 0.04}
    loss = TRADES(attack(threat, step_size=step_size)).loss(step)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)


def test_mart_equals_the_reference(network, dataset):
    threat = om.ImageBall(radius=0.1)
    step = make_step(network, dataset)
    reference = copy.deepcopy(network)

    def loss_of(perturbed, clean):
        return functional.cross_entropy(perturbed, step.labels, reduction="none")

    region = threat.around(step.images, step.labels)
    examples = maximise(reference, step, region, ["image"], 3, 0.04, loss_of)
    perturbed, clean = reference(examples), reference(step.images)
    rows, q, p = torch.arange(20), perturbed.softmax(1), clean.softmax(1)
    others = q.clone()
    others[rows, step.labels] = -1
    boosted = -q[rows, step.labels].log() - (1.0001 - others.amax(1) + 1e-12).log()
    aware = (p * (p.log() - q.log())).sum(1) * (1.0000001 - p[rows, step.labels])
    expected = boosted.mean() + 3 * aware.mean()

    loss = MART(attack(threat), weight=3.0).loss(step)

    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    assert_same_gradients(network, loss, reference, expected)


def test_trades_maximises_the_divergence_whatever_the_attack_says(network, dataset):
    plain = attack(om.ImageBall(radius=0.1))
    stopping = attack(om.ImageBall(radius=0.1), objective=om.Margin(), early_stop=True)
    losses = [
        TRADES(chosen).loss(make_step(copy.deepcopy(network), dataset))
        for chosen in (plain, stopping)
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)


def test_errors():
    ball = om.ImageBall()
    with pytest.raises(ConfigError, match="weight: expected a finite number >= 0, found -1"):
        TRADES(om.PGD(ball), weight=-1.0)
    with pytest.raises(ConfigError, match="follows no objective"):
        TRADES(om.RayS(ball))
    with pytest.raises(om.OnManifoldError, match="no gradient at the clean image"):
        TRADES(om.PGD(ball, start="zero"))
    with pytest.raises(ConfigError, match="latent_weight: expected a latent_attack beside it"):
        TRADES(om.PGD(ball), latent_weight=0.5)
    with pytest.raises(ConfigError, match=r"latent_attack: .*'threat' is missing"):
        TRADES(om.PGD(ball), latent_attack="pgd")
    with pytest.raises(ConfigError, match=r"attack: .*'threat' is missing"):
        MART("pgd")


def test_specifications():
    pgd = {"type": "pgd", "threat": {"type": "image_ball", "radius": 0.1}, "start": "nearby"}
    built = METHODS.build({"type": "trades", "attack": pgd, "weight": 1})
    assert built == TRADES(om.PGD(om.ImageBall(radius=0.1), start="nearby"), weight=1.0)
    assert METHODS.build({"type": "mart", "attack": pgd}).weight == 5.0
