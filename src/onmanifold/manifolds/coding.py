"""What autoencoders share: their networks, the Gaussian posterior of a code, and samples routed by class."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from onmanifold.foundation.checks import check_labels
from onmanifold.foundation.errors import InputError
from onmanifold.manifolds.base import Chart, Manifold
from onmanifold.manifolds.learned import ImageShape, LearnedManifold

Network = Callable[[Tensor], Tensor]


class Posterior(NamedTuple):
    """The Gaussian q(z | x) of each image, its dimensions independent.

    Attributes:
        mean: (B, latent_size).
        log_variance: (B, latent_size).
    """

    mean: Tensor
    log_variance: Tensor

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """Latents mean + deviation · noise; without noise (B, latent_size) it comes from the global generator."""
        noise = torch.randn_like(self.mean) if noise is None else noise
        return self.mean + (self.log_variance / 2).exp() * noise

    def divergence(self) -> Tensor:
        """KL(q(z | x) ‖ N(0, 1)) in nats, (B,) (Kingma and Welling 2014, appendix B)."""
        variance = self.log_variance.exp()
        return (self.mean.square() + variance - 1 - self.log_variance).sum(1) / 2


class Encoder(nn.Module):
    """A trunk, then two fully connected layers for mean and log-variance.

    Args:
        trunk: To features (B, features).
        features: Their number.
        latent_size: Columns of mean and log-variance.
    """

    def __init__(self, trunk: nn.Module, features: int, latent_size: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.mean = nn.Linear(features, latent_size)
        self.log_variance = nn.Linear(features, latent_size)

    def forward(self, inputs: Tensor) -> Posterior:
        """The posterior of each input, in the dtype of the weights, also where autocast lowers the network's."""
        features, dtype = self.trunk(inputs), self.mean.weight.dtype
        return Posterior(self.mean(features).to(dtype), self.log_variance(features).to(dtype))


def halvings(image_shape: ImageShape, count: int) -> list[tuple[int, int]]:
    """Height and width of an image before and after each of ``count`` convolutions of stride 2.

    Raises:
        InputError: There is not a pixel left.
    """
    _, height, width = image_shape
    if min(height, width) < 2**count:
        raise InputError(
            f"channels: {count} layers halve images {height} x {width} to less than a pixel."
        )
    return [(height >> depth, width >> depth) for depth in range(count + 1)]


def convolutions(image_shape: ImageShape, channels: Sequence[int]) -> tuple[nn.Sequential, int]:
    """Convolutions 4 x 4 of stride 2, each with batch norm and ReLU, for images of any size.

    Args:
        image_shape: (C, H, W) of what comes in.
        channels: What each layer gives.

    Returns:
        The network to features (B, D), and D.
    """
    height, width = halvings(image_shape, len(channels))[-1]
    layers: list[nn.Module] = []
    for found, given in zip([image_shape[0], *channels], channels, strict=False):
        layers += [nn.Conv2d(found, given, 4, 2, 1), nn.BatchNorm2d(given), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten()), channels[-1] * height * width


def transposed_convolutions(
    image_shape: ImageShape, channels: Sequence[int], inputs: int, kernel: int = 4
) -> nn.Sequential:
    """A fully connected layer, then transposed convolutions of stride 2: `convolutions` backwards.

    Args:
        image_shape: (C, H, W) of what comes out.
        channels: As for `convolutions`: the last are the first here.
        inputs: Columns of what comes in.
        kernel: Size of the kernels, even.

    Returns:
        The network from (B, inputs) to the logits of pixels (B, C, H, W).
    """
    if kernel < 2 or kernel % 2:
        raise InputError(f"kernel: expected an even number from 2, found {kernel}.")
    sizes = halvings(image_shape, len(channels))
    height, width = sizes[-1]
    shape = (channels[-1], height, width)
    layers: list[nn.Module] = [nn.Linear(inputs, math.prod(shape)), nn.Unflatten(1, shape)]
    given = [image_shape[0], *channels]
    for depth in reversed(range(len(channels))):
        # Halving rounds an odd side down; the way back adds the lost pixel.
        lost = (sizes[depth][0] % 2, sizes[depth][1] % 2)
        layers.append(
            nn.ConvTranspose2d(given[depth + 1], given[depth], kernel, 2, kernel // 2 - 1, lost)
        )
        if depth:
            layers += [nn.BatchNorm2d(given[depth]), nn.ReLU()]
    return nn.Sequential(*layers)


def frozen_copy(network: nn.Sequential, dtype: torch.dtype) -> nn.Sequential:
    """A copy in eval mode and without gradients to its weights, batch norm folded into the convolution before it.

    Args:
        network: Left as it is.
        dtype: Of the copy.
    """
    layers: list[nn.Module] = []
    for layer in copy.deepcopy(network).to(dtype).eval():
        before = layers[-1] if layers else None
        if isinstance(layer, nn.BatchNorm2d) and isinstance(before, nn.Conv2d | nn.ConvTranspose2d):
            transposed = isinstance(before, nn.ConvTranspose2d)
            layers[-1] = fuse_conv_bn_eval(before, layer, transposed)
        else:
            layers.append(layer)
    # The memory format in which convolutions are fastest, on CPUs and GPUs.
    frozen = nn.Sequential(*layers).requires_grad_(False)
    return frozen.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


class Routing:
    """Which samples go to which class's network; the only look at the values of the labels.

    Args:
        labels: (B,) int64.

    Attributes:
        present: The classes that have samples, in order.
    """

    def __init__(self, labels: Tensor) -> None:
        counts = torch.bincount(labels).tolist()
        self.present = [label for label, count in enumerate(counts) if count]
        self.counts = [counts[label] for label in self.present]
        self.order = labels.argsort(stable=True)
        self.back = self.order.argsort()

    def __call__(self, networks: Mapping[int, Network], inputs: Tensor) -> Tensor:
        """What each sample's network makes of it: (B, ...) of ``inputs`` (B, ...)."""
        if len(self.present) < 2:
            # Of no samples any network gives the shape.
            label = self.present[0] if self.present else next(iter(networks))
            return networks[label](inputs)
        parts = torch.split(inputs[self.order], self.counts)
        outputs = [networks[label](part) for label, part in zip(self.present, parts, strict=True)]
        return torch.cat(outputs)[self.back]


class RoutedChart(Chart):
    """Samples whose decoder depends on their class; the decoders are made ready before.

    Args:
        manifold: Whose chart it is.
        codes: (B, code_size).
        labels: (B,) int64, the number of each sample's decoder.
        make: Makes the decoder of a class; asked once for each class present.
    """

    def __init__(
        self, manifold: Manifold, codes: Tensor, labels: Tensor, make: Callable[[int], Network]
    ) -> None:
        super().__init__(manifold, codes)
        self.labels, self.routing = labels, Routing(labels)
        self.decoders = {label: make(label) for label in self.routing.present or [0]}

    def decode(self, latents: Tensor) -> Tensor:
        return self.routing(self.decoders, latents)

    def keep(self, mask: Tensor) -> Chart:
        narrowed = copy.copy(self)
        narrowed.latents, narrowed.fixed = self.latents[mask], self.fixed[mask]
        narrowed.labels = self.labels[mask]
        narrowed.routing = Routing(narrowed.labels)
        return narrowed


def classes_of(manifold: LearnedManifold, codes: Tensor) -> Tensor:
    """The number (B,) int64 of each code's network: its class, or 0 where all share one."""
    if manifold.conditional:
        return manifold.labels_of(codes)
    return torch.zeros(len(codes), dtype=torch.int64, device=codes.device)


def check_batch(manifold: LearnedManifold, images: Tensor, labels: Tensor) -> None:
    """Check float images (B, *image_shape) and, where the manifold is conditional, labels (B,).

    Raises:
        InputError: Something else.
    """
    fits = images.ndim == 4 and tuple(images.shape[1:]) == manifold.image_shape
    if not fits or not images.is_floating_point():
        raise InputError(
            f"images: expected floats (B, {', '.join(map(str, manifold.image_shape))}) for "
            f"{manifold.name}, found {images.dtype} {tuple(images.shape)}."
        )
    if manifold.conditional:
        check_labels(labels, len(images), manifold.num_classes)
