"""Inference with manifold transformation: its step, its sign, its gradients, and its evaluation from files."""

import math

import pytest
import torch
from torch import nn

import onmanifold as om
from onmanifold.attacks import PGD
from onmanifold.classifiers import Discriminator, load_discriminator
from onmanifold.data.dataset import Dataset
from onmanifold.evaluation import IMT
from onmanifold.evaluation.defence_evaluation import evaluate_defence, ways_through
from onmanifold.evaluation.defences import Differentiable, Unrolled
from onmanifold.foundation.errors import InputError
from onmanifold.threats import ImageBall
from onmanifold.training import TrainingConfig, train
from onmanifold.training.methods import ATLD

SHAPE = (1, 6, 6)
BALL = ImageBall("linf", 0.06)


class Smooth(nn.Module):
    """A classifier that shows its last hidden layer."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.Tanh())
        self.head = nn.Linear(12, 4)

    def features(self, images):
        return self.body(images)

    def forward(self, images):
        return self.head(self.features(images))


def make_pair(dtype=torch.float64, reads="last_hidden", seed=2):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Smooth()
        discriminator = Discriminator(12 if reads == "last_hidden" else 4, 4, 8, 2, reads)
        for parameter in [*classifier.parameters(), *discriminator.parameters()]:
            parameter.data *= 3
    return classifier.eval().to(dtype), discriminator.eval().to(dtype)


def some_images(count=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    return torch.rand(count, *SHAPE, generator=generator).to(dtype)


def some_dataset(classifier, count=16):
    images = some_images(count, torch.float32)
    with torch.no_grad():
        labels = classifier(images).argmax(1)
    return Dataset("toy", images, labels, tuple("abcd"), "toy", indices=torch.arange(count))


class Line(nn.Module):
    """The logit of D is w · x + b, with the same w for each image."""

    def __init__(self, weight, bias=0.0):
        super().__init__()
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(36, 2, bias=False))
        self.classifier[1].weight.data.copy_(torch.stack([weight, torch.zeros(36)]))
        self.discriminator = Discriminator(2, 2, 1, 0, "logits")
        self.discriminator.layers[0].weight.data.zero_()
        self.discriminator.layers[0].weight.data[0, 0] = 1.0
        self.discriminator.layers[0].bias.data.zero_()
        self.discriminator.layers[0].bias.data[0] = bias


def test_the_step_against_the_slope_of_log_d_by_hand():
    # D = σ(w·x + b), so that ∇ log D = (1 − D) w: the step is −8/255 sign(w), whatever the image.
    weight = torch.linspace(-1, 1, 36)
    line = Line(weight, 0.3)
    images = some_images(dtype=torch.float32)
    expected = (images - 8 / 255 * weight.sign().view(SHAPE)).clamp(0, 1)
    torch.testing.assert_close(IMT(line.classifier, line.discriminator).transform(images), expected)
    # Also where D rounds to 1, and log D has no slope left.
    sure = Line(weight, 200.0)
    torch.testing.assert_close(IMT(sure.classifier, sure.discriminator).transform(images), expected)


@pytest.mark.parametrize("reads", ["last_hidden", "logits"])
def test_images_move_to_where_the_discriminator_sees_natural_ones(reads):
    """Both descriptions in paper and code: log D falls, and so does the cross-entropy towards natural."""
    classifier, discriminator = make_pair(reads=reads)
    images = some_images()
    leaf = images.clone().requires_grad_()
    features = classifier.features(leaf) if reads == "last_hidden" else classifier(leaf)
    adversarial = torch.sigmoid(discriminator(features)[:, 0])
    (slope,) = torch.autograd.grad(adversarial.log().sum(), leaf, retain_graph=True)
    natural = torch.nn.functional.binary_cross_entropy(
        1 - adversarial, torch.ones(6).double(), reduction="sum"
    )
    (other,) = torch.autograd.grad(natural, leaf)
    assert torch.equal(slope.sign(), other.sign())
    defence = IMT(classifier, discriminator, step_size=0.01)
    found = defence.transform(images)
    torch.testing.assert_close(found, (images - 0.01 * slope.sign()).clamp(0, 1))
    assert (defence.manifold_output(found) < defence.manifold_output(images)).all()
    torch.testing.assert_close(defence(images), classifier(found))


@pytest.mark.parametrize(
    ("probability", "plus"),
    [(0.1, 1.0), (0.29, 1.0), (0.31, 0.5), (0.5, 0.5), (0.69, 0.5), (0.71, 1.0), (0.99, 1.0)],
)
def test_imt_plus_halves_the_step_where_the_discriminator_is_unsure(probability, plus):
    line = Line(torch.zeros(36) + 1e-6, math.log(probability / (1 - probability)))
    image = torch.full((1, *SHAPE), 0.5)
    pair = line.classifier, line.discriminator

    def step(defence):
        return (image - defence.transform(image)).unique().item()

    assert step(IMT(*pair)) == pytest.approx(8 / 255, rel=1e-5)
    assert step(IMT.plus(*pair)) == pytest.approx(plus * 8 / 255, rel=1e-5)
    assert step(IMT.plus(*pair, step_size=0.1)) == pytest.approx(plus * 0.1, rel=1e-5)
    below = IMT(*pair, step_size=0.1, uncertain=(0.0, 0.5001), factor=0.3)
    assert step(below) == pytest.approx(0.1 * (0.3 if probability <= 0.5 else 1.0), rel=1e-5)


def test_each_image_for_itself():
    classifier, discriminator = make_pair()
    defence = IMT.plus(classifier, discriminator)
    images = some_images(9)
    together = defence.transform(images)
    alone = torch.cat([defence.transform(image.unsqueeze(0)) for image in images])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-15)
    assert together.min() >= 0
    assert together.max() <= 1
    lengths = (together - images).abs().amax((1, 2, 3))
    assert lengths.max().item() == pytest.approx(8 / 255)


# Gradients.


def gradient_of(model, images, weights):
    leaf = images.clone().requires_grad_()
    (slope,) = torch.autograd.grad((model(leaf) * weights).sum(), leaf)
    return slope


@pytest.mark.parametrize("softness", [1.0, 0.3])
def test_the_unrolled_gradient_is_that_of_a_soft_sign(softness):
    classifier, discriminator = make_pair()
    defence = IMT(classifier, discriminator, step_size=0.05, softness=softness)
    images = 0.2 + 0.6 * some_images()
    weights = torch.randn(6, 4, generator=torch.Generator().manual_seed(7)).double()
    slope = gradient_of(Unrolled(defence), images, weights)
    at_seen = gradient_of(classifier, defence.transform(images), weights)

    def soft(points):
        """The transformation with a soft sign, its inner slope by hand."""
        hidden = torch.tanh(
            points.flatten(1) @ classifier.body[1].weight.T + classifier.body[1].bias
        )
        features = hidden.detach().requires_grad_()
        outer = torch.autograd.grad(discriminator(features)[:, 0].sum(), features)[0]
        inner = (outer * (1 - hidden**2)) @ classifier.body[1].weight
        size = softness * inner.abs().mean(1, keepdim=True)
        return points - 0.05 * torch.tanh(inner / size).view_as(points)

    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(8)).double()
    step = 1e-6
    numeric = (soft(images + step * direction) - soft(images - step * direction)) / (2 * step)
    expected = (at_seen * numeric).sum((1, 2, 3))
    found = (slope * direction).sum((1, 2, 3))
    torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=1e-9)
    # The direct path is another gradient: the test would notice.
    direct = gradient_of(Differentiable(defence), images, weights)
    torch.testing.assert_close(direct, at_seen)
    assert (slope - direct).norm() > 0.05 * direct.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [IMT, IMT.plus])
def test_every_way_applies_and_has_the_values_of_the_defence(dtype, make):
    defence = make(*make_pair(dtype))
    images = some_images(dtype=dtype)
    ways, left_out = ways_through(defence, images)
    assert set(ways) == {"differentiable", "BPDA", "unrolled"}
    assert not left_out
    expected = defence(images)
    for way in ways.values():
        for context in (torch.no_grad, torch.enable_grad, torch.inference_mode):
            with context():
                assert torch.equal(way(images.clone().requires_grad_()), expected)
    assert torch.equal(defence.transform(images, differentiable=True), defence.transform(images))


def test_an_image_without_a_slope_stays_where_it_is():
    line = Line(torch.zeros(36))
    defence = IMT(line.classifier, line.discriminator)
    images = some_images(dtype=torch.float32).requires_grad_()
    assert torch.equal(defence.transform(images), images)
    found = defence.transform(images, differentiable=True)
    assert torch.equal(found, images)
    (slope,) = torch.autograd.grad(found.sum(), images)
    assert slope.isfinite().all()


# From a training to an evaluation.


def toy_dataset(count=90):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (count,), generator=generator)
    images = torch.randint(0, 120, (count, 1, 8, 8), generator=generator)
    for number, label in enumerate(labels.tolist()):
        images[number, 0, 2:6, 3 * label : 3 * label + 2] += 130
    indices = torch.arange(count)
    return Dataset("toy", images.to(torch.uint8), labels, tuple("abc"), "toy", indices=indices)


@pytest.mark.parametrize("reads", ["last_hidden", "logits"])
def test_trained_saved_loaded_and_attacked_in_every_way(tmp_path, reads):
    dataset = toy_dataset()
    attack = PGD(BALL, steps=1, step_size=0.06)
    method = ATLD(attack, discriminator_features=reads, discriminator_width=16)
    classifier = om.build_classifier("conv_net", 3, (1, 8, 8), 0, channels=(4, 6), hidden=10)
    config = TrainingConfig(epochs=4, batch_size=30, learning_rate=0.02, threads=1)
    result = train(method, classifier, dataset, config, directory=tmp_path)
    loaded = om.load_classifier(tmp_path / "best.safetensors")
    discriminator = load_discriminator(tmp_path / "discriminator.safetensors")
    few = dataset.take(12)
    images = few.batch(torch.arange(12)).images
    for make in (IMT, IMT.plus):
        defence = make(loaded, discriminator, step_size=0.06)
        same = make(result.classifier, result.players["discriminator"], step_size=0.06)
        assert torch.equal(defence(images), same(images))
        found = evaluate_defence(
            defence,
            few,
            BALL,
            attacks={"PGD": PGD(BALL, steps=4)},
            black_box={"Square": om.Square(BALL, queries=20)},
            batch_size=6,
        )
        assert {"differentiable", "BPDA", "unrolled", "black box"} < set(found.protocols)
        assert not found.left_out
        assert not found.random
        assert found.accuracy() <= found.accuracy("standard") <= 1
        assert found.static.accuracy("PGD") <= 1


# What is wrong is said.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"step_size": -1.0}, "step_size: expected a finite number >= 0, found -1.0"),
        ({"factor": float("inf")}, "factor"),
        ({"softness": 0.0}, "softness: expected a finite number > 0, found 0.0"),
        ({"uncertain": (0.7, 0.3)}, r"uncertain: expected two probabilities.*found \(0.7, 0.3\)"),
        ({"uncertain": (0.7, 1.3)}, "uncertain"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(InputError, match=message):
        IMT(*make_pair(), **fields)


def test_wrong_networks():
    classifier, discriminator = make_pair()
    with pytest.raises(InputError, match="discriminator: expected a Discriminator, found Linear"):
        IMT(classifier, nn.Linear(3, 3))
    with pytest.raises(InputError, match=r"classifier: expected a .*Module, found int"):
        IMT(3, discriminator)
    with pytest.raises(InputError, match="Sequential has no method `features`"):
        IMT(nn.Sequential(nn.Flatten(), nn.Linear(36, 4)).double(), discriminator)(some_images())
