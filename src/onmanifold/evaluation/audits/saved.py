"""Checks of an evaluation that was made before: do its images and numbers hold?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file

from onmanifold.evaluation.audits.checks import (
    Answer,
    check,
    percent,
    skipped,
    surely_above,
    verdict_of,
)
from onmanifold.evaluation.audits.study import Bools, Saved, Study
from onmanifold.evaluation.ledger import STANDARD, Evaluation
from onmanifold.evaluation.recheck import recheck
from onmanifold.foundation.errors import DataError
from onmanifold.foundation.registry import describe
from onmanifold.threats import ImageBall

# Rounding of images to float32, and of the sum of their differences.
_TOLERANCE = 1e-5
# Rounding may turn a sample or two of a thousand.
_DIFFERING = 0.002
# The audit's attacks are ordinary ones: an evaluation that they beat by more than this has not looked hard.
_CLAIM = 0.02
_ABSENT = "No evaluation with saved images was given."


@check("saved images", scope="threat")
def saved_images(study: Study) -> Answer:
    """Measure the images that were saved, with numpy alone."""
    saved, threat = study.saved, study.threat
    if saved is None or saved.directory is None:
        return skipped(_ABSENT)
    names = _names(saved, study)
    files = [path for name in names for path in _files(saved, name)]
    if not files:
        return skipped("The evaluation kept no images of attacks in this threat model.")
    low, high, largest = np.inf, -np.inf, 0.0
    for path in files:
        images, samples = _load(path)
        low, high = min(low, float(images.min())), max(high, float(images.max()))
        if isinstance(threat, ImageBall):
            moved = (images - _originals(study, samples)).reshape(len(images), -1)
            order = {"linf": np.inf, "l2": 2, "l1": 1}[threat.norm]
            largest = max(largest, float(np.linalg.norm(moved, ord=order, axis=1).max()))
    numbers = {"files": float(len(files)), "low": low, "high": high}
    inside = low >= -_TOLERANCE and high <= 1 + _TOLERANCE
    size = ""
    if isinstance(threat, ImageBall):
        radius = float(torch.as_tensor(threat.radius).max())
        numbers |= {"largest": largest, "radius": radius}
        inside = inside and largest <= radius * (1 + 1e-4) + _TOLERANCE
        size = f", the largest perturbation {largest:.5g} of {radius:.5g} allowed"
    sentence = (
        f"Pixels of the saved images lie in [{low:.4g}, {high:.4g}]{size}; images outside of the "
        "threat model are no adversarial examples, whatever the ledger says."
    )
    return verdict_of(not inside), numbers, sentence


@check("recomputed accuracy", scope="model")
def recomputed_accuracy(study: Study) -> Answer:
    """Does the accuracy of the ledger come out again on the saved images?"""
    saved = study.saved
    if saved is None or saved.directory is None:
        return skipped(_ABSENT)
    if not any(_files(saved, name) for name in saved.evaluation.names):
        return skipped("The evaluation kept no images.")
    table = recheck(study.subject.model, saved.directory)
    count, differing = len(saved.evaluation), int(table["differing"].max())
    worst = str(table["differing"].idxmax())
    row = table.to_dict("index")[worst]
    numbers = {
        "accuracy": float(row["accuracy"]),
        "rechecked": float(row["rechecked"]),
        "differing": float(differing),
    }
    sentence = (
        f"Recomputed in float32 from the saved images, at most {differing} of {count} samples "
        f"under an attack ({worst}: {percent(numbers['accuracy'])} and "
        f"{percent(numbers['rechecked'])}) come out otherwise than in the ledger; more than a few "
        "mean another model, random predictions, or images that are not those evaluated."
    )
    hits = np.arange(count) < differing
    return verdict_of(surely_above(hits, _DIFFERING)), numbers, sentence


@check("reported accuracy")
def reported_accuracy(study: Study) -> Answer:
    """Do the audit's own attacks break much that the evaluation reports as robust?"""
    saved = study.saved
    if saved is None:
        return skipped("No evaluation was given.")
    names = _names(saved, study)
    if not names:
        return skipped("The evaluation holds no attack in this threat model.")
    claimed = _claimed(saved.evaluation, names, study)
    if claimed is None:
        return skipped("The evaluation is of other samples.")
    broken = study.white_box()
    for outcome in study.all_outcomes():
        broken = broken | outcome.broken
    missed: Bools = claimed & broken
    numbers = {
        "accuracy_reported": float(claimed.sum() / len(study.subject.labels)),
        "accuracy_audit": float((claimed & ~broken).sum() / len(study.subject.labels)),
    }
    sentence = (
        f"The evaluation leaves {percent(numbers['accuracy_reported'])} of these samples robust, "
        f"the audit's own attacks {percent(numbers['accuracy_audit'])} of them; the lower number "
        "is the truer one, and a large gap shows an evaluation that was too weak."
    )
    return verdict_of(surely_above(missed, _CLAIM)), numbers, sentence


def _names(saved: Saved, study: Study) -> list[str]:
    """The evaluation's attacks in this threat model; all where it does not say."""
    specs = saved.evaluation.provenance.get("attacks")
    if not specs:
        return saved.evaluation.names
    wanted = describe(study.threat)
    return [
        name
        for name in saved.evaluation.names
        if (specs.get(name, {}).get("attack") or {}).get("threat") == wanted
    ]


def _files(saved: Saved, name: str) -> list[Path]:
    specs = saved.evaluation.provenance.get("attacks", {})
    if saved.directory is None or name not in specs or name == STANDARD:
        return []
    return sorted((saved.directory / "shards" / specs[name]["key"]).glob("*.safetensors"))


def _load(path: Path) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Images and sample numbers of a file, without the code that wrote them."""
    try:
        tensors = load_file(path)
        return tensors["images"].astype(np.float64), tensors["sample"].astype(np.int64)
    except (SafetensorError, OSError, KeyError) as error:
        raise DataError(f"{path} holds no saved images, or is truncated ({error}).") from None


def _originals(study: Study, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The clean images of these samples.

    Raises:
        DataError: The data set does not hold them.
    """
    dataset = study.subject.dataset
    places = {int(sample): place for place, sample in enumerate(dataset.indices.tolist())}
    missing = [sample for sample in samples.tolist() if sample not in places]
    if missing:
        raise DataError(
            f"The data set has no sample {missing[0]}, of which there is a saved image."
        )
    positions = torch.tensor([places[sample] for sample in samples.tolist()])
    return dataset.batch(positions).images.cpu().numpy().astype(np.float64)


def _claimed(evaluation: Evaluation, names: list[str], study: Study) -> Bools | None:
    """Which of the samples that are right (M,) the evaluation calls robust; None where it lacks some of them."""
    robust = np.logical_and.reduce([evaluation.correct(name) for name in names])
    by_sample = dict(zip(evaluation.samples.tolist(), robust.tolist(), strict=True))
    wanted = study.subject.indices[study.subject.right].tolist()
    if any(sample not in by_sample for sample in wanted):
        return None
    return np.array([by_sample[sample] for sample in wanted], dtype=bool)
