"""Where a training stands, and the files in which it survives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onmanifold.training import checkpoint as on_disk
from onmanifold.training.ema import MovingAverage
from onmanifold.training.log import History, write_metrics

SNAPSHOTS = "snapshots"
"""Folder of the weights that a training keeps on its way, beside its checkpoint."""


def snapshots_of(directory: str | Path) -> dict[int, Path]:
    """The snapshots that a training has kept in its directory: files for `load_classifier` by epoch (from 1)."""
    found = sorted((Path(directory) / SNAPSHOTS).glob("epoch-*.safetensors"))
    return {int(path.stem.removeprefix("epoch-")): path for path in found}


@dataclass
class State:
    """Where a training stands, apart from its tensors: plain data, written into the checkpoint.

    Attributes:
        epoch: Epochs done.
        step: Steps done in the epoch under way.
        loss: Sum of the losses of the images seen in this epoch.
        logged: Of this epoch, what else is logged by name: its sum, and the number of values.
        seconds: Time spent in this epoch.
        score: The best validation score so far.
        best_epoch: The epoch that reached it, from 1; 0: none yet.
        history: One entry per epoch.
    """

    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    logged: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    score: float = -math.inf
    best_epoch: int = 0
    history: History = field(default_factory=list)

    def means(self) -> list[tuple[str, float | None]]:
        """What was logged in this epoch, by name; None where there were no values."""
        return [
            (name, total / count if count else None) for name, (total, count) in self.logged.items()
        ]

    def next_epoch(self) -> None:
        """Begin another epoch."""
        self.epoch += 1
        self.step, self.loss, self.logged, self.seconds = 0, 0.0, {}, 0.0


class RunFiles:
    """The files of a run: ``last.ckpt``, ``best.safetensors``, ``metrics.jsonl``, ``snapshots/``.

    Args:
        directory: Where they are.
        identity: What determines the run, as plain data: a checkpoint serves only the run it came from.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        self.directory, self.identity = directory, identity
        self.last = directory / "last.ckpt"
        self.best = directory / "best.safetensors"

    def snapshot(self, epoch: int) -> Path:
        """The file of the weights after an epoch (from 1)."""
        return self.directory / SNAPSHOTS / f"epoch-{epoch:04d}.safetensors"

    def save(
        self,
        state: State,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        average: MovingAverage | None,
    ) -> None:
        """Write the checkpoint, then the metrics that agree with it.

        Raises:
            DataError: A file could not be written; the old ones are left as they were.
        """
        tensors: dict[str, Tensor] = {}
        for name, module in self._modules(modules, average).items():
            tensors |= on_disk.with_prefix(f"module/{name}", module.state_dict())
        for name, optimizer in optimizers.items():
            entries = on_disk.optimizer_tensors(optimizer)
            tensors |= on_disk.with_prefix(f"optimizer/{name}", entries)
        on_disk.Checkpoint(self.identity, vars(state), tensors).write(self.last)
        self.write_metrics(state)

    def load(
        self,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        parameters: Mapping[str, Sequence[Tensor]],
        average: MovingAverage | None,
        check: bool = True,
    ) -> State | None:
        """Put back what `save` wrote.

        Args:
            modules: Receive their weights.
            optimizers: Receive their moments.
            parameters: Those of each optimizer, in its order.
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
        for name, module in self._modules(modules, average).items():
            weights = on_disk.without_prefix(f"module/{name}", found.tensors)
            on_disk.restore_module(module, weights, self.last)
        for name, optimizer in optimizers.items():
            moments = on_disk.without_prefix(f"optimizer/{name}", found.tensors)
            on_disk.restore_optimizer(optimizer, parameters[name], moments)
        return State(**found.progress)

    @staticmethod
    def _modules(
        modules: Mapping[str, nn.Module], average: MovingAverage | None
    ) -> dict[str, nn.Module]:
        return {**modules, **({} if average is None else {"average": average.model})}

    def write_metrics(self, state: State) -> None:
        """Write a JSON line per epoch, all anew, so that they always agree with the checkpoint."""
        write_metrics(self.directory / "metrics.jsonl", state.history)
