"""RayS on linear models, whose boundary is at a known distance."""

import pytest
import torch
from torch import nn

from onmanifold.attacks import RayS, adbd
from onmanifold.foundation.errors import InputError
from onmanifold.threats import ImageBall, JointBall, LatentBall

COUNT, SHAPE = 12, (1, 4, 4)


def linear(seed=0, bias=0.4):
    """Class 1 where w·x + b > 0; about half of the weights are negative."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double()
    weights = torch.randn(16, generator=torch.Generator().manual_seed(seed)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([torch.zeros(16), weights]))
        model[1].bias.copy_(torch.tensor([0.0, bias - weights.sum() / 2]))
    return model


def grey(model, count=COUNT):
    """Images near 1/2, so that no box is in the way, and the labels that the model gives them."""
    generator = torch.Generator().manual_seed(1)
    images = 0.4 + 0.2 * torch.rand(count, *SHAPE, generator=generator).double()
    return images, model(images).argmax(1)


def margins(model, images):
    return (model(images) @ torch.tensor([[-1.0], [1.0]]).double()).squeeze(1).abs().detach()


def test_a_linear_boundary_is_found_at_its_distance():
    model = linear()
    images, labels = grey(model)
    exact = margins(model, images) / model[1].weight[1].abs().sum()
    result = RayS(ImageBall("linf", 0.01), queries=1500)(model, images, labels)
    distance = -result.objective
    # Never below the truth; above it by what single coordinates may leave undecided.
    assert (distance >= exact - 1e-9).all()
    torch.testing.assert_close(distance, exact.detach(), rtol=0.02, atol=2e-3)
    assert adbd(result) == pytest.approx(float(distance.mean()))


def test_the_returned_point_is_the_nearest_one_or_on_the_ball():
    model = linear()
    images, labels = grey(model)
    threat = ImageBall("linf", float(margins(model, images).median() / 13))
    result = RayS(threat, queries=400)(model, images, labels)
    within = -result.objective <= threat.radius
    assert 2 < within.sum() < COUNT - 2
    assert torch.equal(result.success, within)
    size = (result.images - images).abs().flatten(1).amax(1)
    torch.testing.assert_close(size[within], -result.objective[within])
    torch.testing.assert_close(size[~within], torch.full_like(size[~within], threat.radius))


def test_in_l2_and_l1_distances_are_those_of_the_norm():
    model = linear()
    images, labels = grey(model)
    linf = RayS(ImageBall("linf", 0.01), queries=300, tolerance=1e-4)(model, images, labels)
    for norm, factor in (("l2", 4.0), ("l1", 16.0)):
        attack = RayS(ImageBall(norm, 0.01), queries=300, tolerance=1e-4 * factor)
        found = attack(model, images, labels)
        torch.testing.assert_close(found.objective, factor * linf.objective, rtol=1e-6, atol=0)


def test_more_queries_never_find_less():
    model = linear()
    images, labels = grey(model)
    before = torch.full((COUNT,), -torch.inf).double()
    for queries in (2, 5, 20, 21, 50, 200):
        result = RayS(ImageBall("linf", 0.03), queries=queries)(model, images, labels)
        assert (result.objective >= before).all()
        assert (result.forwards <= queries).all()
        before = result.objective


def test_misclassified_images_cost_one_query_and_are_at_distance_0():
    model = linear()
    images, labels = grey(model)
    wrong = torch.arange(COUNT) % 3 == 0
    labels = torch.where(wrong, 1 - labels, labels)
    result = RayS(ImageBall("linf", 0.03), queries=30)(model, images, labels)
    assert (result.objective[wrong] == 0).all()
    assert (result.forwards[wrong] == 1).all()
    assert (result.forwards[~wrong] == 30).all()
    assert (result.backwards == 0).all()
    torch.testing.assert_close(result.images[wrong], images[wrong])


def test_early_stop_leaves_at_the_first_success():
    model = linear()
    images, labels = grey(model)
    threat = ImageBall("linf", 0.2)
    patient = RayS(threat, queries=200)(model, images, labels)
    hasty = RayS(threat, queries=200, early_stop=True)(model, images, labels)
    assert torch.equal(hasty.success, patient.success)
    assert hasty.success.any()
    assert (hasty.forwards[hasty.success] < 100).all()
    assert (hasty.objective <= patient.objective).all()


def test_where_there_is_no_boundary_none_is_found():
    model = linear(bias=100.0)
    images, labels = grey(model)
    result = RayS(ImageBall("linf", 0.1), queries=40)(model, images, labels)
    assert (result.objective == -torch.inf).all()
    assert not result.success.any()
    assert adbd(result) == 1.0


def test_latents_are_searched_up_to_their_radius(plane, images, small_net):
    good = images(40, on_manifold=True)
    batch = (good.images, good.labels, good.codes)
    result = RayS(LatentBall(plane, "linf", 0.3), queries=150)(small_net, *batch)
    found = result.objective > -torch.inf
    assert torch.equal(found, result.success)
    assert (-result.objective[found] <= 0.3).all()
    joint = JointBall(ImageBall("linf", 0.01), LatentBall(plane, "l2", 0.3))
    both = RayS(joint, queries=150)(small_net, *batch)
    assert (-both.objective[both.success] <= 0.01).all()
    # Both variables move in proportion to their radii.
    shares = [both.size["image"] / 0.01, both.size["latent"] / 0.3]
    inside = (good.codes.abs() < 0.65).all(1)
    torch.testing.assert_close(shares[0][inside], shares[1][inside])


@pytest.mark.parametrize("fields", [{"queries": 1}, {"tolerance": 0.0}])
def test_impossible_settings_are_refused(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        RayS(ImageBall(), **fields)


def test_targets_are_refused():
    model = linear()
    images, labels = grey(model)
    with pytest.raises(InputError, match="untargeted"):
        RayS(ImageBall(), queries=5)(model, images, labels, targets=1 - labels)
