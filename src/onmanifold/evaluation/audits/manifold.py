"""Checks of robustness on the manifold: is it the manifold, the reconstruction or the attack that is measured?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from onmanifold.attacks import APGD, PGD, RandomPerturbation
from onmanifold.evaluation.audits.checks import (
    Answer,
    check,
    percent,
    skipped,
    surely_above,
    verdict_of,
)
from onmanifold.evaluation.audits.study import Bools, Study
from onmanifold.evaluation.statistics import compare_paired
from onmanifold.foundation import randomness
from onmanifold.objectives import Margin
from onmanifold.threats import JointBall, LatentBall, Region, Threat, Variables
from onmanifold.threats.base import Ball

# How far the accuracy on reconstructions may lie below that on the images.
_RECONSTRUCTION = 0.02
# Closer than this to the control, surely, and with at least this share broken: it is not the manifold that counts.
# Either may well be the more harmful one: a network that knows the manifold is sturdier along it.
_CONTROL, _BROKEN = 0.05, 0.1
# "More than a few points": the on-manifold metric is not what it says.
_OVERSTATED = 0.03
_METRIC_STEPS, _RESTARTS = 50, 5
_ABSENT = "There is no latent space in this threat model."


@check("reconstruction")
def reconstruction(study: Study) -> Answer:
    """Is the accuracy at zero perturbation that on the images?"""
    if _latent(study.threat) is None:
        return skipped(_ABSENT)
    right = []
    with study.regions() as regions:
        for part, region in regions:
            with torch.no_grad():
                logits = part.model(region.render(region.zero()))
            right.append(logits.argmax(1) == part.labels)
    lost: Bools = ~torch.cat(right).cpu().numpy()
    clean, kept = study.accuracy(np.zeros_like(lost)), study.accuracy(lost)
    sentence = (
        f"At zero perturbation, of the samples right on the images ({percent(clean)}), "
        f"{percent(kept)} remain right; what is lost there is lost to the reconstruction, and no "
        "attack or defence deserves the credit."
    )
    numbers = {"accuracy_images": clean, "accuracy_reconstructions": kept}
    return verdict_of(surely_above(lost, _RECONSTRUCTION)), numbers, sentence


@check("on-manifold metric")
def on_manifold_metric(study: Study) -> Answer:
    """Do APGD with restarts and random draws beat OM-PGD-50, by which the papers measure?"""
    threat = study.threat
    if not isinstance(threat, LatentBall):
        return skipped(
            _ABSENT if _latent(threat) is None else "Of a latent ball alone, not of a joint one."
        )
    papers = study.run(PGD(threat, steps=_METRIC_STEPS))
    strong = APGD(threat, steps=_METRIC_STEPS, objective=Margin(), restarts=_RESTARTS)
    draws = RandomPerturbation(
        threat, start="surface", restarts=_METRIC_STEPS + 1, objective=Margin()
    )
    apgd, random = study.run(strong).broken, study.run(draws).broken
    gains = (apgd | random) & ~papers.broken
    numbers = {
        "accuracy_om_pgd_50": study.accuracy(papers.broken),
        "accuracy_apgd_restarts": study.accuracy(apgd),
        "accuracy_random": study.accuracy(random),
        "accuracy_together": study.accuracy(papers.broken | apgd | random),
        "missed_by_om_pgd_50": float(gains.mean()),
    }
    shown = [
        percent(numbers[f"accuracy_{name}"]) for name in ("om_pgd_50", "apgd_restarts", "random")
    ]
    alarm = surely_above(gains, _OVERSTATED)
    sentence = (
        f"OM-PGD-50 leaves {shown[0]}, APGD on the margin with {_RESTARTS} restarts {shown[1]}, "
        f"and as many random draws as OM-PGD has passes {shown[2]}: "
        + (
            "the papers' on-manifold metric overstates"
            if alarm
            else "the on-manifold metric does not overstate"
        )
        + f" robustness (together they leave {percent(numbers['accuracy_together'])})."
    )
    return verdict_of(alarm), numbers, sentence


@check("random subspace")
def random_subspace(study: Study) -> Answer:
    """Does the same budget in a random linear subspace of image space break as much as the manifold?"""
    threat = study.threat
    if not isinstance(threat, LatentBall):
        return skipped(
            _ABSENT if _latent(threat) is None else "Of a latent ball alone, not of a joint one."
        )
    moves = PGD(threat, steps=study.budget.steps, objective=Margin())
    on = study.run(moves)
    if not on.differentiable:
        return skipped("The model has no gradient, so that there is no attack to compare with.")
    control, done = [], 0
    with study.regions() as regions:
        starts = [(part, region.render(region.zero()).detach()) for part, region in regions]
    for part, images in starts:
        length = (on.images[done : done + len(images)] - images).flatten(1).norm(dim=1)
        done += len(images)
        ball = _Subspace(_basis(threat, images, study.seed), length)
        attack = PGD(ball, steps=study.budget.steps, objective=Margin())
        result = attack(
            part.model, images.clamp(0, 1), part.labels, seed=study.seed, indices=part.indices
        )
        control.append(result.success)
    broken: Bools = torch.cat(control).cpu().numpy()
    numbers = {
        "accuracy_manifold": study.accuracy(on.broken),
        "accuracy_subspace": study.accuracy(broken),
        "dimension": float(next(iter(on.variables.values()))[0].numel()),
    }
    difference = compare_paired(broken, on.broken)
    numbers |= {"low": difference.low, "high": difference.high}
    same = max(abs(difference.low), abs(difference.high)) < _CONTROL
    alarm = same and min(broken.mean(), on.broken.mean()) > _BROKEN
    sentence = (
        f"With perturbations of equal dimension ({numbers['dimension']:.0f}) and equal L2 size in "
        f"image space, the manifold leaves {percent(numbers['accuracy_manifold'])} and a random "
        f"linear subspace {percent(numbers['accuracy_subspace'])}; where both surely do the same "
        "harm, any few directions would do, and the result is not about the manifold."
    )
    return verdict_of(alarm), numbers, sentence


def _latent(threat: Threat) -> LatentBall | None:
    if isinstance(threat, JointBall):
        return threat.latent
    return threat if isinstance(threat, LatentBall) else None


def _basis(threat: LatentBall, images: Tensor, seed: int) -> Tensor:
    """Orthonormal directions (latents, C·H·W), random."""
    size = images[0].numel()
    manifold = threat.manifold
    levels = (
        manifold.levels
        if threat.levels is None
        else {name: manifold.levels[name] for name in threat.levels}
    )
    columns = {place for part in levels.values() for place in range(manifold.latent_size)[part]}
    count = min(len(columns), size)
    rows = randomness.normal(
        seed, torch.arange(count), (size,), stream="audit/subspace", dtype=torch.float64
    )
    basis: Tensor = torch.linalg.qr(rows.T).Q
    return basis.T.to(images)


class _SubspaceRegion(Region):
    """A linear subspace of image space around a batch."""

    def __init__(self, images: Tensor, basis: Tensor, ball: Ball) -> None:
        self.images = images
        self.basis = basis
        self.balls = {"subspace": ball}

    def render(self, variables: Variables) -> Tensor:
        """Images plus the combination of the directions, clipped to [0, 1]."""
        move = variables["subspace"] @ self.basis
        return (self.images + move.view_as(self.images)).clamp(0, 1)

    def keep(self, mask: Tensor) -> Region:
        """The region of the selected samples."""
        return _SubspaceRegion(self.images[mask], self.basis, self.balls["subspace"].keep(mask))


@dataclass(frozen=True, eq=False)
class _Subspace(Threat):
    """An L2 ball in the span of some directions.

    Attributes:
        basis: (latents, C·H·W), orthonormal.
        radius: (B,).
    """

    basis: Tensor
    radius: Tensor

    def around(self, images: Tensor, labels: Tensor, codes: Tensor | None = None) -> Region:
        """The ball around each image."""
        zero = images.new_zeros(len(images), len(self.basis))
        return _SubspaceRegion(images, self.basis, Ball.of("l2", self.radius, zero))
