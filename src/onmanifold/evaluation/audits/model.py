"""Checks of the model alone: what it gives out, and what it does while it computes it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from onmanifold.attacks.autoattack import AutoAttack
from onmanifold.attacks.engine import full_float32, untouched
from onmanifold.evaluation.audits.checks import Answer, check, skipped, verdict_of
from onmanifold.evaluation.audits.study import Study
from onmanifold.objectives import DLR, TargetedDLR

# Logits of the same images may differ by this much, relative to the largest: AutoAttack's bound; a GPU's own
# differences between passes are below it.
_SAME = 1e-4
_FORWARDS = 4
# Rows of logits that sum to 1 this closely, all of them, are no coincidence.
_SUM_TO_ONE = 1e-4
# Below this number of classes the targeted DLR is undefined, below three the DLR is (fra31/auto-attack#70).
_DLR_CLASSES, _TARGETED_CLASSES = 3, 4
# Images that the model is watched on.
_FEW = 64


@check("randomness", scope="model")
def randomness_of_outputs(study: Study) -> Answer:
    """Do several passes over the same images give the same logits?"""
    subject = study.subject
    images = subject.images[:_FEW]
    with untouched(subject.model, subject.seed), torch.no_grad(), full_float32():
        passes = torch.stack([subject.model(images) for _ in range(_FORWARDS)]).double()
    spread = float((passes.amax(0) - passes.amin(0)).amax() / passes.abs().amax().clamp(min=1))
    classes = passes.argmax(2)
    flips = float((classes != classes[0]).any(0).double().mean())
    numbers = {"spread": spread, "flipped_predictions": flips}
    if spread <= _SAME:
        return "ok", numbers, "Several passes over the same images give the same logits."
    return (
        "alarm",
        numbers,
        f"The same images give other logits each time (relative spread {spread:.2g}, "
        f"{100 * flips:.1f} % of the predictions change), so that a gradient from one pass points "
        "nowhere in particular and a single failure may be luck: average gradients over many "
        "passes and evaluate repeatedly.",
    )


@check("probabilities as outputs", scope="model")
def probabilities(study: Study) -> Answer:
    """Does the model give probabilities where logits are expected?"""
    rows = study.subject.logits.double()
    distance = float((rows.sum(1) - 1).abs().max())
    lowest = float(rows.min())
    alarm = distance < _SUM_TO_ONE and lowest >= 0
    sentence = "The outputs do not look like probabilities, so losses on logits mean what they say."
    if alarm:
        sentence = (
            "All rows of the output are non-negative and sum to 1: these are probabilities, and a "
            "loss that takes them for logits has almost no gradient where the model is sure; give "
            "the attacks the logits."
        )
    numbers = {"largest_distance_from_one": distance, "smallest_output": lowest}
    return verdict_of(alarm), numbers, sentence


@check("optimisation inside the forward pass", scope="model")
def inner_optimisation(study: Study) -> Answer:
    """Does the model take gradients while it classifies?"""
    subject = study.subject
    with untouched(subject.model, subject.seed), torch.enable_grad(), _counted() as calls:
        subject.model(subject.images[:2])
    alarm = calls[0] > 0
    sentence = "The model takes no gradients while it classifies."
    if alarm:
        sentence = (
            f"The model takes gradients {calls[0]} times while it classifies, a test-time defence: "
            "such defences usually hide gradients and none examined by Croce et al. 2022 beat its "
            "static model, so report the static model beside it, attack through the inner steps "
            "and transfer images from the static model."
        )
    return verdict_of(alarm), {"gradient_calls": float(calls[0])}, sentence


@contextmanager
def _counted() -> Iterator[list[int]]:
    """Count the gradients taken in this thread, by whatever function of torch."""
    calls, thread = [0], threading.get_ident()
    # All of torch's functions for gradients end in this one, also those a model imported by name.
    name = "_engine_run_backward"
    names = [name] if hasattr(torch.autograd, name) else ["grad", "backward"]
    before = {name: getattr(torch.autograd, name) for name in names}

    def counting(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            calls[0] += threading.get_ident() == thread
            return function(*arguments, **options)

        return call

    try:
        for name, function in before.items():
            setattr(torch.autograd, name, counting(function))
        yield calls
    finally:
        for name, function in before.items():
            setattr(torch.autograd, name, function)


@check("number of classes", scope="model")
def number_of_classes(study: Study) -> Answer:
    """Are there enough classes for the objectives that the attacks use?"""
    classes = study.subject.logits.shape[1]
    needed = max((_needed(attack) for attack in study.attacks.values()), default=0)
    numbers = {"classes": float(classes), "needed": float(needed)}
    if needed == 0:
        return skipped("None of the attacks under audit uses the DLR objective.")
    if classes >= needed:
        return "ok", numbers, f"{classes} classes are enough for the objectives of the attacks."
    return (
        "alarm",
        numbers,
        f"With {classes} classes a DLR objective of these attacks is undefined and falls back to "
        "the margin, which is no longer free of scale: say so where the number is reported.",
    )


def _needed(attack: object) -> int:
    objective = getattr(attack, "objective", None)
    # The ensemble runs APGD on the targeted DLR.
    if isinstance(objective, TargetedDLR) or isinstance(attack, AutoAttack):
        return _TARGETED_CLASSES
    return _DLR_CLASSES if isinstance(objective, DLR) else 0


@check("finite outputs", scope="model")
def finite_outputs(study: Study) -> Answer:
    """Are the logits finite on noise, where attacks begin?"""
    subject = study.subject
    images = subject.images[:_FEW]
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(subject.seed))
    both = torch.cat([images, noise.to(images)])
    finite = _share_finite(subject.logits_of(both)[0])
    alarm = finite < 1
    sentence = "The logits are finite on images and on noise."
    if alarm:
        sentence = (
            f"The logits are NaN or infinite on {100 * (1 - finite):.1f} % of images and noise: "
            "comparisons with NaN are false, so that an attack counts such points as robust or as "
            "broken by accident."
        )
    return verdict_of(alarm), {"finite": finite}, sentence


def _share_finite(logits: Tensor) -> float:
    return float(logits.isfinite().all(1).double().mean())
