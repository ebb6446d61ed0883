"""Running named attacks over a dataset, batch by batch, resumably and in several processes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor, nn

from onmanifold.attacks.base import Attack, AttackResult
from onmanifold.attacks.engine import full_float32, probe, untouched, unwrapped
from onmanifold.evaluation.ledger import (
    SIZE,
    STANDARD,
    WORST_CASE,
    Evaluation,
    ledger_of,
    outcome_table,
)
from onmanifold.evaluation.processes import Processes
from onmanifold.evaluation.progress import Report, shown
from onmanifold.evaluation.shards import (
    LEDGER,
    MANIFEST,
    Shards,
    array_digest,
    model_digest,
    shard_key,
)
from onmanifold.foundation.checks import check_images, check_labels
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.files import write_json
from onmanifold.foundation.registry import describe

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from onmanifold.data.dataset import Batch, Dataset


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    attacks: Mapping[str, Attack],
    batch_size: int = 256,
    seed: int = 0,
    *,
    directory: str | Path | None = None,
    save_images: bool = False,
    fabric: Fabric | None = None,
    progress: bool | Report = False,
) -> Evaluation:
    """Run attacks on a model over a dataset and keep a row per sample and attack.

    With a ``directory`` each finished batch is written at once, atomically, into a folder that is named by a
    digest of dataset, model, attack, seed and batch size. So an evaluation that was stopped at any moment, also
    by kill -9, goes on where it stopped; an attack edited under the same name is computed anew, the others
    are not; and two attacks that are the same share their results. At the end the directory holds
    ``ledger.parquet`` (`Evaluation.load` reads it) and ``manifest.json``, which says what produced it.

    The results depend on (seed, ``dataset.indices``) and not, beyond float rounding, on the batch size or the
    number of processes. Only one batch at a time is on the device.

    Args:
        model: Images (B, C, H, W) in [0, 1] to logits (B, K); it is left as it was.
        dataset: What to attack.
        attacks: Attacks by name, any names but "standard" and "worst case"; with none the clean predictions
            alone are made.
        batch_size: Samples per batch.
        seed: Of all that is random in the attacks.
        directory: Where to keep finished batches and the ledger; None: nowhere.
        save_images: Whether to keep the attacks' images too, in float32, for `recheck`.
        fabric: Several processes share the batches, all return the same; a launched
            `lightning_fabric.Fabric`. The work is done on its device; without it, on the model's.
        progress: True: bars on standard error; or a function (name, samples done, all samples), called after
            each batch of this process.

    Raises:
        InputError: Something is of the wrong type, shape or range.
        DataError: The disk is full or cannot be written; finished batches are kept.
    """
    check_arguments(model, dataset, attacks, batch_size, directory, save_images)
    processes = Processes(fabric)
    network, device, dtype = placed(model, fabric)
    facts, tasks = _plan(network, dataset, attacks, batch_size, seed, directory, save_images)
    work = _Work(network, dataset, batch_size, seed, device, dtype)
    failure: Exception | None = None
    outcomes: list[list[pa.Table]] = []
    try:
        if directory is not None and processes.rank == 0:
            write_json(Path(directory) / MANIFEST, facts)
        with shown(
            progress if processes.rank == 0 else False, *work.size_of(tasks, processes)
        ) as report:
            outcomes = [work.run(task, processes, report) for task in tasks]
    except Exception as error:
        failure = error
    processes.agree(failure)
    clean, *others = processes.merge(outcomes, work.batches)
    evaluation = Evaluation(ledger_of(clean, dict(zip(attacks, others, strict=True)), facts))
    try:
        if directory is not None and processes.rank == 0:
            evaluation.save(Path(directory) / LEDGER)
            for task in tasks:
                if task.shards is not None:
                    task.shards.tidy()
    except Exception as error:
        failure = error
    processes.agree(failure)
    return evaluation


@dataclass(frozen=True)
class _Task:
    """One attack over the whole dataset; without an attack, the clean predictions."""

    name: str
    attack: Attack | None
    shards: Shards | None


@dataclass(frozen=True)
class _Work:
    """What all tasks have in common."""

    network: nn.Module
    dataset: Dataset
    batch_size: int
    seed: int
    device: torch.device
    dtype: torch.dtype

    @property
    def batches(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def size_of(self, tasks: list[_Task], processes: Processes) -> tuple[list[str], int]:
        """Names of the tasks, and the number of samples of each that fall to this process."""
        samples = sum(len(self._positions(batch)) for batch in processes.own(self.batches))
        return [task.name for task in tasks], samples

    def run(self, task: _Task, processes: Processes, report: Report) -> list[pa.Table]:
        """The outcomes of this process's batches, read where they are finished, computed where not."""
        total, done, tables = self.size_of([task], processes)[1], 0, []
        for batch in processes.own(self.batches):
            positions = self._positions(batch)
            table = task.shards and task.shards.read(batch, self.dataset.indices[positions].cpu())
            tables.append(self._compute(task, batch, positions) if table is None else table)
            done += len(positions)
            report(task.name, done, total)
        return tables

    def _positions(self, batch: int) -> Tensor:
        start = batch * self.batch_size
        return torch.arange(start, min(start + self.batch_size, len(self.dataset)))

    def _compute(self, task: _Task, number: int, positions: Tensor) -> pa.Table:
        batch = self.dataset.batch(positions, device=self.device)
        batch = batch._replace(images=batch.images.to(self.dtype))
        try:
            if task.attack is None:
                table, images = self._clean(batch), None
            else:
                table, images = self._attacked(task.attack, batch)
        except Exception as error:
            error.add_note(f"{task.name}, samples {int(positions[0])} to {int(positions[-1])}")
            raise
        if task.shards is not None:
            task.shards.write(number, table, images)
        return table

    def _clean(self, batch: Batch) -> pa.Table:
        images = check_images(batch.images, "dataset.images")
        with untouched(self.network, self.seed), full_float32():
            logits = probe(self.network, images)
        check_labels(batch.labels, len(images), logits.shape[1], "dataset.labels")
        if not bool(logits.isfinite().all()):
            raise InputError(
                "model: its logits on clean images are NaN or infinite; it cannot be evaluated."
            )
        predictions = logits.argmax(1)
        return _rows(
            batch,
            adversarial_prediction=predictions,
            success=predictions != batch.labels,
            found_by=None,
            objective=None,
            forwards=torch.ones_like(predictions),
            backwards=torch.zeros_like(predictions),
        )

    def _attacked(self, attack: Attack, batch: Batch) -> tuple[pa.Table, Tensor]:
        codes = None if batch.codes is None else batch.codes.to(self.dtype)
        result: AttackResult = attack(
            self.network, batch.images, batch.labels, codes, seed=self.seed, indices=batch.indices
        )
        table = _rows(
            batch,
            adversarial_prediction=result.predictions,
            success=result.success,
            found_by=result.found_by,
            objective=result.objective,
            **{SIZE + name: size for name, size in result.size.items()},
            forwards=result.forwards,
            backwards=result.backwards,
        )
        return table, result.images


def _rows(batch: Batch, **columns: Tensor | tuple[str | None, ...] | None) -> pa.Table:
    columns = {"sample": batch.indices, "label": batch.labels, **columns}
    return outcome_table(
        {name: _array(values) for name, values in columns.items()}, len(batch.labels)
    )


def _array(values: Tensor | tuple[str | None, ...] | None) -> npt.NDArray[Any] | None:
    if isinstance(values, Tensor):
        array: npt.NDArray[Any] = values.detach().cpu().numpy()
        return array
    return None if values is None else np.array(values, dtype=object)


def _plan(
    network: nn.Module,
    dataset: Dataset,
    attacks: Mapping[str, Attack],
    batch_size: int,
    seed: int,
    directory: str | Path | None,
    save_images: bool,
) -> tuple[dict[str, Any], list[_Task]]:
    """What produces the ledger, and the tasks: the clean pass and a task per attack."""
    facts: dict[str, Any] = {
        "dataset": {
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "samples": len(dataset),
            "digest": array_digest(dataset.indices, dataset.labels, dataset.codes),
        },
        "seed": seed,
        "batch_size": batch_size,
    }
    todo: dict[str, Attack | None] = {STANDARD: None, **attacks}
    if directory is None:
        return facts, [_Task(name, attack, None) for name, attack in todo.items()]
    facts["model"] = model_digest(network)
    specs = {name: None if attack is None else describe(attack) for name, attack in todo.items()}
    keys = {name: shard_key({**facts, "attack": spec}) for name, spec in specs.items()}
    tasks = [
        _Task(name, attack, Shards(Path(directory), keys[name], save_images and attack is not None))
        for name, attack in todo.items()
    ]
    facts["attacks"] = {name: {"key": keys[name], "attack": spec} for name, spec in specs.items()}
    return facts, tasks


def placed(model: nn.Module, fabric: Fabric | None) -> tuple[nn.Module, torch.device, torch.dtype]:
    """The plain model on the device to work on, that device, and the dtype the model wants."""
    # Their wrappers' forward passes wait for the other processes, which may have another number of batches.
    network = unwrapped(model, compiled=False)
    tensors = [*network.parameters(), *network.buffers()]
    found = tensors[0].device if tensors else torch.device("cpu")
    device = found if fabric is None else fabric.device
    dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)
    # A copy, so that the caller's model stays where it is.
    return (network if device == found else copy.deepcopy(network).to(device)), device, dtype


def check_arguments(
    model: nn.Module,
    dataset: Dataset,
    attacks: Mapping[str, Attack],
    batch_size: int,
    directory: str | Path | None,
    save_images: bool,
) -> None:
    """Raises InputError where the arguments of `evaluate` are wrong."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected a torch.nn.Module, found {type(model).__name__}.")
    if not hasattr(dataset, "batch"):
        raise InputError(
            f"dataset: expected an onmanifold Dataset, found {type(dataset).__name__}."
        )
    if len(dataset) == 0:
        raise InputError("dataset: it is empty.")
    if not isinstance(attacks, Mapping):
        found = type(attacks).__name__
        raise InputError(
            f'attacks: expected attacks by name, such as {{"PGD-20": attack}}, found {found}.'
        )
    for name, attack in attacks.items():
        if not isinstance(name, str) or name in ("", STANDARD, WORST_CASE):
            raise InputError(f"attacks: {name!r} cannot be an attack's name.")
        if not callable(attack) or isinstance(attack, type):
            raise InputError(f"attacks: {name!r}: expected an attack, found {attack!r}.")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size: expected an integer of at least 1, found {batch_size!r}.")
    if save_images and directory is None:
        raise InputError("save_images: expected a directory to save them in, found none.")
    if directory is not None and Path(directory).exists() and not Path(directory).is_dir():
        raise InputError(f"directory: {directory} is a file.")
