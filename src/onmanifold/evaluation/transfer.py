"""Black-box attacks by transfer: images made against one model, tried on all."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from onmanifold.attacks.base import Attack
from onmanifold.attacks.engine import probe, untouched
from onmanifold.evaluation.ledger import STANDARD, Evaluation
from onmanifold.evaluation.processes import Processes
from onmanifold.evaluation.progress import Report, shown
from onmanifold.evaluation.recheck import SavedImages
from onmanifold.evaluation.runner import check_arguments, evaluate, placed
from onmanifold.evaluation.shards import LEDGER
from onmanifold.evaluation.transferred import Transfer
from onmanifold.foundation.errors import InputError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from onmanifold.data.dataset import Dataset


def transfer(
    models: Mapping[str, nn.Module],
    dataset: Dataset,
    attacks: Attack | Mapping[str, Attack],
    batch_size: int = 256,
    seed: int = 0,
    *,
    directory: str | Path | None = None,
    fabric: Fabric | None = None,
    progress: bool | Report = False,
) -> Transfer:
    """Attack each model, and try the images on all of them.

    It is the check that needs no gradient of the model it is about: where images made on another model do more
    harm than those made on the model itself, its own gradients mislead.

    With a ``directory`` all is kept, batch by batch, as by `evaluate`: in a folder per source the attacks on it
    with their images in float32, in a folder per target below it what they do there, and ``ledger.parquet``
    (`Transfer.load` reads it). A call that was stopped at any moment goes on where it stopped, and one with
    another model or attack does only what is new. Without it images wait in a temporary folder, one source's
    at a time.

    Args:
        models: Models by name: images (B, C, H, W) in [0, 1] to logits (B, K), the same K; they are left as they
            were. They may be on several devices.
        dataset: What to attack.
        attacks: Attacks by name; one alone is named by its class.
        batch_size: Samples per batch; only one batch at a time is on the device.
        seed: Of all that is random in the attacks.
        directory: Where to keep finished batches, images and ledgers; None: nowhere.
        fabric: Several processes share the batches, all return the same; see `evaluate`.
        progress: True: a bar per source on standard error; or a function (source, samples done, all samples),
            called after each batch; a sample counts once for each attack and target.

    Raises:
        InputError: Models of different class counts, one that does not take the images, no models or attacks, or
            anything that `evaluate` refuses.
        DataError: The disk is full or cannot be written; finished batches are kept.
    """
    attacks = {type(attacks).__name__: attacks} if isinstance(attacks, Attack) else attacks
    _check(models, dataset, attacks, batch_size, directory)
    processes = Processes(fabric)
    share = sum(
        min(batch_size, len(dataset) - batch_size * number)
        for number in processes.own(-(-len(dataset) // batch_size))
    )
    total = share * len(models) * len(attacks)
    evaluations: dict[tuple[str, str], Evaluation] = {}
    with shown(progress if processes.rank == 0 else False, list(models), total) as report:
        for source in models:
            with _folder(directory, source) as folder:
                options: dict[str, Any] = {
                    "fabric": fabric,
                    "progress": _Tasks(report, source, total),
                }
                given = (dataset, attacks, batch_size, seed)
                made = evaluate(
                    models[source], *given, directory=folder, save_images=True, **options
                )
                saved = {name: SavedImages(folder, made, name) for name in attacks}
                given = (dataset, cast("Mapping[str, Attack]", saved), batch_size, seed)
                for target, model in models.items():
                    place = folder / "on" / folder_name(target)
                    evaluations[source, target] = (
                        made
                        if target == source
                        else evaluate(model, *given, directory=place, **options)
                    )
    result = Transfer(evaluations)
    if directory is not None and processes.rank == 0:
        result.save(Path(directory) / LEDGER)
    return result


class _Tasks:
    """Reports a source's tasks as one; the clean predictions are no part of it."""

    def __init__(self, report: Report, source: str, total: int) -> None:
        self.report, self.source, self.total = report, source, total
        self.finished = 0

    def __call__(self, name: str, done: int, total: int) -> None:
        if name == STANDARD:
            return
        self.report(self.source, self.finished + done, self.total)
        if done == total:
            self.finished += total


@contextmanager
def _folder(directory: str | Path | None, source: str) -> Iterator[Path]:
    if directory is not None:
        yield Path(directory) / folder_name(source)
        return
    with tempfile.TemporaryDirectory(prefix="onmanifold-") as folder:
        yield Path(folder)


def folder_name(name: str) -> str:
    """A file name for any text: itself, or what is like it with a digest.

    >>> folder_name("AT, 2")
    'AT__2-d0a5fa'
    """
    safe = re.sub(r"[^\w.+=-]", "_", name.lstrip("."), flags=re.ASCII)[:60]
    digest = hashlib.blake2b(name.encode(), digest_size=3).hexdigest()
    return name if safe == name else f"{safe}-{digest}"


def _check(
    models: Mapping[str, nn.Module],
    dataset: Dataset,
    attacks: Mapping[str, Attack],
    batch_size: int,
    directory: str | Path | None,
) -> None:
    if not isinstance(models, Mapping):
        found = type(models).__name__
        raise InputError(
            f'models: expected models by name, such as {{"AT": model}}, found {found}.'
        )
    if not models:
        raise InputError("models: expected at least one, found none.")
    classes = {}
    for name, model in models.items():
        if not isinstance(name, str) or not name:
            raise InputError(f"models: {name!r} cannot be a model's name.")
        try:
            check_arguments(model, dataset, attacks, batch_size, directory, save_images=False)
            classes[name] = _classes(model, dataset)
        except InputError as error:
            raise InputError(f"models: {name!r}: {error}") from error
    if not attacks:
        raise InputError("attacks: expected at least one, found none.")
    if len(set(classes.values())) > 1:
        found = ", ".join(f"{name!r} has {count}" for name, count in classes.items())
        raise InputError(f"models: expected the same number of classes in all; {found}.")


def _classes(model: nn.Module, dataset: Dataset) -> int:
    """K, from the logits of the first image."""
    network, device, dtype = placed(model, None)
    images = dataset.batch(torch.arange(1), device=device).images.to(dtype)
    with untouched(network, seed=0):
        return probe(network, images).shape[1]
