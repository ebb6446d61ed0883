"""What all learned manifolds share: a specification, weights that make the fingerprint, classes in the code."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor

from onmanifold.foundation.errors import InputError
from onmanifold.foundation.randomness import normal
from onmanifold.foundation.weights import weights_digest
from onmanifold.manifolds.base import Manifold

ImageShape = tuple[int, int, int]


class LearnedManifold(Manifold):
    """A generator with weights; `build_manifold` makes it, `fit` trains it.

    A conditional one has the number of the class as the last column of its codes, which never moves.

    Args:
        image_shape: (C, H, W).
        num_classes: K.
        latent_size: Columns of a code that may move.
        conditional: Whether images depend on the class.

    Attributes:
        num_classes: K.
        conditional: Whether images depend on the class.
    """

    def __init__(
        self, image_shape: ImageShape, num_classes: int, latent_size: int, conditional: bool = False
    ) -> None:
        super().__init__()
        for name, value in (("num_classes", num_classes), ("latent_size", latent_size)):
            if value < 1:
                raise InputError(f"{name}: expected at least 1, found {value}.")
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise InputError(f"image_shape: expected (C, H, W), found {image_shape}.")
        channels, height, width = image_shape
        self.image_shape = (channels, height, width)
        self.num_classes, self.conditional = num_classes, conditional
        self.latent_size = latent_size
        self.code_size = latent_size + conditional

    @property
    def fingerprint(self) -> str:
        """A digest of architecture and weights."""
        spec = {key: value for key, value in self.spec.items() if key != "seed"}
        text = json.dumps(spec, sort_keys=True) + weights_digest(self)
        return f"{self.name}-{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}"

    def codes_of(self, latents: Tensor, labels: Tensor) -> Tensor:
        """Codes (B, code_size) of latents (B, latent_size) of the classes ``labels`` (B,)."""
        if not self.conditional:
            return latents
        return torch.cat([latents, labels.to(latents).unsqueeze(1)], dim=1)

    def labels_of(self, codes: Tensor) -> Tensor:
        """The classes (B,) int64 in the last column of codes (B, ...) of a conditional manifold.

        Raises:
            InputError: A number there is no class.
        """
        column = codes[:, -1].detach()
        labels = column.long()
        if not bool(((labels == column) & (labels >= 0) & (labels < self.num_classes)).all()):
            raise InputError(
                f"codes: expected a class from 0 to {self.num_classes - 1} in the last column."
            )
        return labels

    def sample_codes(self, labels: Tensor, seed: int = 0, indices: Tensor | None = None) -> Tensor:
        """Codes with standard normal latents, cut to the box, of the classes ``labels``; see `Manifold`."""
        indices = torch.arange(len(labels), device=labels.device) if indices is None else indices
        latents = normal(seed, indices, (self.latent_size,), stream="codes")
        if self.box is not None:
            latents = latents.clamp(-self.box, self.box)
        return self.codes_of(latents, labels)
