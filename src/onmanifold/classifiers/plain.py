"""Plain networks: convolutional net, MLP and small VGG of Disentangling (Stutz et al. 2019); LeNet-5."""

from __future__ import annotations

from math import prod

from torch import nn

from onmanifold.classifiers.layers import Classifier, ImageShape, Scale, check_side, initialise
from onmanifold.foundation.registry import CLASSIFIERS


@CLASSIFIERS.register("conv_net")
def conv_net(
    num_classes: int = 10,
    image_shape: ImageShape = (3, 32, 32),
    *,
    channels: tuple[int, ...] | None = None,
    hidden: int | None = None,
    hidden_relu: bool = False,
    norm_first: bool = True,
    mean: Scale = 0.0,
    std: Scale = 1.0,
) -> Classifier:
    """The convolutional net of Disentangling, section 3.1: 4x4 convolutions, two linear layers.

    Each convolution of stride 2 is followed by batch norm and ReLU, in the order of the authors'
    released code, and nothing stands between the linear layers. The paper's sentence "each followed
    by ReLU activations and batch normalization" can also be read as ReLU first
    (``norm_first=False``). Batch norm right after its convolution is folded into it by attacks.

    Args:
        num_classes: K.
        image_shape: (C, H, W).
        channels: Channels of each convolution. None: (16, 32, 64), with a fourth of 128 where
            the shorter side is above 32 pixels, as the paper has it on CelebA.
        hidden: Width of the first linear layer; None: 10 K as in the released code.
        hidden_relu: ReLU between the two linear layers (neither paper nor code has it).
        norm_first: Batch norm before ReLU.
        mean: Normalisation inside the network: one number or one per channel.
        std: The same.
    """
    if channels is None:
        channels = (16, 32, 64) if min(image_shape[1:]) <= 32 else (16, 32, 64, 128)
    check_side(f"conv_net with {len(channels)} convolutions", image_shape, 2 ** len(channels))
    hidden = 10 * num_classes if hidden is None else hidden
    before, height, width = image_shape
    layers: list[nn.Module] = []
    for after in channels:
        layers += [nn.Conv2d(before, after, 4, stride=2, padding=1)]
        layers += _activation(nn.BatchNorm2d(after), norm_first)
        before, height, width = after, height // 2, width // 2
    layers += [nn.Flatten(), nn.Linear(before * height * width, hidden)]
    if hidden_relu:
        layers += [nn.ReLU()]
    return _plain(layers, hidden, num_classes, image_shape, mean, std)


@CLASSIFIERS.register("mlp")
def mlp(
    num_classes: int = 10,
    image_shape: ImageShape = (3, 32, 32),
    *,
    hidden: tuple[int, ...] = (128, 128, 128, 128),
    norm_first: bool = False,
    mean: Scale = 0.0,
    std: Scale = 1.0,
) -> Classifier:
    """The multi-layer perceptron of Disentangling, appendix F: 4 hidden layers of 128 units.

    Each is linear, ReLU, batch norm: here the released code has the paper's order too.

    Args:
        num_classes: K.
        image_shape: (C, H, W).
        hidden: Units of each hidden layer.
        norm_first: Batch norm before ReLU, where it folds into the linear layer before it.
        mean: Normalisation inside the network: one number or one per channel.
        std: The same.
    """
    check_side("mlp", image_shape, 1)
    before = prod(image_shape)
    layers: list[nn.Module] = [nn.Flatten()]
    for after in hidden:
        layers += [nn.Linear(before, after), *_activation(nn.BatchNorm1d(after), norm_first)]
        before = after
    return _plain(layers, before, num_classes, image_shape, mean, std)


@CLASSIFIERS.register("vgg_small")
def vgg_small(
    num_classes: int = 10,
    image_shape: ImageShape = (3, 32, 32),
    *,
    channels: tuple[int, ...] = (64, 128),
    hidden: int = 1024,
    batch_norm: bool = True,
    mean: Scale = 0.0,
    std: Scale = 1.0,
) -> Classifier:
    """The small VGG of Disentangling, appendix F: 2 stages of model A, 1024 hidden units.

    Each stage is a 3x3 convolution, batch norm, ReLU and 2x2 max pooling; two hidden linear layers
    follow; no dropout. The original VGG (Simonyan and Zisserman 2015) has no batch norm, the
    released code of Disentangling has.

    Args:
        num_classes: K.
        image_shape: (C, H, W).
        channels: Channels of each stage.
        hidden: Units of the two hidden linear layers.
        batch_norm: Whether to have it.
        mean: Normalisation inside the network: one number or one per channel.
        std: The same.
    """
    check_side(f"vgg_small with {len(channels)} stages", image_shape, 2 ** len(channels))
    before, height, width = image_shape
    layers: list[nn.Module] = []
    for after in channels:
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=not batch_norm)]
        layers += [nn.BatchNorm2d(after)] if batch_norm else []
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
        before, height, width = after, height // 2, width // 2
    layers += [nn.Flatten(), nn.Linear(before * height * width, hidden), nn.ReLU()]
    layers += [nn.Linear(hidden, hidden), nn.ReLU()]
    return _plain(layers, hidden, num_classes, image_shape, mean, std)


@CLASSIFIERS.register("lenet5")
def lenet5(
    num_classes: int = 10,
    image_shape: ImageShape = (3, 32, 32),
    *,
    mean: Scale = 0.0,
    std: Scale = 1.0,
) -> Classifier:
    """LeNet-5 with ReLU and max pooling: 5x5 convolutions (6, 16), linear layers of 120 and 84.

    Images below 32 pixels are padded by 2 in the first convolution, as LeCun et al. 1998 pad MNIST.

    Args:
        num_classes: K.
        image_shape: (C, H, W).
        mean: Normalisation inside the network: one number or one per channel.
        std: The same.
    """
    check_side("lenet5", image_shape, 12)
    channels, height, width = image_shape
    padding = 2 if min(height, width) < 32 else 0
    height, width = (((side + 2 * padding - 4) // 2 - 4) // 2 for side in (height, width))
    layers: list[nn.Module] = [
        nn.Conv2d(channels, 6, 5, padding=padding),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]
    layers += [nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    layers += [nn.Linear(16 * height * width, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()]
    return _plain(layers, 84, num_classes, image_shape, mean, std)


def _activation(norm: nn.Module, norm_first: bool) -> list[nn.Module]:
    return [norm, nn.ReLU()] if norm_first else [nn.ReLU(), norm]


def _plain(
    layers: list[nn.Module],
    features: int,
    num_classes: int,
    image_shape: ImageShape,
    mean: Scale,
    std: Scale,
) -> Classifier:
    head = nn.Linear(features, num_classes)
    classifier = Classifier(nn.Sequential(*layers), head, image_shape, mean, std)
    initialise(classifier, mode="fan_in")
    return classifier
