import sys
import types

import pytest
import torch
from torch import nn

from onmanifold.classifiers import build_classifier
from onmanifold.foundation.errors import ConfigError, DataError, InputError
from onmanifold.manifolds import perceptual
from onmanifold.manifolds.perceptual import (
    LPIPS,
    FeatureDistance,
    PyramidDistance,
    perceptual_distance,
)


def pictures(count, shape=(1, 16, 16), seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, *shape, generator=generator, dtype=torch.float64).to(dtype)


def classifier(name="conv_net", shape=(1, 16, 16), **options):
    built = build_classifier(name, num_classes=4, image_shape=shape, seed=1, **options)
    return built.double().eval()


MEASURES = {
    "pyramid": PyramidDistance,
    "conv_net": lambda: FeatureDistance(classifier()),
    "resnet18": lambda: FeatureDistance(classifier("resnet18", width=4)),
    "mlp": lambda: FeatureDistance(classifier("mlp", hidden=(9, 7))),
}


@pytest.fixture(params=MEASURES)
def measure(request):
    return MEASURES[request.param]()


def test_a_distance(measure):
    first, second, third = (pictures(5, seed=seed) for seed in range(3))
    distance = measure(first, second)
    assert distance.shape == (5,)
    assert bool((distance > 0).all())
    torch.testing.assert_close(distance, measure(second, first))
    assert bool((measure(first, first) == 0).all())
    assert bool((measure(first, third) <= distance + measure(second, third) + 1e-12).all())
    near = measure(first, first + 0.01 * (second - first))
    assert bool((near < 0.2 * distance).all())
    described = measure.describe(second)
    assert torch.equal(measure.compare(measure.describe(first), described), distance)


def test_samples_are_apart_and_precisions_agree(measure):
    first, second = pictures(6), pictures(6, seed=1)
    whole = measure(first, second)
    for row in (0, 4):
        alone = measure(first[row : row + 1], second[row : row + 1])
        torch.testing.assert_close(alone, whole[row : row + 1], rtol=0, atol=1e-12)
    low = measure(first.float(), second.float())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), whole, rtol=1e-4, atol=1e-6)
    # What was run in float32 in between has left no trace.
    assert torch.equal(measure(first, second), whole)


def test_gradients(measure):
    first, second = (0.1 + 0.8 * pictures(2, seed=seed) for seed in (3, 4))
    first.requires_grad_()
    assert torch.autograd.gradcheck(lambda image: measure(image, second), first, fast_mode=True)
    same = second.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(measure(same, second).sum(), same)
    assert bool(gradient.isfinite().all())


def test_gradients_are_finite_where_all_channels_are_dead():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 36, 2)).double()
    nn.init.constant_(net[0].bias, -100.0)
    black = torch.zeros(1, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    distance = FeatureDistance(net, (1, 8, 8))(black, pictures(1, (1, 8, 8)))
    (gradient,) = torch.autograd.grad(distance.sum(), black)
    assert distance.item() == 0
    assert bool((gradient == 0).all())


def test_the_pyramid_by_hand():
    first = torch.zeros(1, 1, 8, 8)
    second = torch.zeros(1, 1, 8, 8)
    second[0, 0, 0, 0], second[0, 0, 0, 1] = 1.0, -1.0
    # Two scales, 8 and 4 pixels; the coarser one sees nothing.
    assert PyramidDistance()(first, second).item() == pytest.approx(0.5 * 2 / 64)
    second[0, 0, 0, 1] = 1.0
    assert PyramidDistance()(first, second).item() == pytest.approx(0.5 * 2 / 64 + 0.5 * 0.5 / 16)
    assert PyramidDistance().describe(torch.zeros(2, 3, 32, 20)).shape == (2, 3 * (640 + 160 + 40))


def test_features_by_hand():
    """One convolution by the identity and one that doubles, unit vectors of two channels."""
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    net = net.double()
    net[0].weight.data = torch.tensor([1.0, -1.0]).double().view(2, 1, 1, 1)
    images = torch.tensor([[[[0.5, 1.0], [0.0, 0.2]]], [[[0.9, 0.0], [0.0, 0.7]]]]).double()
    measure = FeatureDistance(net, (1, 2, 2))
    assert measure.layers == ("1",)
    # Bright places have the unit vector (1, 0), dark ones none; they differ in one place of four.
    distance = measure(images[:1], images[1:])
    torch.testing.assert_close(distance, torch.tensor([0.5]).double(), rtol=1e-6, atol=0)


def test_features_are_those_of_laidlaw():
    net = classifier()
    measure = FeatureDistance(net)
    first, second = pictures(3), pictures(3, seed=1)
    squares = torch.zeros(3).double()
    features = [first, second]
    for layer in net.body:
        features = [layer(feature) for feature in features]
        if isinstance(layer, nn.ReLU):
            units = [feature / feature.norm(dim=1, keepdim=True) for feature in features]
            places = units[0].shape[2] * units[0].shape[3]
            difference = torch.nan_to_num(units[0]) - torch.nan_to_num(units[1])
            squares += difference.square().sum((1, 2, 3)) / places
    torch.testing.assert_close(measure(first, second), squares.sqrt(), rtol=1e-4, atol=0)


def test_the_last_activation_of_each_size_is_compared():
    measure = FeatureDistance(classifier("resnet18", shape=(1, 32, 32), width=4))
    # Stem and first stage share 32 pixels; then 16, 8 and 4.
    assert len(measure.layers) == 4
    assert measure.describe(pictures(1, (1, 32, 32))).shape == (
        1,
        4 * 1024 + 8 * 256 + 16 * 64 + 32 * 16,
    )
    flat = FeatureDistance(classifier("mlp", hidden=(9, 7)))
    assert flat.describe(pictures(2)).shape == (2, 16)


def test_layers_can_be_named():
    net = classifier()
    chosen = FeatureDistance(net, layers=["body.0"])
    assert chosen.describe(pictures(1)).shape == (1, 16 * 64)
    assert chosen.fingerprint != FeatureDistance(net).fingerprint
    for layers in ([], ["body.99"]):
        with pytest.raises(InputError, match="layers: found"):
            FeatureDistance(net, layers=layers)


def test_the_classifier_is_left_alone_and_copied():
    net = build_classifier("conv_net", num_classes=4, image_shape=(1, 16, 16), seed=1).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    measure = FeatureDistance(net)
    first, second = pictures(4, dtype=torch.float32), pictures(4, seed=1, dtype=torch.float32)
    distance = measure(first, second)
    measure(first.double(), second.double())
    assert all(module.training for module in net.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    nn.init.zeros_(net.body[0].weight)
    assert torch.equal(measure(first, second), distance)


def test_fingerprints_say_what_determines_the_distance():
    first, again = FeatureDistance(classifier()), FeatureDistance(classifier())
    other = classifier()
    nn.init.zeros_(other.body[0].weight)
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint.startswith("features-")
    assert first.fingerprint != FeatureDistance(other).fingerprint
    assert PyramidDistance().fingerprint == PyramidDistance().fingerprint


@pytest.mark.parametrize(
    ("net", "shape", "message"),
    [
        (nn.Flatten(), (1, 4, 4), "no activation"),
        (nn.Flatten(), None, "image_shape"),
        (nn.Sequential(nn.Linear(3, 3), nn.ReLU()), (1, 4, 4), "does not take"),
        (classifier(), (1, 20, 20), r"takes images \(1, 16, 16\)"),
    ],
)
def test_unsuitable_classifiers_are_refused(net, shape, message):
    with pytest.raises(InputError, match=message):
        FeatureDistance(net, shape)


@pytest.fixture
def without_lpips(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)


def test_what_is_chosen_by_itself(without_lpips):
    assert perceptual_distance().name == "pyramid"
    assert perceptual_distance("auto", classifier=classifier()).name == "features"
    assert perceptual_distance("pyramid", classifier=classifier()).name == "pyramid"
    assert perceptual_distance("features", classifier=classifier()).name == "features"
    with pytest.raises(ConfigError, match=r"pip install 'onmanifold\[lpips\]'"):
        perceptual_distance("lpips")
    with pytest.raises(ConfigError, match="classifier"):
        perceptual_distance("features")
    with pytest.raises(ConfigError, match="kind"):
        perceptual_distance("vgg")


class _Stage(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.model = nn.Sequential(nn.Dropout(), nn.Conv2d(len(weights), 1, 1, bias=False))
        self.model[-1].weight.data = torch.tensor(weights).view(1, -1, 1, 1)


class _FakeLPIPS(nn.Module):
    """The parts of the package's module that are used: two layers, and a scaling that is the identity."""

    def __init__(self, net, pnet_rand, verbose):
        super().__init__()
        if net == "vgg":
            raise OSError("no route to host")
        self.first = nn.Conv2d(3, 2, 3)
        self.second = nn.Conv2d(2, 4, 3, stride=2)
        self.lins = nn.ModuleList([_Stage([0.3, 0.7]), _Stage([0.1, 0.2, 0.3, 0.4])])
        self.scaling_layer = nn.Identity()

    def net(self, images):
        first = self.first(images).relu()
        return first, self.second(first).relu()

    def forward(self, first, second):
        total = 0
        for one, other, weights in zip(self.net(first), self.net(second), self.lins, strict=True):
            one, other = (part / (part.norm(dim=1, keepdim=True) + 1e-10) for part in (one, other))
            weighted = (one - other).square() * weights.model[-1].weight
            total = total + weighted.sum(1).mean((1, 2))
        return total


@pytest.fixture
def fake_lpips(monkeypatch):
    package = types.ModuleType("lpips")
    package.LPIPS = _FakeLPIPS
    monkeypatch.setitem(sys.modules, "lpips", package)


def test_lpips_is_that_of_its_package(fake_lpips):
    torch.manual_seed(0)
    measure = LPIPS()
    first, second = (pictures(2, (3, 64, 70), seed=seed) for seed in (0, 1))
    expected = measure._model.double()(2 * first - 1, 2 * second - 1)
    torch.testing.assert_close(measure(first, second), expected, rtol=1e-3, atol=0)
    grey = pictures(2, (1, 64, 64))
    torch.testing.assert_close(
        measure.describe(grey), measure.describe(grey.repeat(1, 3, 1, 1)), rtol=0, atol=0
    )
    # Small images are enlarged: a constant one stays constant.
    small = measure.describe(torch.full((1, 1, 28, 28), 0.3))
    assert small.shape == measure.describe(torch.full((1, 3, 64, 64), 0.3)).shape
    image = pictures(1, (1, 28, 28)).requires_grad_()
    (gradient,) = torch.autograd.grad(measure(image, pictures(1, (1, 28, 28), 5)).sum(), image)
    assert bool(gradient.isfinite().all())
    assert perceptual_distance(classifier=classifier()).name == "lpips"


def test_without_its_weights_lpips_is_not_chosen(fake_lpips, monkeypatch):
    with pytest.raises(DataError, match="no route to host"):
        LPIPS("vgg")
    monkeypatch.setattr(perceptual.LPIPS.__init__, "__defaults__", ("vgg",))
    assert perceptual_distance().name == "pyramid"


def test_the_real_lpips():
    try:
        import lpips  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"needs lpips: {error}")
    torch.manual_seed(0)
    measure = LPIPS("alex", pretrained=False)
    first, second = (pictures(2, (3, 64, 64), seed, torch.float32) for seed in (0, 1))
    expected = measure._model(first, second, normalize=True).flatten()
    torch.testing.assert_close(measure(first, second), expected, rtol=1e-3, atol=1e-6)
