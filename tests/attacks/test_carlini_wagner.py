"""Carlini and Wagner's attack on linear models, its confidence, its mask, and PGD on the same loss."""

import pytest
import torch
from torch import nn

from onmanifold.attacks import PGD, CarliniWagner
from onmanifold.foundation.errors import InputError
from onmanifold.objectives import Margin
from onmanifold.threats import ImageBall, JointBall, LatentBall, TransformationBall

COUNT, SHAPE = 8, (1, 4, 4)


def linear(bias=(0.3, 0.0, -0.2)):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)))
        model[1].bias.copy_(torch.tensor(bias) - model[1].weight.sum(1) / 2)
    return model


def grey(model):
    generator = torch.Generator().manual_seed(1)
    images = 0.4 + 0.2 * torch.rand(COUNT, *SHAPE, generator=generator).double()
    return images, model(images).argmax(1)


def exact(model, images, labels, confidence=0.0):
    """The l2 distance to the nearest class boundary, moved out by the confidence."""
    with torch.no_grad():
        logits, weights = model(images), model[1].weight
        gaps = logits.gather(1, labels.unsqueeze(1)) - logits + confidence
        lengths = torch.linalg.vector_norm(weights[labels].unsqueeze(1) - weights, dim=2)
        distance = gaps / lengths.clamp(min=1e-9)
        return distance.scatter(1, labels.unsqueeze(1), torch.inf).amin(1)


@pytest.mark.parametrize("bounds", ["tanh", "clip"])
@pytest.mark.parametrize("confidence", [0.0, 1.0])
def test_a_linear_boundary_is_found_at_its_distance(confidence, bounds):
    model = linear()
    images, labels = grey(model)
    attack = CarliniWagner(
        ImageBall("l2", 3.0),
        steps=150,
        rounds=9,
        step_size=0.02 if bounds == "tanh" else 0.01,
        confidence=confidence,
        first_constant=0.1,
        bounds=bounds,
        early_stop=False,
    )
    result = attack(model, images, labels)
    distance = exact(model, images, labels, confidence)
    assert result.success.all()
    assert (-result.objective >= distance - 1e-9).all()
    torch.testing.assert_close(-result.objective, distance, rtol=0.02, atol=1e-3)
    logits = model(result.images)
    assert (Margin().value(logits, labels) >= confidence - 1e-9).all()


def test_points_beyond_the_radius_are_failures():
    model = linear()
    images, labels = grey(model)
    radius = float(exact(model, images, labels).median()) * 1.05
    attack = CarliniWagner(ImageBall("l2", radius), steps=100, step_size=0.02, first_constant=0.1)
    result = attack(model, images, labels)
    within = -result.objective <= radius
    assert 2 <= within.sum() <= COUNT - 2
    assert torch.equal(result.success, within)
    assert (-result.objective[~within] < torch.inf).all()
    torch.testing.assert_close(
        result.size["image"][~within], torch.full_like(result.objective[~within], radius)
    )
    # With early stop they are searched to the end, the others left.
    assert result.forwards[within].max() < result.forwards[~within].min()


def test_the_true_logit_is_masked_even_where_all_others_are_negative():
    # With 0 in place of the true logit, the largest "other" one is 0, and there is nothing to follow.
    model = linear(bias=(30.0, -5.0, -5.0))
    images, _ = grey(model)
    with torch.no_grad():
        model[1].bias[0] -= model(images)[:, 0].min() - 0.5
    labels = torch.zeros(COUNT, dtype=torch.int64)
    others = model(images)[:, 1:].amax(1)
    assert (others < -1).all()
    attack = CarliniWagner(ImageBall("l2", 5.0), steps=100, step_size=0.03, first_constant=1.0)
    result = attack(model, images, labels)
    assert result.success.all()


def test_clipping_finds_nearer_points_around_black_pixels():
    model = linear()
    images, _ = grey(model)
    images[:, :, :2] = 0.0
    # The boundaries are near, so that the box does not hide them.
    model[1].bias.data -= 0.95 * (model(images).mean(0) - model(images).mean())
    labels = model(images).argmax(1)
    found = {}
    for bounds in ("tanh", "clip"):
        attack = CarliniWagner(
            ImageBall("l2", 3.0),
            steps=100,
            step_size=0.02,
            first_constant=1.0,
            bounds=bounds,
            early_stop=False,
        )
        result = attack(model, images, labels)
        assert result.images.min() >= 0
        assert result.success.all()
        found[bounds] = -result.objective
    assert found["clip"].mean() < 0.95 * found["tanh"].mean()


def test_targets_are_reached():
    model = linear()
    images, labels = grey(model)
    targets = (labels + 1) % 3
    attack = CarliniWagner(ImageBall("l2", 5.0), steps=100, step_size=0.03, first_constant=1.0)
    result = attack(model, images, labels, targets=targets)
    assert result.success.all()
    assert torch.equal(result.predictions, targets)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_latents_are_searched_on_the_manifold(plane, images, small_net, norm):
    good = images(40, on_manifold=True)
    threat = LatentBall(plane, norm, 0.4)
    attack = CarliniWagner(threat, steps=25, rounds=3, step_size=0.1, first_constant=0.1)
    result = attack(small_net, good.images, good.labels, good.codes)
    assert 0.2 < result.success.float().mean() < 1
    decoded = plane.decode(good.codes + result.variables["latent"])
    torch.testing.assert_close(decoded, result.images)


def test_several_variables_are_measured_by_their_radii(plane, images, small_net):
    good = images(40, on_manifold=True)
    threat = JointBall(ImageBall("linf", 0.01), LatentBall(plane, "l2", 0.3))
    attack = CarliniWagner(threat, steps=25, rounds=3, step_size=0.1, early_stop=False)
    result = attack(small_net, good.images, good.labels, good.codes)
    found = -result.objective <= 0.01
    assert 5 < found.sum() < 40
    assert result.success[found].all()
    share = torch.maximum(result.size["image"] / 0.01, result.size["latent"] / 0.3)
    torch.testing.assert_close(share[found] * 0.01, -result.objective[found])


def test_transformations_have_a_box(images, small_net):
    good = images(30)
    attack = CarliniWagner(TransformationBall(0.5), steps=20, rounds=2, step_size=0.1)
    result = attack(small_net, good.images, good.labels)
    assert result.success.sum() > 3
    assert (result.size["transformation"] <= 0.5).all()


@pytest.mark.parametrize(
    "fields",
    [
        {"steps": 0},
        {"rounds": 0},
        {"step_size": 0.0},
        {"confidence": -1.0},
        {"first_constant": 0.0},
        {"bounds": "box"},
    ],
)
def test_impossible_settings_are_refused(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        CarliniWagner(ImageBall("l2", 1.0), **fields)


def test_pgd_on_the_capped_margin_is_the_cw_attack_of_atlds_tables(images, small_net):
    # Its steps follow the gradient of −max(z_y − max over i != y of z_i + 50, 0).
    good = images(20)
    leaf = good.images.clone().requires_grad_()
    logits = small_net(leaf)
    own = logits.gather(1, good.labels.unsqueeze(1)).squeeze(1)
    others = logits.scatter(1, good.labels.unsqueeze(1), -torch.inf).amax(1)
    (-(own - others + 50).clamp(min=0)).sum().backward()
    moved = (good.images + 0.03 * leaf.grad.sign()).clamp(0, 1)
    # Margins stay below 50, so that no sample is done before its last step.
    attack = PGD(
        ImageBall("linf", 0.03), steps=1, step_size=0.03, start="zero", objective=Margin(50.0)
    )
    result = attack(small_net, good.images, good.labels)
    gained = Margin(50.0).value(small_net(moved), good.labels)
    better = gained > Margin(50.0).value(logits, good.labels)
    assert better.sum() > 12
    torch.testing.assert_close(result.images[better], moved[better])
    torch.testing.assert_close(result.objective[better], gained[better])
