"""A learned encoder for a generator that has none: where projections may start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onmanifold.foundation.errors import CheckpointError, InputError
from onmanifold.foundation.modules import device_of, dtype_of, frozen
from onmanifold.foundation.randomness import integers
from onmanifold.foundation.weights import fill_module, read_module, weights_digest, write_module
from onmanifold.manifolds.base import Manifold

_KIND = "encoder"
_MEASURED = 1000


class LatentEncoder(nn.Module):
    """A small convolutional network from images and labels to codes: an inverse of a generator, nearly.

    Args:
        image_shape: (C, H, W).
        latent_size: Columns of a code that it finds.
        num_classes: K where the code ends with the class, which then is an input; 0: it does not.
        width: Channels of the first convolution; each further one, of half the size, has twice as many.
        box: Latents are cut to [-box, box]; None: they are not.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        latent_size: int,
        num_classes: int = 0,
        width: int = 32,
        box: float | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("latent_size", latent_size), ("width", width)):
            if value < 1:
                raise InputError(f"{name}: expected at least 1, found {value}.")
        self.spec: dict[str, Any] = {
            "image_shape": list(image_shape),
            "latent_size": latent_size,
            "num_classes": num_classes,
            "width": width,
            "box": box,
        }
        self.num_classes, self.box = num_classes, box
        channels, height, width_left = image_shape
        layers: list[nn.Module] = []
        while min(height, width_left) > 4 or not layers:
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
            channels, width = width, 2 * width
            height, width_left = (height + 1) // 2, (width_left + 1) // 2
        self.body = nn.Sequential(*layers, nn.Flatten())
        features = channels * height * width_left
        hidden = 8 * self.spec["width"]
        self.head = nn.Sequential(
            nn.Linear(features + num_classes, hidden),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden, latent_size),
        )
        self.register_buffer("mean", torch.zeros(latent_size))
        self.register_buffer("deviation", torch.ones(latent_size))

    @property
    def fingerprint(self) -> str:
        """A digest of architecture and weights."""
        return f"encoder-{weights_digest(self)}"

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Codes (B, code_size) of images (B, C, H, W) with labels (B,)."""
        features = self.body(2 * images - 1)
        if self.num_classes:
            known = F.one_hot(labels, self.num_classes).to(features)
            features = torch.cat([features, known], dim=1)
        latents: Tensor = self.mean + self.deviation * self.head(features)
        if self.box is not None:
            latents = latents.clamp(-self.box, self.box)
        if self.num_classes:
            latents = torch.cat([latents, labels.to(latents).unsqueeze(1)], dim=1)
        return latents


def train_encoder(
    manifold: Manifold,
    steps: int = 2000,
    *,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    image_weight: float = 10.0,
    width: int = 32,
    seed: int = 0,
) -> LatentEncoder:
    """Train an encoder on images that the generator makes of its own codes; no data is needed.

    The loss is the mean squared error of the latents, in units of their deviation, plus that of the image of the
    latents found. Adam's learning rate falls by half a cosine.

    Args:
        manifold: The generator, left as it is; the encoder is made on its device.
        steps: Of Adam.
        batch_size: Codes drawn in each step.
        learning_rate: At the start.
        image_weight: Of the mean squared error of the image.
        width: Of the encoder.
        seed: Of weights and codes.

    Returns:
        The encoder in eval mode: a start for `project`.

    Raises:
        InputError: A count below 1, or codes with more fixed columns than the class, which no image tells.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name}: expected at least 1, found {value}.")
    with frozen(manifold):
        encoder = _untrained(manifold, width, seed)
        optimizer = torch.optim.Adam(encoder.parameters(), lr=learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in range(steps):
            indices = torch.arange(step * batch_size, (step + 1) * batch_size)
            loss = _loss(manifold, encoder, indices.to(encoder.mean.device), image_weight, seed)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return encoder.eval().requires_grad_(False)


def save_encoder(encoder: LatentEncoder, path: str | Path) -> Path:
    """Write an encoder's weights and specification to a safetensors file, atomically."""
    return write_module(_KIND, encoder, path, encoder.spec)


def load_encoder(path: str | Path) -> LatentEncoder:
    """Load what `save_encoder` wrote, in eval mode, on the CPU.

    Raises:
        CheckpointError: The file is missing, truncated or of another kind.
    """
    saved = read_module(_KIND, path)
    if saved.spec is None:
        raise CheckpointError(f"{path} does not say what rebuilds its encoder.")
    spec = saved.spec | {"image_shape": tuple(saved.spec["image_shape"])}
    encoder = LatentEncoder(**spec)
    fill_module(encoder, saved.weights, path)
    return encoder.eval().requires_grad_(False)


def _untrained(manifold: Manifold, width: int, seed: int) -> LatentEncoder:
    """An encoder whose outputs have the mean and deviation of the manifold's latents."""
    fixed = manifold.code_size - manifold.latent_size
    if fixed > 1 or (fixed and not getattr(manifold, "conditional", False)):
        raise InputError(
            f"manifold: {manifold.name} has {fixed} fixed columns in its codes; "
            "an encoder knows none but the class."
        )
    classes = int(getattr(manifold, "num_classes", 0)) if fixed else 0
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        encoder = LatentEncoder(
            manifold.image_shape, manifold.latent_size, classes, width, manifold.box
        )
    encoder = encoder.to(device_of(manifold), dtype_of(manifold))
    indices = torch.arange(_MEASURED, device=encoder.mean.device)
    codes = manifold.sample_codes(_labels(manifold, indices, seed), seed, indices)
    latents = codes[:, : manifold.latent_size].to(encoder.mean)
    encoder.mean.copy_(latents.mean(0))
    encoder.deviation.copy_(latents.std(0).clamp(min=1e-6))
    return encoder


def _loss(
    manifold: Manifold, encoder: LatentEncoder, indices: Tensor, image_weight: float, seed: int
) -> Tensor:
    labels = _labels(manifold, indices, seed)
    codes = manifold.sample_codes(labels, seed, indices).to(encoder.mean)
    with torch.no_grad():
        images = manifold.decode(codes)
    found = encoder(images, labels)
    error = (found - codes)[:, : manifold.latent_size] / encoder.deviation
    loss: Tensor = error.square().mean()
    if image_weight:
        loss = loss + image_weight * F.mse_loss(manifold.decode(found), images)
    return loss


def _labels(manifold: Manifold, indices: Tensor, seed: int) -> Tensor:
    classes = int(getattr(manifold, "num_classes", 1))
    return integers(seed, indices, classes, stream="encoder/labels")
