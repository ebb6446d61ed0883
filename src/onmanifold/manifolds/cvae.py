"""A conditional variational autoencoder: the class goes into encoder and decoder (Directions B)."""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from onmanifold.foundation.errors import InputError
from onmanifold.foundation.registry import MANIFOLDS
from onmanifold.manifolds.base import Chart
from onmanifold.manifolds.coding import (
    Encoder,
    Posterior,
    check_batch,
    convolutions,
    frozen_copy,
    transposed_convolutions,
)
from onmanifold.manifolds.learned import ImageShape, LearnedManifold


class CVAEChart(Chart):
    """The decoder of given classes: what the class adds to its first layer is computed once."""

    def __init__(self, manifold: CVAE, codes: Tensor) -> None:
        super().__init__(manifold, codes)
        first, *rest = frozen_copy(manifold.decoder, codes.dtype)
        assert isinstance(first, nn.Linear)
        self.weight = first.weight[:, : manifold.latent_size].contiguous()
        classes = first.weight[:, manifold.latent_size :].T
        self.offsets = first.bias + classes[manifold.labels_of(codes)]
        self.rest = nn.Sequential(*rest)

    def decode(self, latents: Tensor) -> Tensor:
        hidden = functional.linear(latents, self.weight) + self.offsets
        images: Tensor = self.rest(hidden).sigmoid()
        return images.view(-1, *self.manifold.image_shape)

    def keep(self, mask: Tensor) -> Chart:
        narrowed = copy.copy(self)
        for name in ("latents", "fixed", "offsets"):
            setattr(narrowed, name, getattr(self, name)[mask])
        return narrowed


@MANIFOLDS.register("cvae")
class CVAE(LearnedManifold):
    """A conditional VAE; the code of an image is the mean of its posterior (Directions B.1, B.2).

    The paper gives sizes and little more. Read here: one hidden layer of 256 between the 784 pixels and the code
    on either side; or four convolutions 4 x 4 of stride 2 with batch norm, and the same backwards, the class in
    planes beside the image. Gradients of `decode` reach the codes and not the weights.

    Args:
        image_shape: (C, H, W).
        num_classes: K.
        latent_size: Columns that may move; None: the paper's, 10 for the MLP and 128 for the convolutions.
        network: "mlp", "conv", or "auto": the MLP for grey images.
        hidden_size: Units of the MLP's hidden layers.
        channels: Of the convolutions of the encoder; the decoder has them backwards.

    Attributes:
        encoder: Images beside their classes to the `Posterior`; see `posterior`.
        decoder: Latents beside one-hot classes to the logits of pixels; see `logits`.
    """

    name = "cvae"

    def __init__(
        self,
        image_shape: ImageShape,
        num_classes: int,
        latent_size: int | None = None,
        network: Literal["auto", "mlp", "conv"] = "auto",
        hidden_size: int = 256,
        channels: tuple[int, ...] = (32, 64, 128, 256),
    ) -> None:
        if network not in ("auto", "mlp", "conv"):
            raise InputError(f"network: expected 'auto', 'mlp' or 'conv', found {network!r}.")
        if network == "auto":
            network = "mlp" if image_shape[0] == 1 else "conv"
        if latent_size is None:
            latent_size = 10 if network == "mlp" else 128
        super().__init__(image_shape, num_classes, latent_size, conditional=True)
        self.network = network
        inputs, pixels = latent_size + num_classes, math.prod(self.image_shape)
        if network == "mlp":
            first = nn.Linear(pixels + num_classes, hidden_size)
            self.encoder = Encoder(nn.Sequential(first, nn.ReLU()), hidden_size, latent_size)
            second = nn.Linear(hidden_size, pixels)
            self.decoder = nn.Sequential(nn.Linear(inputs, hidden_size), nn.ReLU(), second)
        else:
            planes, height, width = self.image_shape
            trunk, features = convolutions((planes + num_classes, height, width), channels)
            self.encoder = Encoder(trunk, features, latent_size)
            self.decoder = transposed_convolutions(self.image_shape, channels, inputs)

    def posterior(self, images: Tensor, labels: Tensor) -> Posterior:
        """The Gaussian q(z | x, y) of images (B, C, H, W) with labels (B,), in the dtype of the weights."""
        check_batch(self, images, labels)
        images = images.to(self.encoder.mean.weight.dtype)
        classes = functional.one_hot(labels, self.num_classes).to(images.dtype)
        if self.network == "mlp":
            inputs = torch.cat([images.flatten(1), classes], dim=1)
        else:
            planes = classes[:, :, None, None].expand(-1, -1, *images.shape[2:])
            inputs = torch.cat([images, planes], dim=1)
        posterior: Posterior = self.encoder(inputs)
        return posterior

    def logits(self, latents: Tensor, labels: Tensor) -> Tensor:
        """What the sigmoid turns into images (B, C, H, W); differentiable in the weights."""
        classes = functional.one_hot(labels, self.num_classes).to(latents.dtype)
        logits: Tensor = self.decoder(torch.cat([latents, classes], dim=1))
        return logits.view(-1, *self.image_shape)

    def encode(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.codes_of(self.posterior(images, labels).mean.to(images.dtype), labels)

    def decode(self, codes: Tensor) -> Tensor:
        chart = self.chart(codes)
        return chart.decode(chart.latents)

    def chart(self, codes: Tensor) -> CVAEChart:
        return CVAEChart(self, self.check_codes(codes, len(codes)))
