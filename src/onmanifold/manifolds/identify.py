"""Which font, and which transformation of it: the code of an image of FONTS that comes without one."""

from __future__ import annotations

import torch
from torch import Tensor

from onmanifold.foundation.checks import check_images, check_labels
from onmanifold.foundation.errors import InputError
from onmanifold.manifolds.base import Manifold
from onmanifold.manifolds.project import Projection, ProjectionConfig, project

_FIRST_FONTS = 12
_NEAR_FONTS = 8
_CHUNK = 64


def identify(
    manifold: Manifold, fonts: int, classes: int, images: Tensor, labels: Tensor
) -> Tensor:
    """Codes (B, 8) of images of known class, by search over fonts and transformations.

    First the transformation is found for some fonts spread over all of them; then, in turns, the best fonts
    for the transformation and the transformation for the fonts. The image of the code found is near, but the
    font may be another that looks nearly the same.

    Args:
        manifold: Its codes end in the numbers of font and class.
        fonts: How many there are.
        classes: How many there are.
        images: (B, C, H, W) in [0, 1].
        labels: (B,).

    Raises:
        InputError: Images or labels of the wrong shape or range.
    """
    images = check_images(images)
    labels = check_labels(labels, len(images), classes)
    if tuple(images.shape[1:]) != manifold.image_shape:
        raise InputError(
            f"images: expected (B, {manifold.image_shape}), found {tuple(images.shape)}."
        )
    parts = zip(torch.split(images, _CHUNK), torch.split(labels, _CHUNK), strict=True)
    codes = [_identify(manifold, fonts, image, label) for image, label in parts]
    return torch.cat(codes) if codes else images.new_zeros(0, manifold.code_size)


def _identify(manifold: Manifold, fonts: int, images: Tensor, labels: Tensor) -> Tensor:
    count = len(images)
    first = torch.linspace(0, fonts - 1, min(_FIRST_FONTS, fonts))
    repeated = images.repeat_interleave(len(first), dim=0)
    codes = images.new_zeros(len(repeated), manifold.code_size)
    codes[:, -2] = first.round().to(images).repeat(count)
    codes[:, -1] = labels.to(images).repeat_interleave(len(first))
    # The same draws for all, so that a code does not depend on what else is in the batch.
    same = torch.zeros(len(repeated), dtype=torch.int64, device=images.device)
    search = ProjectionConfig(steps=40, restarts=1, tolerance=0.0)
    rough = project(manifold, repeated, codes, config=search, indices=same)
    codes = _nearest(rough, count, min(2, len(first)))
    for steps in (40, 100):
        per_image = len(codes) // count
        codes = _near_fonts(manifold, fonts, images.repeat_interleave(per_image, dim=0), codes)
        repeated = images.repeat_interleave(len(codes) // count, dim=0)
        search = ProjectionConfig(steps=steps, restarts=0)
        refined = project(manifold, repeated, codes, config=search)
        codes = _nearest(refined, count, 1)
    return codes


def _nearest(projection: Projection, count: int, kept: int) -> Tensor:
    """The codes (count * kept, 8) of each image's ``kept`` nearest projections."""
    order = projection.distance.view(count, -1).topk(kept, largest=False).indices
    codes = projection.codes.view(count, -1, projection.codes.shape[1])
    return codes.gather(1, order[..., None].expand(-1, -1, codes.shape[2])).flatten(0, 1)


@torch.no_grad()
def _near_fonts(manifold: Manifold, fonts: int, images: Tensor, codes: Tensor) -> Tensor:
    """Each code with the fonts whose letters, under the same transformation, are nearest: (B * n, 8)."""
    distances = []
    trial = codes.clone()
    for font in range(fonts):
        trial[:, -2] = font
        distances.append((manifold.decode(trial) - images).flatten(1).norm(dim=1))
    near = torch.stack(distances, dim=1).topk(min(_NEAR_FONTS, fonts), largest=False).indices
    found = codes.repeat_interleave(near.shape[1], dim=0)
    found[:, -2] = near.flatten().to(codes)
    return found
