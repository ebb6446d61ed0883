"""What all classifiers share: normalisation inside the network, features and head, initial weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from onmanifold.foundation.errors import InputError

ImageShape = tuple[int, int, int]
Scale = float | tuple[float, ...]


class Normalize(nn.Module):
    """Subtracts a mean and divides by a standard deviation, per channel; the first layer of a classifier.

    Images stay in [0, 1] everywhere outside, so that a radius means the same for every model.

    Args:
        mean: One number, or one per channel, in units of the [0, 1] images.
        std: The same, positive.

    Raises:
        InputError: ``std`` is not positive, or the two differ in length.

    >>> import torch
    >>> Normalize(mean=0.5, std=0.25)(torch.full((1, 1, 1, 1), 0.75)).item()
    1.0
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, mean: float | Sequence[float] = 0.0, std: float | Sequence[float] = 1.0
    ) -> None:
        super().__init__()
        means, stds = _per_channel(mean), _per_channel(std)
        if min(stds) <= 0:
            raise InputError(f"std: expected positive numbers, found {std}.")
        if len(means) != len(stds) and 1 not in (len(means), len(stds)):
            raise InputError(
                f"mean and std: expected as many numbers each, found {mean} and {std}."
            )
        # The classifier's options say them: checkpoints need not hold them again as weights.
        self.register_buffer("mean", torch.tensor(means).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(stds).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, H, W)."""
        return (images - self.mean) / self.std

    def extra_repr(self) -> str:
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


class Classifier(nn.Module):
    """A network from images (B, C, H, W) in [0, 1] to logits (B, K): normalise, body, linear head.

    Attributes:
        num_classes: K.
        image_shape: (C, H, W).
        spec: What rebuilds it: ``build_classifier(spec)`` gives the same network with the same
            initial weights. Empty until `build_classifier` fills it.
    """

    spec: dict[str, Any]

    def __init__(
        self,
        body: nn.Module,
        head: nn.Linear,
        image_shape: ImageShape,
        mean: Scale = 0.0,
        std: Scale = 1.0,
    ) -> None:
        super().__init__()
        if head.out_features < 2:
            raise InputError(f"num_classes: expected at least 2, found {head.out_features}.")
        for name, value in (("mean", mean), ("std", std)):
            if len(_per_channel(value)) not in (1, image_shape[0]):
                raise InputError(f"{name}: expected 1 or {image_shape[0]} numbers, found {value}.")
        identity = set(_per_channel(mean)) == {0.0} and set(_per_channel(std)) == {1.0}
        self.normalize: nn.Module = nn.Identity() if identity else Normalize(mean, std)
        self.body = body
        self.head = head
        self.num_classes = head.out_features
        self.image_shape = image_shape
        self.spec = {}

    def features(self, images: Tensor) -> Tensor:
        """The last hidden layer (B, D): what the linear head reads."""
        features: Tensor = self.body(self.normalize(images))
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W) in [0, 1]."""
        logits: Tensor = self.head(self.features(images))
        return logits


def initialise(module: nn.Module, mode: Literal["fan_in", "fan_out"]) -> None:
    """Kaiming-normal weights, zero biases, identity batch norm, in place; the head's gain is 1.

    ``fan_out`` keeps the size of gradients (usual for residual networks), ``fan_in`` that of
    activations (for plain networks). Source: He et al. 2015, Delving deep into rectifiers.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode=mode, nonlinearity="relu")
        elif isinstance(part, nn.Linear):
            nn.init.kaiming_normal_(part.weight, mode="fan_in", nonlinearity="relu")
        if isinstance(part, nn.Conv2d | nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
    if isinstance(module, Classifier):
        nn.init.normal_(module.head.weight, std=1 / math.sqrt(module.head.in_features))


def check_side(name: str, image_shape: ImageShape, smallest: int) -> None:
    """Check that an architecture's reductions leave something of the image.

    Raises:
        InputError: A side is shorter than ``smallest`` pixels, or a size is not positive.
    """
    channels, height, width = image_shape
    if channels < 1 or min(height, width) < smallest:
        raise InputError(
            f"image_shape: {name} needs at least 1 channel and {smallest} x {smallest} pixels, "
            f"found (C, H, W) = {image_shape}."
        )


def _per_channel(value: float | Sequence[float]) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, Sequence) else (float(value),)
