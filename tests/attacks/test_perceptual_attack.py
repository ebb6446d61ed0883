"""Attacks on the perceptual ball, and Fast-LPA against a plain loop, sample by sample."""

import copy
from dataclasses import replace

import pytest
import torch

import onmanifold as om
from onmanifold.attacks import (
    APGD,
    FAB,
    FGSM,
    MIA,
    PGD,
    AutoAttack,
    CarliniWagner,
    Engine,
    FastLPA,
    ProjectedAdam,
    RandomPerturbation,
    RayS,
    Square,
)
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.registry import ATTACKS
from onmanifold.manifolds.perceptual import FeatureDistance
from onmanifold.objectives import Margin
from onmanifold.threats import ImageBall, PerceptualBall
from onmanifold.training import AdversarialTraining, Step, TrainingConfig, train

SHAPE = (1, 8, 8)
COUNT = 23
MADE = {
    "fast_lpa": lambda threat: FastLPA(threat, steps=8),
    "fgsm": FGSM,
    "pgd": lambda threat: PGD(threat, steps=6),
    "mia": lambda threat: MIA(threat, steps=6),
    "adam": lambda threat: ProjectedAdam(threat, steps=6, step_size=0.03, restarts=2),
    "random": lambda threat: RandomPerturbation(threat, restarts=4),
    "apgd": lambda threat: APGD(threat, steps=8),
    "autoattack": lambda threat: AutoAttack(threat, steps=4),
    "carlini_wagner": lambda threat: CarliniWagner(
        threat, steps=8, rounds=2, step_size=0.2, first_constant=0.1
    ),
}


@pytest.fixture(params=["self", "external"])
def distance(request, own_net):
    if request.param == "self":
        return "self"
    return FeatureDistance(own_net(torch.float64, seed=4), SHAPE)


@pytest.fixture(params=list(MADE))
def make(request):
    return MADE[request.param]


def run(attack, model, batch, rows=slice(None), dtype=torch.float64):
    return attack(
        model,
        batch.images[rows].to(dtype),
        batch.labels[rows],
        seed=3,
        indices=batch.indices[rows],
    )


def test_radius_0_is_the_identity(make, distance, images, small_net):
    good = images(COUNT)
    result = run(make(PerceptualBall(distance, 0.0)), small_net, good)
    torch.testing.assert_close(result.images, good.images, rtol=0, atol=1e-12)
    assert torch.equal(result.success, small_net(good.images).argmax(1) != good.labels)
    assert (result.size["image"] == 0).all()


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_what_is_returned_is_inside_and_success_is_true_of_it(
    make, distance, images, small_net_32, precision
):
    good = images(COUNT)
    attack = replace(make(PerceptualBall(distance, 0.1)), engine=Engine(precision=precision))
    result = run(attack, small_net_32, good, dtype=torch.float32)
    measure = FeatureDistance(small_net_32, SHAPE) if distance == "self" else distance
    size = measure(good.images.float(), result.images)
    assert (size <= 0.1 * (1 + 1e-5) + 1e-6).all()
    torch.testing.assert_close(result.size["image"], size, rtol=1e-4, atol=1e-5)
    assert result.images.min() >= 0
    assert result.images.max() <= 1
    with torch.no_grad():
        assert torch.equal(result.predictions, small_net_32(result.images).argmax(1))
    assert torch.equal(result.success, result.predictions != good.labels)
    # One label in ten is wrong from the start, and no attack may lose those.
    assert result.success[::10].all()


def test_results_do_not_depend_on_the_batch(make, distance, images, small_net):
    good = images(80)
    attack = make(PerceptualBall(distance, 0.1))
    whole = run(attack, small_net, good)
    assert torch.equal(run(attack, small_net, good).images, whole.images)
    rows = torch.tensor([70, 3, 41, 10])
    part = run(attack, small_net, good, rows)
    torch.testing.assert_close(part.images, whole.images[rows], rtol=0, atol=1e-9)
    assert torch.equal(part.success, whole.success[rows])
    assert torch.equal(part.forwards, whole.forwards[rows])


def test_fast_lpa_finds_most(distance, images, small_net):
    good = images(150)
    threat = PerceptualBall(distance, 0.06)
    rates = [
        run(attack, small_net, good).success.float().mean().item()
        for attack in (RandomPerturbation(threat), PGD(threat, steps=20), FastLPA(threat))
    ]
    assert rates[0] + 0.1 < rates[1] < rates[2] < 1


def plain_fast_lpa(network, distance, image, label, start, radius, steps):
    """Of one sample: the best point inside that is met, the last one projected by bisection."""
    image, point = image.unsqueeze(0), start.unsqueeze(0).clone()

    def margin(moved):
        logits = network(image + moved)[0]
        others = torch.cat([logits[:label], logits[label + 1 :]])
        return (others.max() - logits[label]).clamp(max=1.0)

    def far(moved):
        return distance(image, image + moved)[0]

    met = []
    for step in range(steps):
        point = point.detach().requires_grad_()
        multiplier = 10.0 * 0.1 ** (1 - step / steps)
        value, size = margin(point), far(point)
        if size <= radius:
            met.append((value.item(), point.detach()))
        penalised = value - multiplier * (size - radius).clamp(min=0)
        (gradient,) = torch.autograd.grad(penalised, point)
        if gradient.norm() > 0:
            gradient = gradient / gradient.norm()
        speed = distance(image + point, image + point + 0.1 * gradient)[0] / 0.1 + 1e-4
        length = radius * 0.1 ** (step / steps) / speed
        point = (image + point + length * gradient).clamp(0, 1).detach() - image
    if far(point) > radius:
        low, high = 0.0, 1.0
        for _ in range(10):
            middle = (low + high) / 2
            inside = far(middle * point) <= radius * (1 - 1e-4)
            low, high = (middle, high) if inside else (low, middle)
        point = low * point
    met.append((margin(point).item(), point))
    return image[0] + max(met, key=lambda pair: pair[0])[1][0]


@pytest.mark.parametrize("radius", [0.05, 0.3])
def test_fast_lpa_equals_the_plain_loop(distance, images, small_net, radius):
    good = images(10)
    measure = FeatureDistance(small_net, SHAPE) if distance == "self" else distance
    threat = PerceptualBall(distance, radius)
    region = threat.facing(small_net, good.images).around(good.images, good.labels)
    start = region.random("nearby", 3, good.indices)["image"]
    attack = FastLPA(threat, steps=7, early_stop=False)
    found = attack.examples(small_net, good.images, good.labels, seed=3, indices=good.indices)
    for number in range(10):
        expected = plain_fast_lpa(
            small_net,
            measure,
            good.images[number],
            good.labels[number],
            start[number],
            radius,
            7,
        )
        torch.testing.assert_close(found[number], expected.detach(), rtol=0, atol=1e-9)


def test_examples_for_training_may_stay_where_the_search_ends(distance, images, small_net):
    good = images(COUNT)
    threat = PerceptualBall(distance, 0.1)
    measure = FeatureDistance(small_net, SHAPE) if distance == "self" else distance
    free = FastLPA(threat, steps=8, early_stop=False, project_in_training=False)
    arguments = (small_net, good.images, good.labels)
    loose = free.examples(*arguments)
    tight = replace(free, project_in_training=True).examples(*arguments)
    assert (measure(good.images, tight) <= 0.1 * (1 + 1e-9)).all()
    assert (measure(good.images, loose) > 0.1).any()
    # Where it is judged, it is projected.
    assert (free(*arguments).size["image"] <= 0.1).all()


def test_several_passes_and_workers_change_nothing(images, small_net, monkeypatch):
    good = images(80)
    attack = FastLPA(PerceptualBall("self", 0.1), steps=4)
    whole = run(attack, small_net, good)
    several = run(replace(attack, passes=3), small_net, good)
    torch.testing.assert_close(several.images, whole.images, rtol=0, atol=1e-9)
    monkeypatch.setattr("onmanifold.attacks.engine.suitable_workers", lambda *arguments: 2)
    parts = run(attack, small_net, good)
    torch.testing.assert_close(parts.images, whole.images, rtol=0, atol=1e-9)


def test_fast_perceptual_adversarial_training(own_net, images):
    """Its loss is the cross-entropy on the examples, and the network is left as it was."""
    network, good = own_net(torch.float64), images(20)
    threat = PerceptualBall("self", 0.1)
    network.train()
    before = copy.deepcopy(network)
    arguments = (network, network, good.images, good.labels, None, good.indices, 0, 5)
    step = Step(*arguments)
    loss = AdversarialTraining(FastLPA(threat, steps=4)).loss(step)
    eval_copy = copy.deepcopy(before).eval()
    examples = FastLPA(threat, steps=4, early_stop=False).examples(
        eval_copy, good.images, good.labels, seed=5, indices=good.indices
    )
    torch.testing.assert_close(step.made[0], examples, rtol=0, atol=1e-12)
    expected = torch.nn.functional.cross_entropy(before(examples), good.labels)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert all(part.training for part in network.modules())
    for name, buffer in network.named_buffers():
        torch.testing.assert_close(buffer, before.get_buffer(name))


def test_training_runs(own_net, images):
    good = images(90)
    dataset = om.Dataset(
        name="toy",
        images=(255 * good.images).to(torch.uint8),
        labels=good.labels,
        classes=("a", "b", "c", "d"),
        codes=None,
        indices=torch.arange(90),
        fingerprint="toy",
    )
    method = AdversarialTraining(FastLPA(PerceptualBall("self", 0.1), steps=3))
    config = TrainingConfig(
        epochs=2, batch_size=30, learning_rate=0.001, validation_fraction=0.2, threads=1
    )
    result = train(method, own_net(), dataset, config)
    entry = result.history[-1]
    assert entry["train_loss"] < result.history[0]["train_loss"]
    assert entry["validation_robust_accuracy"] <= entry["validation_accuracy"]


def test_a_specification_builds():
    built = ATTACKS.build({"type": "fast_lpa", "threat": "perceptual_ball", "steps": 10})
    assert built == FastLPA(PerceptualBall(), 10)
    assert built.objective == Margin(confidence=1.0)


def test_attacks_that_go_by_norms_say_so(images, small_net):
    threat = PerceptualBall()
    for kind in (Square, RayS):
        with pytest.raises(InputError, match=f"{kind.__name__} needs variables that a norm bounds"):
            kind(threat)
    with pytest.raises(InputError, match="FAB measures distances between images"):
        run(FAB(threat), small_net, images(3))
    assert list(AutoAttack(threat).cascade) == ["apgd-ce", "apgd-t"]


@pytest.mark.parametrize(
    ("make_wrong", "message"),
    [
        (lambda threat: FastLPA(ImageBall()), "FastLPA needs a PerceptualBall, found ImageBall"),
        (lambda threat: FastLPA(threat, steps=0), "steps: expected at least 1, found 0"),
        (
            lambda threat: FastLPA(threat, step_size=-1.0),
            "step_size: expected a finite number >= 0, found -1",
        ),
        (
            lambda threat: FastLPA(threat, multiplier=float("inf")),
            "multiplier: expected a finite number >= 0, found inf",
        ),
    ],
)
def test_wrong_fields(make_wrong, message):
    with pytest.raises(InputError, match=message):
        make_wrong(PerceptualBall())
