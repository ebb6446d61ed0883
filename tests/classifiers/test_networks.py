"""Every registered network: shapes, published sizes, and what the attack engine relies on."""

import pytest
import torch
from torch import nn

from onmanifold.classifiers import Classifier, Normalize, build_classifier
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.registry import CLASSIFIERS

NAMES = CLASSIFIERS.names()
SHAPES = [(1, 28, 28), (3, 32, 32), (3, 56, 48)]
# WRN-28-10 itself is built once, for its size; its small sibling has the same code.
SMALL = {
    "wide_resnet": {"depth": 10, "width": 1},
    "resnet18": {"width": 8},
    "resnet13": {"width": 8},
}


def small(name: str, **arguments) -> Classifier:
    return build_classifier(name, seed=0, **SMALL.get(name, {}), **arguments)


def count(classifier: nn.Module) -> int:
    return sum(parameter.numel() for parameter in classifier.parameters())


def test_names():
    assert NAMES == [
        "conv_net", "lenet5", "mlp", "resnet13", "resnet18", "resnet32", "resnet50", "vgg_small",
        "wide_resnet",
    ]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_features(name, shape):
    classifier = small(name, num_classes=7, image_shape=shape)
    images = torch.rand(2, *shape)
    logits = classifier(images)
    assert logits.shape == (2, 7)
    assert classifier.num_classes == 7
    assert classifier.image_shape == shape
    classifier.eval()
    features = classifier.features(images)
    assert features.shape == (2, classifier.head.in_features)
    torch.testing.assert_close(classifier.head(features), classifier(images))


@pytest.mark.parametrize(
    ("name", "num_classes", "shape", "options", "published"),
    [
        # Widely printed, e.g. by torchinfo for the usual implementations of each network:
        ("lenet5", 10, (1, 28, 28), {}, 61_706),
        ("lenet5", 10, (1, 32, 32), {}, 61_706),
        ("resnet18", 10, (3, 32, 32), {}, 11_173_962),  # kuangliu/pytorch-cifar, ResNet18
        ("resnet50", 10, (3, 32, 32), {}, 23_520_842),  # kuangliu/pytorch-cifar, ResNet50
        ("resnet18", 1000, (3, 224, 224), {}, 11_689_512),  # torchvision, resnet18
        ("resnet50", 1000, (3, 224, 224), {}, 25_557_032),  # torchvision, resnet50
        ("resnet32", 10, (3, 32, 32), {}, 464_154),  # He et al. 2016, table 6: 0.46 M
        ("wide_resnet", 10, (3, 32, 32), {}, 36_479_194),  # Zagoruyko and Komodakis: 36.5 M
        ("wide_resnet", 10, (3, 32, 32), {"depth": 16, "width": 8}, 10_961_370),  # the same: 11.0 M
    ],
)
def test_published_number_of_parameters(name, num_classes, shape, options, published):
    assert count(build_classifier(name, num_classes, shape, seed=0, **options)) == published


def test_number_of_parameters_of_disentangling():
    """By hand from the text: weights and biases, and two per channel of batch norm."""
    convolutions = (
        (1 * 16 * 16 + 16) + (16 * 32 * 16 + 32) + (32 * 64 * 16 + 64) + 2 * (16 + 32 + 64)
    )
    linear = (64 * 3 * 3 * 100 + 100) + (100 * 10 + 10)
    assert count(build_classifier("conv_net", 10, (1, 28, 28))) == convolutions + linear
    hidden = (784 * 128 + 128) + 3 * (128 * 128 + 128) + 4 * 2 * 128
    assert count(build_classifier("mlp", 10, (1, 28, 28))) == hidden + 128 * 10 + 10
    vgg = 1 * 64 * 9 + 64 * 128 * 9 + 2 * (64 + 128)
    vgg += (128 * 7 * 7 * 1024 + 1024) + (1024 * 1024 + 1024) + (1024 * 10 + 10)
    assert count(build_classifier("vgg_small", 10, (1, 28, 28))) == vgg
    resnet = build_classifier("resnet13", 10, (1, 28, 28))
    kernels = [part.kernel_size for part in resnet.modules() if isinstance(part, nn.Conv2d)]
    assert kernels.count((3, 3)) == 13


def test_conv_net_has_a_fourth_convolution_on_celeba():
    def convolutions(shape):
        modules = build_classifier("conv_net", 2, shape).modules()
        return [part.out_channels for part in modules if isinstance(part, nn.Conv2d)]

    assert convolutions((3, 32, 32)) == [16, 32, 64]
    assert convolutions((3, 56, 48)) == [16, 32, 64, 128]


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(("name", "linear"), [("conv_net", nn.Conv2d), ("mlp", nn.Linear)])
def test_order_of_batch_norm(name, linear, norm_first):
    body = build_classifier(name, 10, (1, 28, 28), norm_first=norm_first).body
    first = next(number for number, part in enumerate(body) if isinstance(part, linear))
    is_norm = [
        isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d) for part in body[first + 1 : first + 3]
    ]
    assert is_norm == [norm_first, not norm_first]


@pytest.mark.parametrize("name", NAMES)
def test_traceable_by_fx_and_equal_in_channels_last(name):
    classifier = small(name, image_shape=(3, 32, 32), mean=(0.4, 0.5, 0.6), std=0.25).eval()
    images = torch.rand(2, 3, 32, 32)
    expected = classifier(images)
    traced = torch.fx.symbolic_trace(classifier)
    torch.testing.assert_close(traced(images), expected)
    last = classifier.to(memory_format=torch.channels_last)
    layout = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last(layout), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_the_image(name):
    images = torch.rand(2, 1, 28, 28, requires_grad=True)
    small(name, image_shape=(1, 28, 28)).eval()(images).logsumexp(1).sum().backward()
    assert images.grad.abs().amax(dim=(1, 2, 3)).min() > 0


@pytest.mark.parametrize("name", NAMES)
def test_fresh_logits_are_neither_flat_nor_huge(name):
    classifier = small(name, image_shape=(3, 32, 32))
    logits = classifier(torch.rand(8, 3, 32, 32))
    assert 0.01 < logits.std() < 10


def test_normalisation_is_inside():
    plain = build_classifier("conv_net", 10, (3, 32, 32), seed=1).eval()
    normalised = build_classifier(
        "conv_net", 10, (3, 32, 32), seed=1, mean=[0.1, 0.2, 0.3], std=0.5
    )
    images = torch.rand(4, 3, 32, 32)
    by_hand = (images - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / 0.5
    torch.testing.assert_close(normalised.eval()(images), plain(by_hand))
    assert not any("normalize" in name for name in normalised.state_dict())


def test_identity_normalisation_costs_nothing():
    assert isinstance(build_classifier("mlp").normalize, nn.Identity)


def test_normalize_wants_positive_std_and_matching_lengths():
    with pytest.raises(InputError, match="std: expected positive"):
        Normalize(0.5, [1.0, 0.0])
    with pytest.raises(InputError, match="as many numbers"):
        Normalize([0.1, 0.2], [1.0, 1.0, 1.0])


def test_images_of_64_pixels_get_the_imagenet_stem():
    def first(shape, **options):
        modules = build_classifier("resnet18", 10, shape, width=8, **options).modules()
        return next(part for part in modules if isinstance(part, nn.Conv2d)).kernel_size

    assert first((3, 32, 32)) == (3, 3)
    assert first((3, 64, 64)) == (7, 7)
    assert first((3, 64, 64), stem="cifar") == (3, 3)
