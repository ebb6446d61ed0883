"""ResNet-13, -18, -32, -50 (He et al. 2016) and wide residual networks (Zagoruyko, Komodakis 2016)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from onmanifold.classifiers.layers import Classifier, ImageShape, Scale, check_side, initialise
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.registry import CLASSIFIERS

Stem = Literal["auto", "cifar", "imagenet"]
Block = Callable[[int, int, int], nn.Module]  # (channels in, width, stride) -> block


def _conv3x3(before: int, after: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)


class _ZeroPad(nn.Module):
    """Shortcut without parameters: every stride-th pixel, missing channels zero (He et al., A)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.missing = after - before
        self.stride = stride

    def forward(self, features: Tensor) -> Tensor:
        return F.pad(features[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.missing))


def _shortcut(before: int, after: int, stride: int, zero_pad: bool = False) -> nn.Module:
    if stride == 1 and before == after:
        return nn.Identity()
    if zero_pad:
        return _ZeroPad(before, after, stride)
    return nn.Sequential(
        nn.Conv2d(before, after, 1, stride=stride, bias=False), nn.BatchNorm2d(after)
    )


class _Residual(nn.Module):
    """ReLU of branch plus shortcut."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut
        self.relu = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = self.relu(self.branch(features) + self.shortcut(features))
        return result


def _basic(before: int, width: int, stride: int, zero_pad: bool = False) -> nn.Module:
    branch = nn.Sequential(
        _conv3x3(before, width, stride),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        _conv3x3(width, width),
        nn.BatchNorm2d(width),
    )
    return _Residual(branch, _shortcut(before, width, stride, zero_pad))


def _basic_zero_pad(before: int, width: int, stride: int) -> nn.Module:
    return _basic(before, width, stride, zero_pad=True)


def _bottleneck(before: int, width: int, stride: int) -> nn.Module:
    after = 4 * width
    branch = nn.Sequential(
        nn.Conv2d(before, width, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        _conv3x3(width, width, stride),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, after, 1, bias=False),
        nn.BatchNorm2d(after),
    )
    return _Residual(branch, _shortcut(before, after, stride))


class _PreActivation(nn.Module):
    """The block of wide residual networks: batch norm and ReLU come before each convolution."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.BatchNorm2d(before), nn.ReLU())
        self.branch = nn.Sequential(
            _conv3x3(before, width, stride),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            _conv3x3(width, width),
        )
        # Where the size changes the shortcut reads the activated features, else the input itself.
        self.projection = (
            None
            if stride == 1 and before == width
            else nn.Conv2d(before, width, 1, stride=stride, bias=False)
        )

    def forward(self, features: Tensor) -> Tensor:
        active = self.enter(features)
        shortcut = features if self.projection is None else self.projection(active)
        result: Tensor = self.branch(active) + shortcut
        return result


def _stages(
    block: Block, before: int, widths: Sequence[int], depths: Sequence[int], expansion: int = 1
) -> list[nn.Module]:
    """Groups of blocks; each group but the first halves the image in its first block."""
    stages: list[nn.Module] = []
    for number, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        blocks = []
        for position in range(depth):
            blocks.append(block(before, width, 2 if number > 0 and position == 0 else 1))
            before = width * expansion
        stages.append(nn.Sequential(*blocks))
    return stages


def _stem(stem: Stem, image_shape: ImageShape, width: int) -> nn.Module:
    if stem == "auto":
        stem = "imagenet" if min(image_shape[1:]) >= 64 else "cifar"
    if stem == "cifar":
        return nn.Sequential(_conv3x3(image_shape[0], width), nn.BatchNorm2d(width), nn.ReLU())
    return nn.Sequential(
        nn.Conv2d(image_shape[0], width, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
    )


def _residual(
    parts: Sequence[nn.Module],
    features: int,
    num_classes: int,
    image_shape: ImageShape,
    mean: Scale,
    std: Scale,
) -> Classifier:
    check_side("a residual network", image_shape, 4)
    body = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    classifier = Classifier(body, nn.Linear(features, num_classes), image_shape, mean, std)
    initialise(classifier, mode="fan_out")
    return classifier


@CLASSIFIERS.register("resnet13")
def resnet13(
    num_classes: int = 10,
    image_shape: ImageShape = (3, 32, 32),
    *,
    width: int = 64,
    mean: Scale = 0.0,
    std: Scale = 1.0,
) -> Classifier:
    """The ResNet-13 of Disentangling, appendix F: 13 convolutions, three stages of two basic blocks.

    The stages have 64, 128 and 256 channels behind a 3x3 stem, as in the released code.

    Args:
        num_classes: K.
        image_shape: (C, H, W).
        width: Channels of the first stage; each further one has twice as many.
        mean: Normalisation inside the network: one number or one per channel.
        std: The same.
    """
    stages = _stages(_basic, width, (width, 2 * width, 4 * width), (2, 2, 2))
    parts = [_stem("cifar", image_shape, width), *stages]
    return _residual(parts, 4 * width, num_classes, image_shape, mean, std)


@CLASSIFIERS.register("resnet18")
def resnet18(
    num_classes: int = 10,
    image_shape: ImageShape = (3, 32, 32),
    *,
    stem: Stem = "auto",
    width: int = 64,
    mean: Scale = 0.0,
    std: Scale = 1.0,
) -> Classifier:
    """ResNet-18: four stages of two basic blocks, 64 to 512 channels, 1x1 shortcuts.

    Args:
        num_classes: K.
        image_shape: (C, H, W).
        stem: "cifar": one 3x3 convolution of stride 1; "imagenet": 7x7 of stride 2 and max pooling;
            "auto": "imagenet" where both sides have at least 64 pixels.
        width: Channels of the first stage; each further one has twice as many.
        mean: Normalisation inside the network: one number or one per channel.
        std: The same.
    """
    stages = _stages(_basic, width, [width * 2**stage for stage in range(4)], (2, 2, 2, 2))
    parts = [_stem(stem, image_shape, width), *stages]
    return _residual(parts, 8 * width, num_classes, image_shape, mean, std)


@CLASSIFIERS.register("resnet32")
def resnet32(
    num_classes: int = 10,
    image_shape: ImageShape = (3, 32, 32),
    *,
    mean: Scale = 0.0,
    std: Scale = 1.0,
) -> Classifier:
    """The ResNet-32 for CIFAR (He et al. 2016, section 4.2): three stages of five blocks.

    The stages have 16, 32 and 64 channels; shortcuts have no parameters (option A there).

    Args:
        num_classes: K.
        image_shape: (C, H, W).
        mean: Normalisation inside the network: one number or one per channel.
        std: The same.
    """
    parts = [
        _stem("cifar", image_shape, 16),
        *_stages(_basic_zero_pad, 16, (16, 32, 64), (5, 5, 5)),
    ]
    return _residual(parts, 64, num_classes, image_shape, mean, std)


@CLASSIFIERS.register("resnet50")
def resnet50(
    num_classes: int = 10,
    image_shape: ImageShape = (3, 32, 32),
    *,
    stem: Stem = "auto",
    mean: Scale = 0.0,
    std: Scale = 1.0,
) -> Classifier:
    """ResNet-50: bottleneck blocks (3, 4, 6, 3), 256 to 2048 channels, stride in the 3x3 layer.

    Args:
        num_classes: K.
        image_shape: (C, H, W).
        stem: "cifar": one 3x3 convolution of stride 1; "imagenet": 7x7 of stride 2 and max pooling;
            "auto": "imagenet" where both sides have at least 64 pixels.
        mean: Normalisation inside the network: one number or one per channel.
        std: The same.
    """
    stages = _stages(_bottleneck, 64, (64, 128, 256, 512), (3, 4, 6, 3), expansion=4)
    return _residual(
        [_stem(stem, image_shape, 64), *stages], 2048, num_classes, image_shape, mean, std
    )


@CLASSIFIERS.register("wide_resnet")
def wide_resnet(
    num_classes: int = 10,
    image_shape: ImageShape = (3, 32, 32),
    *,
    depth: int = 28,
    width: int = 10,
    mean: Scale = 0.0,
    std: Scale = 1.0,
) -> Classifier:
    """A wide residual network WRN-depth-width, by default WRN-28-10, without dropout.

    Args:
        num_classes: K.
        image_shape: (C, H, W).
        depth: Number of convolutions, 6 n + 4.
        width: The three stages have 16, 32 and 64 times as many channels.
        mean: Normalisation inside the network: one number or one per channel.
        std: The same.

    Raises:
        InputError: ``depth`` is not 6 n + 4 with n >= 1.
    """
    if depth < 10 or depth % 6 != 4:
        raise InputError(f"depth: expected 6 n + 4 (10, 16, 22, 28, ...), found {depth}.")
    stages = _stages(
        _PreActivation, 16, (16 * width, 32 * width, 64 * width), [(depth - 4) // 6] * 3
    )
    parts = [_conv3x3(image_shape[0], 16), *stages, nn.BatchNorm2d(64 * width), nn.ReLU()]
    return _residual(parts, 64 * width, num_classes, image_shape, mean, std)
