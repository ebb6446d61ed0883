"""The successful examples of attacks: on images that the classifier gets right, of those alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from onmanifold.attacks.base import Attack
from onmanifold.attacks.engine import untouched
from onmanifold.data.dataset import Batch
from onmanifold.foundation.errors import InputError
from onmanifold.manifolds.base import Manifold
from onmanifold.threats.base import Region, Threat, Variables
from onmanifold.threats.joint import JointBall
from onmanifold.threats.latent import LatentBall, LatentRegion

# A stored code's image and the image itself may differ by the steps of stored pixels, and by a device's rounding.
_SAME = 2 / 255

FRACTIONS = (0.1, 0.01)
"""Of an on-manifold perturbation in latent space: where its image is looked at too."""


class NothingRightError(InputError):
    """A classifier gets no image right, so that there is nothing to attack."""


@dataclass(frozen=True)
class Successful:
    """The successful examples of an attack.

    Attributes:
        rows: (S,) int64 their positions in the batch.
        images: (S, C, H, W).
        origins: (S, C, H, W) what the perturbation was added to: the image, or on a manifold that does not
            reproduce it the reconstruction.
        smaller: Of on-manifold attacks the images (S, C, H, W) at each of `FRACTIONS` of the latents' move.
        codes: (S, code_size) of on-manifold attacks on the manifold that was asked about, where they ended.
    """

    rows: Tensor
    images: Tensor
    origins: Tensor
    smaller: tuple[Tensor, ...] = ()
    codes: Tensor | None = None


def right_ones(classifier: nn.Module, manifold: Manifold, batch: Batch) -> Batch:
    """The images that a classifier gets right, with codes on the manifold: their own, or else ``encode``'s.

    Args:
        classifier: Left as it is.
        manifold: Whose codes are wanted.
        batch: With codes where they are known to be this manifold's. On an exact one they are looked at too: a
            code that does not reproduce its image is not the image's, which is encoded.

    Raises:
        NothingRightError: There are none.
    """
    with torch.no_grad(), untouched(classifier):
        right = classifier(batch.images).argmax(1) == batch.labels
    if not bool(right.any()):
        raise NothingRightError("classifier: it gets no image right.")
    images, labels = batch.images[right], batch.labels[right]
    stored = None if batch.codes is None else batch.codes[right]
    with torch.no_grad():
        codes = _codes_of(manifold.to(images.device), images, labels, stored)
    return Batch(images, labels, codes.detach(), batch.indices[right])


def _codes_of(manifold: Manifold, images: Tensor, labels: Tensor, stored: Tensor | None) -> Tensor:
    """The stored codes where they are the images' own, elsewhere what the manifold finds."""
    if stored is None or stored.shape[1] != manifold.code_size:
        return manifold.encode(images, labels)
    if not manifold.exact:
        return stored
    try:
        apart = (manifold.decode(stored) - images).abs().flatten(1).amax(1)
    except InputError:  # such as the number of a font that there is not: codes of another manifold
        return manifold.encode(images, labels)
    other = ~(apart <= _SAME)
    codes = stored.clone()
    if bool(other.any()):
        codes[other] = manifold.encode(images[other], labels[other]).to(codes)
    return codes


def attack_successfully(
    classifier: nn.Module, attack: Attack, batch: Batch, manifold: Manifold, seed: int = 0
) -> Successful:
    """Attack images that the classifier gets right; what fools it is kept.

    Args:
        classifier: What is attacked; left as it is.
        attack: On the manifold where its threat model is a `LatentBall`.
        batch: From `right_ones`.
        manifold: Whose codes the batch has; an attack on another one encodes the images itself.
        seed: Of random starts.
    """
    own = _manifold_of(attack.threat)
    known = own is not None and own.fingerprint == manifold.fingerprint
    codes = batch.codes if known else None
    result = attack(classifier, batch.images, batch.labels, codes, seed=seed, indices=batch.indices)
    rows = result.success.nonzero().squeeze(1)
    images = batch.images[rows]
    if not isinstance(attack.threat, LatentBall) or not len(rows):
        return Successful(rows, result.images[rows], images)
    moves = {name: values[rows] for name, values in result.variables.items()}
    with torch.no_grad():
        starts = None if codes is None else codes[rows]
        region = attack.threat.around(images, batch.labels[rows], starts)
        origins, *smaller = (_moved(region, moves, part) for part in (0.0, *FRACTIONS))
    ends = _ends(region, moves) if known else None
    return Successful(rows, result.images[rows], origins, tuple(smaller), ends)


def _manifold_of(threat: Threat) -> Manifold | None:
    """The manifold along which a threat model moves."""
    if isinstance(threat, JointBall):
        threat = threat.latent
    return threat.manifold if isinstance(threat, LatentBall) else None


def _moved(region: Region, moves: Variables, part: float) -> Tensor:
    return region.render({name: part * values for name, values in moves.items()}).clamp(0, 1)


def _ends(region: Region, moves: Variables) -> Tensor:
    """The codes after the move."""
    assert isinstance(region, LatentRegion)
    latents, columns, move = region.chart.latents, region.columns, moves["latent"]
    latents = latents + move if columns is None else latents.index_add(1, columns, move)
    return torch.cat([latents, region.chart.fixed.to(latents)], dim=1)
