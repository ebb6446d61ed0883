"""On the manifold: a norm ball around the code (DMAT eq. 5, Disentangling eq. 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from onmanifold.foundation.errors import InputError
from onmanifold.foundation.registry import THREATS
from onmanifold.manifolds.base import Chart, Manifold
from onmanifold.threats.base import Ball, Region, Threat, Variables, check_radius
from onmanifold.threats.geometry import Norm

# Layers that act otherwise in train mode, and then mix the samples of a batch or draw random numbers.
_MODAL = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


class LatentRegion(Region):
    """A latent ball around a batch; the variable "latent" is added to the (chosen) latents of the codes."""

    def __init__(
        self, chart: Chart, ball: Ball, columns: Tensor | None, residual: Tensor | None
    ) -> None:
        self.chart = chart
        self.balls = {"latent": ball}
        self.columns = columns
        self.residual = residual

    def render(self, variables: Variables) -> Tensor:
        """The decoded codes, plus the residual of the images where it is kept."""
        move = variables["latent"]
        latents = self.chart.latents
        moved = latents + move if self.columns is None else latents.index_add(1, self.columns, move)
        images = self.chart.decode(moved)
        # Only a residual can lead out of [0, 1]; a decoder stays in it by itself.
        return images if self.residual is None else (images + self.residual).clamp(0, 1)

    def keep(self, mask: Tensor) -> Region:
        """The region of the selected samples."""
        residual = None if self.residual is None else self.residual[mask]
        return LatentRegion(
            self.chart.keep(mask), self.balls["latent"].keep(mask), self.columns, residual
        )


@THREATS.register("latent_ball")
@dataclass(frozen=True)
class LatentBall(Threat):
    """All images whose code is within a radius of the image's code.

    Without ``keep_residual`` attacks start from the reconstruction ``decode(code)``, as in the papers; with
    it from the image itself: ``decode(code + λ) + image − decode(code)``. On an exact manifold the two agree.

    Attributes:
        manifold: The generator.
        norm: "linf", "l2" or "l1", in latent units.
        radius: A number, or (B,) one per sample, in the units of the manifold's latents.
        levels: Names of the levels that may move (a flow's, for instance); None: all.
        keep_residual: Whether to keep what the manifold does not reproduce of the image.
        box: Latents stay in [-box, box]; "manifold": the manifold's own box; None: no box.
    """

    manifold: Manifold
    norm: Norm = "linf"
    radius: float | Tensor = 0.02
    levels: tuple[int, ...] | None = None
    keep_residual: bool = False
    box: float | Literal["manifold"] | None = "manifold"

    def __post_init__(self) -> None:
        check_radius(self.radius)
        unknown = set(self.levels or ()) - set(self.manifold.levels)
        if unknown or self.levels == ():
            raise InputError(
                f"levels: found {list(self.levels or ())}, expected some of {list(self.manifold.levels)}."
            )

    def around(self, images: Tensor, labels: Tensor, codes: Tensor | None = None) -> Region:
        """The latent ball around each image's code; without ``codes`` the manifold encodes the images.

        Raises:
            InputError: The manifold is in train mode, or the codes do not fit it.
        """
        self.manifold.to(images.device)
        if any(isinstance(part, _MODAL) and part.training for part in self.manifold.modules()):
            raise InputError(
                f"manifold: {self.manifold.name} is in train mode; expected `manifold.eval()` first."
            )
        with torch.no_grad():
            return self._around(images, labels, codes)

    def _around(self, images: Tensor, labels: Tensor, codes: Tensor | None) -> Region:
        if codes is None:
            chart = self.manifold.chart_of(images, labels)
        else:
            chart = self.manifold.chart(self.manifold.check_codes(codes, len(images)).to(images))
        columns = self._columns(images.device)
        centre = chart.latents if columns is None else chart.latents[:, columns]
        box = self.manifold.box if self.box == "manifold" else self.box
        low, high = (None, None) if box is None else (-box - centre, box - centre)
        residual = images - chart.decode(chart.latents) if self.keep_residual else None
        return LatentRegion(
            chart, Ball.of(self.norm, self.radius, centre, low, high), columns, residual
        )

    def _columns(self, device: torch.device) -> Tensor | None:
        if self.levels is None:
            return None
        positions = torch.arange(self.manifold.latent_size, device=device)
        return torch.cat(
            [positions[self.manifold.levels[level]] for level in sorted(set(self.levels))]
        )
