"""Projection onto a manifold as a test-time defence: the classifier sees the nearest image found on it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from onmanifold.foundation.errors import InputError
from onmanifold.manifolds.base import Manifold
from onmanifold.manifolds.project import Projection, ProjectionConfig, project


class ManifoldProjection(nn.Module):
    """A transformation for `Defence`: the nearest image found on a manifold (as in Defense-GAN, Samangouei 2018).

    No label is needed: descents start at the codes whose images are nearest, or, without ``codes``, at what the
    manifold encodes the image to under each label. The nearest image found is what the classifier sees.

    It cuts the gradient; `smooth` is a stand-in for `BPDA`. Unrolled, it has the gradient of the projection as
    such: near the point found, moving the image moves its projection along the manifold's tangent,
    dz = (JᵀJ)⁻¹ Jᵀ dx with J the decoder's Jacobian (Gauss-Newton, the curvature left out), so that no second
    derivative of the decoder is needed.

    Args:
        manifold: The generator.
        codes: (N, code_size) where descents may start, such as a training set's; None: ``manifold.encode``.
        starts: How many of the nearest codes are tried.
        steps: Of each descent; 0: the starting points themselves.
        restarts: Further descents of each from random latents; see `project`.
    """

    bank: Tensor
    half_squares: Tensor
    codes: Tensor | None

    def __init__(
        self,
        manifold: Manifold,
        codes: Tensor | None = None,
        *,
        starts: int = 2,
        steps: int = 10,
        restarts: int = 0,
    ) -> None:
        super().__init__()
        if starts < 1 or steps < 0 or restarts < 0:
            raise InputError("ManifoldProjection: expected starts >= 1 and steps, restarts >= 0.")
        self.manifold = manifold
        self.starts, self.steps, self.restarts = starts, steps, restarts
        self.register_buffer("codes", None)
        if codes is not None:
            self.codes = manifold.check_codes(codes, len(codes)).detach()
            with torch.no_grad():
                images = torch.cat(
                    [manifold.decode(part) for part in torch.split(self.codes, 1024)]
                )
            self.register_buffer("bank", images.flatten(1))
            self.register_buffer("half_squares", self.bank.square().sum(1) / 2)

    def forward(self, images: Tensor, differentiable: bool = False) -> Tensor:
        """The nearest images found, (B, C, H, W)."""
        found = self.nearest(images.detach())
        return self._followed(images, found.codes) if differentiable else found.images

    @torch.no_grad()
    def nearest(self, images: Tensor) -> Projection:
        """The nearest points found for images (B, C, H, W) in [0, 1]."""
        starts = self._starts(images)
        count = starts.shape[1]
        # Each draws the same random latents, so that an image does not depend on its batch.
        same = torch.zeros(count * len(images), dtype=torch.int64, device=images.device)
        found = project(
            self.manifold,
            images.repeat_interleave(count, dim=0),
            starts.flatten(0, 1),
            config=ProjectionConfig(steps=self.steps, restarts=self.restarts),
            indices=same,
        )
        best = found.distance.view(-1, count).argmin(1)
        rows = best + count * torch.arange(len(images), device=images.device)
        distance = found.distance[rows]
        return Projection(found.codes[rows], found.images[rows], distance, distance, found.measure)

    def smooth(self, images: Tensor) -> Tensor:
        """A differentiable stand-in: the mean of all codes' images, weighted by exp(−distance² / 2).

        It is the expected clean image under Gaussian noise of unit deviation in each pixel, and knows of the
        choice between codes, which the unrolled gradient takes as given.

        Raises:
            InputError: The projection has no codes.
        """
        if self.codes is None:
            raise InputError("smooth: the projection has no codes to average over.")
        nearness = images.flatten(1) @ self.bank.to(images).T - self.half_squares.to(images)
        return (nearness.softmax(1) @ self.bank.to(images)).view_as(images)

    def _starts(self, images: Tensor) -> Tensor:
        """Codes (B, S, code_size)."""
        if self.codes is not None:
            nearness = images.flatten(1) @ self.bank.to(images).T - self.half_squares.to(images)
            chosen = nearness.topk(min(self.starts, len(self.codes)), dim=1).indices
            return self.codes.to(images)[chosen]
        labels = range(int(getattr(self.manifold, "num_classes", 1)))
        whole = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        with torch.enable_grad():  # an encoder may be a search
            codes = [self.manifold.encode(images, whole + label).detach() for label in labels]
        return torch.stack(codes, dim=1).to(images)

    def _followed(self, images: Tensor, codes: Tensor) -> Tensor:
        """The images of the codes, their gradient that of the projection."""
        chart = self.manifold.chart(codes)
        with torch.no_grad():
            jacobian = _jacobian(chart.decode, chart.latents)
            squares = jacobian.transpose(1, 2) @ jacobian
            scale = squares.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
            # Latents that change nothing would make it singular.
            damping = 1e-4 * scale[:, None, None] * torch.eye(squares.shape[1]).to(squares)
            inverse = torch.linalg.solve(squares + damping, jacobian.transpose(1, 2))
        moved = (inverse @ (images - images.detach()).flatten(1).unsqueeze(2)).squeeze(2)
        return chart.decode(chart.latents + moved)


def _jacobian(decode: Callable[[Tensor], Tensor], latents: Tensor) -> Tensor:
    """Of the flattened images to the latents, (B, D, L), by central differences."""
    step = 1e-3 if latents.dtype == torch.float32 else 1e-5
    columns = []
    for column in range(latents.shape[1]):
        move = torch.zeros_like(latents)
        move[:, column] = step
        columns.append((decode(latents + move) - decode(latents - move)).flatten(1) / (2 * step))
    return torch.stack(columns, dim=2)
