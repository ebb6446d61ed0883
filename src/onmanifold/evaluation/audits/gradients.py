"""Checks of the gradients that attacks follow: are they there, are they right, do they lead anywhere?"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from onmanifold.attacks.engine import full_float32, untouched
from onmanifold.attacks.stepped import resolve_step_sizes
from onmanifold.evaluation.audits.balls import draw
from onmanifold.evaluation.audits.checks import (
    Answer,
    check,
    percent,
    surely_above,
    surely_below,
    surely_more,
    verdict_of,
)
from onmanifold.evaluation.audits.study import Bools, Study
from onmanifold.evaluation.audits.subject import Subject
from onmanifold.foundation import randomness
from onmanifold.objectives import CrossEntropy, Margin, Network, Objective
from onmanifold.threats.base import Region, Variables

# More samples than this without a gradient, and a search from a random start stands still on them. An honest
# network has none: logits would have to differ by more than 100 for the cross-entropy to vanish in float32.
_WITHOUT_GRADIENT = 0.01
# Gradients below this are about to underflow: reported, but the sign of such a gradient may still be right.
_TINY = 1e-20
# The scale-free objective beats cross-entropy by 1 to 3 points on adversarially trained networks (TRADES: 4), by
# 20 and more where cross-entropy is masked (Croce and Hein 2020, tables 2 and 3).
_OBJECTIVES_APART = 0.05
# Cosine between what the gradient predicts and what the model does, on the median sample, at the best of the
# distances. Exact gradients of smooth models give 1; unrelated ones about 0, within 0.3 for this many directions.
_AGREEMENT = 0.5
_DIRECTIONS = 12
# Distances of the finite differences, as shares of the radius. The narrow ones are reported; the verdict is that
# of the wide ones, which are as long as an attack's steps: a ripple across the path makes a gradient useless
# though it is exact, and an input that is quantised has no slope but at such distances.
_DISTANCES = (1e-3, 1e-2, 0.1, 0.5)
_WIDE = 2
# The loss of an honest model rises on practically all samples.
_RISING = 0.95
# Samples of the two checks that look closely.
_CLOSE_LOOK = 64


class Slopes(NamedTuple):
    """An objective and its gradient to the perturbation, a row per sample.

    Attributes:
        values: (B,) float64.
        gradients: (B, D) of all variables.
        connected: False where the output does not depend on the input through anything differentiable.
    """

    values: Tensor
    gradients: Tensor
    connected: bool


def slopes_at(
    model: Network, region: Region, points: Variables, objective: Objective, labels: Tensor
) -> Slopes:
    """The objective and its gradient, without repairing anything."""
    with torch.enable_grad():
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in points.items()}
        logits = model(region.render(leaves))
        values = objective.value(logits, labels)
        found: tuple[Tensor | None, ...] = (None,) * len(leaves)
        if values.requires_grad:
            found = torch.autograd.grad(values.sum(), list(leaves.values()), allow_unused=True)
    gradients = [
        (torch.zeros_like(leaf) if gradient is None else gradient).flatten(1)
        for leaf, gradient in zip(leaves.values(), found, strict=True)
    ]
    # In float64: the loss of a confident network is 0 in float32 long before its gradient is.
    exact = objective.value(logits.detach().double(), labels)
    return Slopes(exact, torch.cat(gradients, dim=1), any(part is not None for part in found))


@check("zero gradients")
def zero_gradients(study: Study) -> Answer:
    """Is there a gradient to follow, at a random point of the ball?"""
    shares: dict[str, float] = {}
    alarms, connected = [], True
    for name, objective in (("cross_entropy", CrossEntropy()), ("margin", Margin())):
        slopes = []
        with study.regions() as regions:
            for part, region in regions:
                points = draw(region, part, 0, 0.5)
                slopes.append(slopes_at(part.model, region, points, objective, part.labels))
        largest = torch.cat([part.gradients.abs().amax(1) for part in slopes]).cpu().numpy()
        connected = connected and all(part.connected for part in slopes)
        absent = ~np.isfinite(largest)
        shares |= {
            f"{name}_zero": float((largest == 0).mean()),
            f"{name}_not_finite": float(absent.mean()),
            f"{name}_tiny": float(((largest > 0) & (largest < _TINY)).mean()),
        }
        alarms.append(surely_above(absent | (largest == 0), _WITHOUT_GRADIENT))
    worst = max(
        shares[f"{name}_zero"] + shares[f"{name}_not_finite"]
        for name in ("cross_entropy", "margin")
    )
    cause = "" if connected else " (the output is cut off from the input: something is detached)"
    sentence = (
        "At a random point of the ball the gradient is exactly zero or not finite on "
        f"{percent(worst)} of the samples{cause}; an attack by gradient stands still there, which "
        "looks like robustness."
    )
    return verdict_of(any(alarms)), shares, sentence


@check("objectives agree")
def objectives_agree(study: Study) -> Answer:
    """Does an objective that ignores the scale of the logits break much more than cross-entropy?"""
    ce, free = study.run(study.cross_entropy()).broken, study.run(study.scale_free()).broken
    numbers = {
        "accuracy_cross_entropy": study.accuracy(ce),
        "accuracy_dlr": study.accuracy(free),
        "only_dlr_breaks": float((free & ~ce).mean()),
    }
    alarm = surely_more(free, ce, _OBJECTIVES_APART)
    sentence = (
        f"APGD leaves {percent(study.accuracy(ce))} on cross-entropy and "
        f"{percent(study.accuracy(free))} on the scale-free DLR with the same steps; where the "
        "second is far lower, large or flattened logits hide the gradient of cross-entropy, and a "
        "number from it alone says nothing."
    )
    return verdict_of(alarm), numbers, sentence


@check("gradients agree with the model")
def gradients_agree(study: Study) -> Answer:
    """Does the margin change along random directions as its gradient says?"""
    cosines = []
    for part in study.parts(_CLOSE_LOOK):
        try:
            cosines.append(_agreement(study, _in_float64(part)))
        except (RuntimeError, TypeError, ValueError):
            # Not every model or manifold runs in float64; the wider distances are exact enough in float32.
            cosines.append(_agreement(study, part))
    rows = torch.cat(cosines, dim=1)
    medians = rows.median(dim=1).values.tolist()
    wide = medians[-_WIDE:]
    at_best: Bools = (rows[-_WIDE:][wide.index(max(wide))] < _AGREEMENT).cpu().numpy()
    numbers = {
        f"cosine_at_{share:g}_radius": value
        for share, value in zip(_DISTANCES, medians, strict=True)
    }
    sentence = (
        "Over distances as long as an attack's steps the margin changes as its gradient says with "
        f"a median cosine of {max(wide):.2f} (1 is exact); a low one means that the gradient is "
        "not that of the model, because of rounding, noise, ripples or an operation with an "
        "invented gradient, and leads attacks astray."
    )
    return verdict_of(surely_above(at_best, 0.5)), numbers, sentence


@check("attacked copy", scope="model")
def attacked_copy(study: Study) -> Answer:
    """Has the copy that attacks run, traced and folded, the gradients of the model?"""
    same = study.subject.copied_gradients
    numbers = {"median_cosine": float(same.median()), "lowest_cosine": float(same.min())}
    sentence = (
        "The private copy on which attacks run has the model's gradients with a median cosine of "
        f"{numbers['median_cosine']:.3f} (1 is exact); where it has not, as when tracing drops a "
        "backward pass of the model's own, attacks measure another model: run them with "
        "Engine(fold=False)."
    )
    return verdict_of(not study.subject.foldable), numbers, sentence


def _in_float64(part: Subject) -> Subject:
    return replace(
        part,
        model=copy.deepcopy(part.model).double(),
        images=part.images.double(),
        codes=None if part.codes is None else part.codes.double(),
    )


def _agreement(study: Study, part: Subject) -> Tensor:
    """Cosine of predicted and found changes, (distances, B); 0 where either does not change at all."""

    def margin(points: Variables) -> Tensor:
        # Seeded anew, so that a random model draws the same numbers at both ends.
        with untouched(part.model, part.seed), torch.no_grad(), full_float32():
            return Margin().value(part.model(region.render(points)), part.labels)

    with untouched(part.model, part.seed), full_float32():
        region = study.threat.facing(part.model, part.images).around(
            part.images, part.labels, part.codes
        )
        centre = draw(region, part, 0, 0.5)
    with untouched(part.model, part.seed), full_float32():
        gradients = slopes_at(part.model, region, centre, Margin(), part.labels).gradients
    rows = []
    for share in _DISTANCES:
        predicted, found = [], []
        for number in range(_DIRECTIONS):
            ahead, behind = _both_ways(region, part, centre, share, number)
            predicted.append(((_flat(ahead) - _flat(behind)) * gradients).sum(1))
            found.append(margin(ahead) - margin(behind))
        first, second = (_unit(torch.stack(part).double()) for part in (predicted, found))
        rows.append(functional.cosine_similarity(first, second, dim=0))
    return torch.stack(rows).nan_to_num(nan=0.0)


def _both_ways(
    region: Region, part: Subject, centre: Variables, share: float, number: int
) -> tuple[Variables, Variables]:
    """Two points on either side of the centre, in the ball and the box."""
    moves = {}
    for name, ball in region.balls.items():
        signs = randomness.integers(
            part.seed, part.indices, 2, centre[name].shape[1:], stream=f"audit/{name}/{number}"
        )
        direction = (2 * signs - 1).to(centre[name])
        limit = (share * ball.radius / ball.size(direction)).view(-1, *[1] * (direction.ndim - 1))
        moves[name] = direction * limit
    ahead = {name: centre[name] + move for name, move in moves.items()}
    behind = {name: centre[name] - move for name, move in moves.items()}
    return region.project(ahead), region.project(behind)


def _flat(variables: Variables) -> Tensor:
    return torch.cat([tensor.flatten(1) for tensor in variables.values()], dim=1)


def _unit(changes: Tensor) -> Tensor:
    """Scaled to a largest value of 1, so that tiny changes survive the cosine's guard against zero."""
    largest = changes.abs().amax(0)
    return changes / torch.where(largest > 0, largest, 1.0)


@check("loss rises")
def loss_rises(study: Study) -> Answer:
    """Does plain PGD on cross-entropy raise its own objective?"""
    curve = _curve(study) + 0.0  # no minus zero in the report
    start, middle, end = curve[0], curve[len(curve) // 2], curve[-1]
    rose: Bools = (end > start).cpu().numpy()
    later: Bools = (end >= middle).cpu().numpy()
    numbers = {
        "share_rising": float(rose.mean()),
        "share_rising_in_second_half": float(later.mean()),
        "median_at_start": float(start.median()),
        "median_in_the_middle": float(middle.median()),
        "median_at_end": float(end.median()),
    }
    sentence = (
        f"Over {len(curve) - 1} steps of PGD the cross-entropy rises on "
        f"{percent(numbers['share_rising'])} of the samples (median "
        f"{numbers['median_at_start']:.3g} to {numbers['median_at_end']:.3g}); where it does not, "
        "the search goes nowhere and its success rate says nothing about the model."
    )
    return verdict_of(surely_below(rose, _RISING)), numbers, sentence


def _curve(study: Study) -> Tensor:
    """The cross-entropy at each step of PGD, (steps + 1, M): of the points, not of the best so far."""
    columns = []
    steps = study.budget.steps
    with study.regions() as regions:
        for part, region in regions:
            points, values = draw(region, part, 0), []
            sizes = resolve_step_sizes(None, region, 2.5 / steps)
            for _ in range(steps + 1):
                slopes = slopes_at(part.model, region, points, CrossEntropy(), part.labels)
                values.append(slopes.values)
                gradients = _unflat(slopes.gradients.nan_to_num(), points)
                points = region.project(region.ascend(points, gradients, sizes))
            columns.append(torch.stack(values))
    return torch.cat(columns, dim=1)


def _unflat(rows: Tensor, like: Variables) -> Variables:
    sizes = [tensor[0].numel() for tensor in like.values()]
    parts = torch.split(rows, sizes, dim=1)
    return {
        name: part.view_as(tensor) for (name, tensor), part in zip(like.items(), parts, strict=True)
    }
