"""Where a training stands, and the files in which it survives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onmanifold.classifiers import save_classifier
from onmanifold.training import checkpoint as on_disk
from onmanifold.training.ema import MovingAverage
from onmanifold.training.log import History, write_metrics


@dataclass
class State:
    """Where a training stands, apart from its tensors: plain data, written into the checkpoint.

    Attributes:
        epoch: Epochs done.
        step: Steps done in the epoch under way.
        loss: Sum of the losses of the images seen in this epoch.
        correct: Correct predictions in this epoch.
        counted: Predictions that were counted.
        seconds: Time spent in this epoch.
        score: The best validation score so far.
        best_epoch: The epoch that reached it, from 1; 0: none yet.
        history: One entry per epoch.
    """

    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    correct: int = 0
    counted: int = 0
    seconds: float = 0.0
    score: float = -math.inf
    best_epoch: int = 0
    history: History = field(default_factory=list)

    def next_epoch(self) -> None:
        """Begin another epoch."""
        self.epoch += 1
        self.step, self.loss, self.correct, self.counted, self.seconds = 0, 0.0, 0, 0, 0.0


class RunFiles:
    """The files of a run: ``last.ckpt``, ``best.safetensors``, ``metrics.jsonl``.

    Args:
        directory: Where they are.
        identity: What determines the run, as plain data: a checkpoint serves only the run it came from.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        self.directory, self.identity = directory, identity
        self.last = directory / "last.ckpt"
        self.best = directory / "best.safetensors"

    def save(
        self,
        state: State,
        classifier: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: MovingAverage | None,
    ) -> None:
        """Write the checkpoint, then the metrics that agree with it.

        Raises:
            DataError: A file could not be written; the old ones are left as they were.
        """
        tensors = on_disk.with_prefix("model", classifier.state_dict())
        tensors |= on_disk.with_prefix("optimizer", on_disk.optimizer_tensors(optimizer))
        if average is not None:
            tensors |= on_disk.with_prefix("average", average.model.state_dict())
        on_disk.Checkpoint(self.identity, vars(state), tensors).write(self.last)
        self.write_metrics(state)

    def load(
        self,
        classifier: nn.Module,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[Tensor],
        average: MovingAverage | None,
        check: bool = True,
    ) -> State | None:
        """Put back what `save` wrote.

        Args:
            classifier: Receives its weights.
            optimizer: Receives its moments.
            parameters: Those of the optimizer, in its order.
            average: Receives its weights.
            check: Whether to check that the checkpoint belongs to this run.

        Returns:
            Where the training stood; None where it was never saved.

        Raises:
            CheckpointError: The checkpoint is damaged, or belongs to another run.
        """
        if not self.last.exists():
            return None
        found = on_disk.Checkpoint.read(self.last)
        if check:
            found.check_identity(self.identity, self.last)
        weights = on_disk.without_prefix("model", found.tensors)
        on_disk.restore_module(classifier, weights, self.last)
        if average is not None:
            weights = on_disk.without_prefix("average", found.tensors)
            on_disk.restore_module(average.model, weights, self.last)
        moments = on_disk.without_prefix("optimizer", found.tensors)
        on_disk.restore_optimizer(optimizer, parameters, moments)
        return State(**found.progress)

    def keep_best(self, model: nn.Module, entry: Mapping[str, Any]) -> None:
        """Write the weights of the best epoch so far, with its accuracies as metadata."""
        names = ("epoch", "validation_accuracy", "validation_robust_accuracy")
        save_classifier(model, self.best, {name: entry[name] for name in names})

    def write_metrics(self, state: State) -> None:
        """Write a JSON line per epoch, all anew, so that they always agree with the checkpoint."""
        write_metrics(self.directory / "metrics.jsonl", state.history)
