"""Whether adversarial examples leave the manifold (Disentangling, section 3.2 and appendix C)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

from onmanifold.analysis.distance import distance_by_neighbours, distance_by_projection
from onmanifold.analysis.successful import Successful, attack_successfully, right_ones
from onmanifold.analysis.tangent import tangent_parts
from onmanifold.attacks.base import Attack
from onmanifold.attacks.engine import untouched
from onmanifold.data.dataset import Batch
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.randomness import normal
from onmanifold.manifolds.base import Manifold
from onmanifold.manifolds.project import ProjectionConfig
from onmanifold.threats.latent import LatentBall

CLEAN, RANDOM = "clean", "random perturbation"
"""Kinds of images beside those that attacks make."""

LOSS_GRADIENT, RANDOM_DIRECTION = "loss gradient", "random direction"
"""Kinds of directions beside perturbations."""

Numbers = npt.NDArray[Any]


@dataclass(frozen=True)
class Leaving:
    """Where images and directions lie, seen from the manifold.

    Attributes:
        images: A row for each kind and image that counts: kind ("clean", "random perturbation", or an attack's
            name), sample, label; perturbation, the L2 norm of what was added; to_manifold, the L2 distance to the
            manifold by projection; to_neighbours, that to the affine span of the nearest training images;
            step_to_neighbours, that of the perturbation to the directions of this span (eq. 11); share
            and angle (in degrees) of the perturbation to the tangent space; of on-manifold attacks share_tenth
            and share_hundredth, those of the perturbation made of a tenth and a hundredth of the latents' move.
            NaN where there is no such number.
        directions: A row for each kind ("loss gradient", "random direction") and image: kind, sample, share and
            angle.
        batch: The images that were attacked: those that the classifier gets right.
        found: For each attack its successful examples.
        on_manifold: Names of the attacks that move along the manifold.
        images_seen: Number of images.
        rank: Mean dimension of the tangent spaces; NaN where it was not determined.
        pixels: Number of values of an image.
        tolerance: Distance to the manifold that the search takes for none.
    """

    images: pd.DataFrame
    directions: pd.DataFrame
    batch: Batch
    found: Mapping[str, Successful]
    on_manifold: tuple[str, ...]
    images_seen: int
    rank: float
    pixels: int
    tolerance: float


def measure_leaving(
    classifier: nn.Module,
    manifold: Manifold,
    batch: Batch,
    attacks: Mapping[str, Attack],
    train_images: Tensor,
    *,
    neighbours: int = 50,
    projection: ProjectionConfig | None = None,
    seed: int = 0,
) -> Leaving:
    """Attack images, and measure how far what is found lies from the manifold, and in which direction.

    Only images that the classifier gets right count, and of attacks only successful examples, as in the paper.
    Tangent spaces are those at the codes of the clean images, which are the batch's own or else ``encode``'s;
    there projections start too, for all kinds of images alike. Beside the paper's kinds a random point on the
    surface of the first regular attack's ball shows what any perturbation of this size does.

    Args:
        classifier: Images to logits; left as it is.
        manifold: The generator.
        batch: Test images with labels, and their codes where they are known to be this manifold's.
        attacks: By name; those on a `LatentBall` move along the manifold, all others are regular.
        train_images: (N, C, H, W) in [0, 1], for the distance by neighbours.
        neighbours: How many of them span the approximated manifold.
        projection: How the nearest point is searched; None: as on FONTS.
        seed: Of all that is random.

    Raises:
        InputError: No attacks, or one whose name is taken.
        NothingRightError: The classifier gets no image right.
    """
    for name in (CLEAN, RANDOM):
        if name in attacks or not attacks:
            raise InputError(
                f"attacks: expected some, none named {name!r}, found {sorted(attacks)}."
            )
    kept = right_ones(classifier, manifold, batch)
    everyone = torch.arange(len(kept.labels), device=kept.labels.device)
    found = {CLEAN: Successful(everyone, kept.images, kept.images)}
    regular = [item.threat for item in attacks.values() if not isinstance(item.threat, LatentBall)]
    if regular:
        with torch.no_grad():
            threat = regular[0].facing(classifier, kept.images)
            region = threat.around(kept.images, kept.labels, kept.codes)
            noisy = region.render(region.random("surface", seed, kept.indices)).clamp(0, 1)
        found[RANDOM] = Successful(everyone, noisy, kept.images)
    for name, attack in attacks.items():
        found[name] = attack_successfully(classifier, attack, kept, manifold, seed)
    parts = [
        _measured(manifold, kept, kind, each, train_images, neighbours, projection, seed)
        for kind, each in found.items()
    ]
    directions, rank = _directions(classifier, manifold, kept, seed)
    return Leaving(
        images=pd.concat(parts, ignore_index=True),
        directions=directions,
        batch=kept,
        found={name: found[name] for name in attacks},
        on_manifold=tuple(
            name for name, attack in attacks.items() if isinstance(attack.threat, LatentBall)
        ),
        images_seen=len(batch.labels),
        rank=rank,
        pixels=math.prod(manifold.image_shape),
        tolerance=(projection or ProjectionConfig()).tolerance,
    )


def _measured(
    manifold: Manifold,
    batch: Batch,
    kind: str,
    found: Successful,
    train_images: Tensor,
    neighbours: int,
    projection: ProjectionConfig | None,
    seed: int,
) -> pd.DataFrame:
    """The rows of one kind of images."""
    rows = found.rows
    labels, indices = batch.labels[rows], batch.indices[rows]
    assert batch.codes is not None
    codes = batch.codes[rows]
    columns: dict[str, Tensor] = {
        "sample": indices,
        "label": labels,
        "perturbation": (found.images - batch.images[rows]).flatten(1).norm(dim=1),
        "to_manifold": distance_by_projection(
            manifold, found.images, labels, codes, config=projection, seed=seed, indices=indices
        ).distance,
        "to_neighbours": distance_by_neighbours(train_images, found.images, neighbours).distance,
    }
    if kind != CLEAN:
        columns["step_to_neighbours"] = distance_by_neighbours(
            train_images, found.images, neighbours, originals=batch.images[rows]
        ).distance
    parts = tangent_parts(manifold, codes, found.images - found.origins)
    columns["share"], columns["angle"] = parts.share, parts.angle.rad2deg()
    for name, images in zip(("share_tenth", "share_hundredth"), found.smaller, strict=False):
        columns[name] = tangent_parts(manifold, codes, images - found.origins).share
    table = pd.DataFrame({name: _array(values) for name, values in columns.items()})
    table.insert(0, "kind", kind)
    return table


def _directions(
    classifier: nn.Module, manifold: Manifold, batch: Batch, seed: int
) -> tuple[pd.DataFrame, float]:
    """The gradient of the loss and a Gaussian direction at each image, and the mean rank of the tangent spaces."""
    assert batch.codes is not None
    with untouched(classifier), torch.enable_grad():
        leaf = batch.images.detach().clone().requires_grad_()
        loss = nn.functional.cross_entropy(classifier(leaf), batch.labels, reduction="sum")
        (gradients,) = torch.autograd.grad(loss, leaf)
    gaussian = normal(seed, batch.indices, batch.images.shape[1:], stream="leaving/direction")
    tables, ranks = [], []
    for kind, vectors in ((LOSS_GRADIENT, gradients), (RANDOM_DIRECTION, gaussian)):
        # The loss of a sure classifier has a gradient that is too small for float32's squares.
        longest = vectors.flatten(1).abs().amax(1).view(-1, 1, 1, 1)
        scaled = torch.where(longest > 0, vectors / longest, 0)
        parts = tangent_parts(manifold, batch.codes, scaled)
        ranks.append(parts.rank.double().mean().item())
        columns = {"sample": batch.indices, "share": parts.share, "angle": parts.angle.rad2deg()}
        table = pd.DataFrame({name: _array(values) for name, values in columns.items()})
        table.insert(0, "kind", kind)
        tables.append(table)
    return pd.concat(tables, ignore_index=True), ranks[0] if ranks[0] >= 0 else math.nan


def _array(values: Tensor) -> Numbers:
    array: Numbers = values.detach().cpu().numpy()
    return array.astype(np.float64) if array.dtype.kind == "f" else array
