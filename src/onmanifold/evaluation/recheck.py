"""Saved images, tried again: on the model that they were made for, as a self-check, or on another."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from onmanifold.attacks.base import AttackResult, judged
from onmanifold.attacks.engine import full_float32, probe, untouched, unwrapped
from onmanifold.evaluation.ledger import STANDARD, Evaluation
from onmanifold.evaluation.shards import LEDGER, Shards, model_digest
from onmanifold.foundation.checks import check_images
from onmanifold.foundation.errors import CheckpointError, DataError
from onmanifold.foundation.modules import device_of
from onmanifold.objectives import CrossEntropy


def recheck(model: nn.Module, directory: str | Path) -> pd.DataFrame:
    """Recompute the accuracy under each attack from the saved images, in float32, beside the ledger's.

    Robust accuracies that do not come out again on the images that were saved are a common complaint about
    such libraries; rounding to float32, or bfloat16 within the attack, may account for a sample or two.

    Args:
        model: The model that was evaluated.
        directory: Where ``evaluate(..., directory=directory, save_images=True)`` put its results.

    Returns:
        A row per attack: n; accuracy (the ledger's); rechecked (the same from the saved images); differing,
        the number of samples that are right in one and wrong in the other.

    Raises:
        CheckpointError: ``model`` is not the one that was evaluated.
        DataError: The ledger or some images are missing or damaged.
    """
    evaluation = Evaluation.load(Path(directory) / LEDGER)
    facts = evaluation.provenance
    network = unwrapped(model, compiled=False)
    if facts.get("model") != model_digest(network):
        raise CheckpointError(f"{directory} holds the evaluation of another model.")
    if any(tensor.dtype != torch.float32 for tensor in network.parameters()):
        network = copy.deepcopy(network).float()
    rows = {}
    for name in evaluation.names:
        right = _right(network, Path(directory), name, evaluation, facts)
        ledger = evaluation.correct(name)
        rechecked = right & evaluation.correct(STANDARD)
        rows[name] = {
            "n": len(evaluation),
            "accuracy": float(ledger.mean()),
            "rechecked": float(rechecked.mean()),
            "differing": int((ledger != rechecked).sum()),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("attack")


def _right(
    network: nn.Module, directory: Path, name: str, evaluation: Evaluation, facts: dict[str, Any]
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which samples the model gets right on the saved images, (N,)."""
    shards = Shards(directory, facts["attacks"][name]["key"])
    device = device_of(network)
    parts = []
    for batch, start in enumerate(range(0, len(evaluation), facts["batch_size"])):
        images, samples = shards.read_images(batch)
        expected = evaluation.samples[start : start + facts["batch_size"]]
        if not np.array_equal(samples.numpy(), expected):
            raise DataError(f"{shards.folder}: the images of batch {batch} are of other samples.")
        with untouched(network, facts["seed"]), full_float32():
            logits = probe(network, check_images(images, f"saved images of {name!r}").to(device))
        labels = torch.from_numpy(evaluation.labels[start : start + len(samples)].copy())
        parts.append((logits.argmax(1).cpu() == labels).numpy())
    return np.concatenate(parts)


class SavedImages:
    """The images that an attack made on one model, as an attack on another.

    Args:
        directory: Where ``evaluate(..., directory=directory, save_images=True)`` put its results.
        made: What it returned.
        name: Which of its attacks.
    """

    def __init__(self, directory: Path, made: Evaluation, name: str) -> None:
        facts = made.provenance
        key, size = facts["attacks"][name]["key"], facts["batch_size"]
        self.fingerprint = f"saved images {key}"
        self.shards = Shards(directory, key)
        samples = made.samples.tolist()
        self.numbers: Mapping[tuple[int, ...], int] = {
            tuple(samples[start : start + size]): number
            for number, start in enumerate(range(0, len(samples), size))
        }

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        codes: Tensor | None,
        seed: int,
        indices: Tensor,
    ) -> AttackResult:
        """What the model makes of the images saved for a batch.

        Raises:
            DataError: They are missing or damaged.
        """
        number = self.numbers[tuple(indices.tolist())]
        saved, samples = self.shards.read_images(number)
        if not torch.equal(samples, indices.cpu()) or saved.shape != images.shape:
            raise DataError(f"{self.shards.folder}: the images of batch {number} are of others.")
        saved = check_images(saved, "saved images").to(images)
        with untouched(model, seed):
            random = not torch.equal(probe(model, saved[:1]), probe(model, saved[:1]))
            objective = CrossEntropy().bind(model, saved, labels)
            success, predictions = judged(model, saved, objective, random)
        once = torch.ones_like(labels, dtype=torch.int32)
        return AttackResult(
            images=saved,
            success=success,
            predictions=predictions,
            objective=torch.full_like(saved.flatten(1)[:, 0], torch.nan),
            size={},
            forwards=once,
            backwards=torch.zeros_like(once),
            variables={},
        )
