"""The perceptual ball: its distance by hand, its projection, steps and random points."""

import pytest
import torch
from torch import nn

from onmanifold.classifiers import build_classifier, save_classifier
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.registry import THREATS
from onmanifold.manifolds.perceptual import FeatureDistance
from onmanifold.threats import PerceptualBall

SHAPE = (1, 8, 8)


@pytest.fixture
def network(own_net):
    """Whose features are compared: not the net that labels the images."""
    return own_net(torch.float64, seed=4)


@pytest.fixture
def make_region(network, images):
    good = images(12)

    def make(radius, rows=slice(None)):
        threat = PerceptualBall(FeatureDistance(network, SHAPE), radius)
        return threat.around(good.images[rows], good.labels[rows]), good.indices[rows]

    return make


def by_hand(network, first, second):
    """Activations by layers, channels at unit length, over the root of the number of places."""

    def features(images):
        found = []
        for number, layer in enumerate(network):
            images = layer(images)
            if isinstance(layer, nn.ReLU):
                unit = images / (images.square().sum(1, keepdim=True) + 1e-8).sqrt()
                found.append((unit / (images.shape[2] * images.shape[3]) ** 0.5).flatten(1))
            assert number < 20
        return torch.cat(found, 1)

    return (features(first) - features(second)).norm(dim=1)


def random_points(region, scale, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"image": scale * torch.randn(12, *SHAPE, generator=generator).double()}


def test_size_is_the_distance_of_the_paper(make_region, network):
    region, _ = make_region(0.1)
    points = random_points(region, 0.1)
    images = region.render(region.zero())
    expected = by_hand(network, images, images + points["image"])
    torch.testing.assert_close(region.size(points)["image"], expected, rtol=1e-10, atol=0)
    assert (region.size(region.zero())["image"] == 0).all()


def test_projection_draws_towards_the_image_until_just_inside(make_region, network):
    region, _ = make_region(0.1)
    points = random_points(region, 0.2)
    boxed = region.ball.boxed(points["image"])
    assert (region.size(points)["image"] > 0.1).all()
    found = region.project(points)["image"]
    size = region.size({"image": found})["image"]
    assert (size <= 0.1).all()
    assert (size >= 0.098).all()
    share = found.flatten(1).norm(dim=1) / boxed.flatten(1).norm(dim=1)
    torch.testing.assert_close(found, boxed * share.view(-1, 1, 1, 1), rtol=0, atol=1e-12)
    images = region.render({"image": found})
    assert images.min() >= 0
    assert images.max() <= 1
    assert torch.equal(region.project({"image": found})["image"], found)


def test_points_inside_stay(make_region):
    region, _ = make_region(0.5)
    points = region.project(random_points(region, 0.001))
    assert torch.equal(points["image"], region.ball.boxed(random_points(region, 0.001)["image"]))


def test_projection_does_not_depend_on_the_batch_and_each_sample_has_its_radius(make_region):
    radii = torch.linspace(0, 0.2, 12).double()
    region, _ = make_region(radii)
    points = random_points(region, 0.2)
    whole = region.project(points)["image"]
    size = region.size({"image": whole})["image"]
    assert (size <= radii).all()
    # Bisected ten times: to a thousandth of the way, and that is not as steep at its end as at its beginning.
    assert (size >= radii - 0.003 * region.size(points)["image"]).all()
    assert (whole[0] == 0).all()
    mask = torch.arange(12) % 3 == 1
    part = region.keep(mask).project({"image": points["image"][mask]})["image"]
    torch.testing.assert_close(part, whole[mask], rtol=0, atol=1e-12)
    # Where nothing is a number, nothing changes.
    broken = {"image": torch.full_like(whole, torch.nan)}
    assert not bool((region.size(region.project(broken))["image"] > radii).any())


@pytest.mark.parametrize("start", ["uniform", "distance", "surface", "nearby", "zero"])
def test_random_points_are_inside_and_each_samples_own(make_region, start):
    region, indices = make_region(0.1)
    points = region.random(start, 3, indices)
    size = region.size(points)["image"]
    assert (size <= 0.1).all()
    if start == "surface":
        assert (size > 0.097).all()
    if start == "distance":
        assert size.min() < 0.04
        assert size.max() > 0.06
    few, rows = make_region(0.1, slice(4, 7))
    part = few.random(start, 3, rows)["image"]
    torch.testing.assert_close(part, points["image"][4:7], rtol=0, atol=1e-10)
    if start not in ("zero", "nearby"):
        assert not torch.equal(region.random(start, 3, indices, 1)["image"], points["image"])


def test_a_step_is_as_long_as_it_says(make_region):
    region, _ = make_region(1.0)
    begin = random_points(region, 0.03)
    gradients = random_points(region, 5.0, seed=1)
    sizes = torch.linspace(0.001, 0.02, 12).double()
    end = region.ascend(begin, gradients, {"image": sizes})
    images = region.render(begin)
    moved = region.ball.distance(images, region.render(end))
    torch.testing.assert_close(moved, sizes, rtol=0.2, atol=0)
    cosine = nn.functional.cosine_similarity(
        (end["image"] - begin["image"]).flatten(1), gradients["image"].flatten(1)
    )
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    zero = {"image": torch.zeros_like(begin["image"])}
    assert torch.equal(region.ascend(begin, zero, {"image": 0.1})["image"], begin["image"])


def test_the_distance_is_differentiable(make_region):
    region, _ = make_region(0.1)
    ball = region.keep(torch.arange(12) < 2).balls["image"]
    points = random_points(region, 0.1)["image"][:2].requires_grad_()
    assert torch.autograd.gradcheck(ball.measured, (points,), eps=1e-7, atol=1e-5)


def test_self_needs_a_model(network, images, tmp_path):
    good = images(3)
    threat = PerceptualBall()
    with pytest.raises(InputError, match="'self' is the attacked model's, which only an attack"):
        threat.around(good.images, good.labels)
    facing = threat.facing(network, good.images)
    assert facing.radius == threat.radius
    other = FeatureDistance(network, SHAPE)
    assert facing.distance.fingerprint == other.fingerprint
    assert facing.facing(None, good.images) is facing


def test_a_classifiers_file(tmp_path, images):
    classifier = build_classifier("resnet18", num_classes=4, image_shape=(1, 16, 16), seed=0)
    path = tmp_path / "classifier.safetensors"
    save_classifier(classifier, path)
    threat = THREATS.build({"type": "perceptual_ball", "distance": str(path), "radius": 0.3})
    assert threat.distance.fingerprint == FeatureDistance(classifier.eval()).fingerprint
    assert THREATS.build("perceptual_ball") == PerceptualBall("self", 0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"radius": -1.0}, "radius: expected a number >= 0"),
        ({"distance": nn.Identity()}, "distance.*found Identity"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(InputError, match=message):
        PerceptualBall(**fields)
