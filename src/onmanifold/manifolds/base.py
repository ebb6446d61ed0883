"""What a manifold is: a generator with a code, and the chart around a batch of codes that an attack works in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from onmanifold.foundation.errors import InputError
from onmanifold.foundation.randomness import normal, uniform
from onmanifold.foundation.registry import MANIFOLDS

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import core_schema


class Chart:
    """The manifold around a batch of codes: what stays fixed is bound once, the latents may move.

    Attributes:
        latents: (B, latent_size), the movable part of the codes.
    """

    def __init__(self, manifold: Manifold, codes: Tensor) -> None:
        self.manifold = manifold
        self.latents = codes[:, : manifold.latent_size]
        self.fixed = codes[:, manifold.latent_size :]

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] at ``latents`` (B, latent_size); differentiable."""
        return self.manifold.decode(torch.cat([latents, self.fixed.to(latents.dtype)], dim=1))

    def push(self, latents: Tensor, directions: Tensor) -> Tensor:
        """How the images move (B, C, H, W) where ``latents`` move along ``directions``, (B, latent_size) each.

        A Jacobian-vector product: the adjoint of the gradient of `decode`, at about the cost of one decoding.
        """
        moved: Tensor = torch.func.jvp(self.decode, (latents,), (directions,))[1]
        return moved.detach()

    def keep(self, mask: Tensor) -> Chart:
        """The chart of the samples selected by ``mask`` ((B,) bool or positions)."""
        return Chart(self.manifold, torch.cat([self.latents, self.fixed], dim=1)[mask])


class Manifold(nn.Module, ABC):
    """A generator with a code: ``decode(encode(images, labels))`` lies on the manifold.

    A code is a float tensor (B, code_size). Its first ``latent_size`` columns are the latents that an
    adversary may move; the others, such as a font or a class, say where on the manifold the image lives
    and never move.

    Attributes:
        name: Short name for tables.
        exact: Whether ``decode(encode(images))`` is the identity.
        code_size: Columns of a code.
        latent_size: Leading columns that may move.
        image_shape: (C, H, W).
        box: Latents live in [-box, box]; None: everywhere.
        spec: What rebuilds it, up to its weights; empty where nothing does.
    """

    name: str = "manifold"
    exact: bool = False
    code_size: int
    latent_size: int
    image_shape: tuple[int, int, int]
    box: float | None = None
    spec: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self.spec = {}

    @property
    def levels(self) -> Mapping[int, slice]:
        """Columns of each named part of the latents, such as the levels of a flow."""
        return {0: slice(0, self.latent_size)}

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A digest of all that determines ``decode``; runs are keyed by it."""

    @abstractmethod
    def encode(self, images: Tensor, labels: Tensor) -> Tensor:
        """Codes (B, code_size) of images (B, C, H, W) with labels (B,)."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] of codes (B, code_size)."""

    def sample_codes(self, labels: Tensor, seed: int = 0, indices: Tensor | None = None) -> Tensor:
        """Random codes (B, code_size) float32: a draw from the manifold's own distribution of codes.

        Args:
            labels: (B,) int64, wanted classes; a manifold that knows no classes ignores them.
            seed: Which draw.
            indices: (B,) int64 sample indices, on which each draw depends; None: 0 to B − 1.
        """
        if self.code_size != self.latent_size:
            raise NotImplementedError(f"{type(self).__name__} does not say how to draw its codes.")
        indices = torch.arange(len(labels), device=labels.device) if indices is None else indices
        shape = (self.latent_size,)
        if self.box is None:
            return normal(seed, indices, shape, stream="codes")
        return (2 * uniform(seed, indices, shape, stream="codes") - 1) * self.box

    def chart(self, codes: Tensor) -> Chart:
        """The chart around ``codes``; what does not change during an attack is computed here, once."""
        return Chart(self, codes)

    def chart_of(self, images: Tensor, labels: Tensor) -> Chart:
        """The chart around the codes of images (B, C, H, W) with labels (B,), in the images' precision.

        Raises:
            InputError: The codes are not finite.
        """
        codes = self.check_codes(self.encode(images, labels), len(images))
        return self.chart(codes.to(images))

    def check_codes(self, codes: Tensor, count: int) -> Tensor:
        """Check for a finite float tensor (count, code_size).

        Raises:
            InputError: Anything else.
        """
        expected = (count, self.code_size)
        if (
            not isinstance(codes, Tensor)
            or not codes.is_floating_point()
            or tuple(codes.shape) != expected
        ):
            found = type(codes).__name__
            if isinstance(codes, Tensor):
                found = f"{codes.dtype} {tuple(codes.shape)}"
            raise InputError(
                f"codes: expected a float tensor {expected} for {self.name}, found {found}."
            )
        if not bool(codes.isfinite().all()):
            raise InputError("codes: found NaN or infinite values.")
        return codes

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        from pydantic_core import core_schema

        def resolve(value: object, info: core_schema.ValidationInfo) -> object:
            built = MANIFOLDS.build(value, info.context)
            if not isinstance(built, cls):
                raise ValueError(f"expected a manifold, found {type(built).__name__}")
            return built

        return core_schema.with_info_plain_validator_function(resolve)
