"""`train`, the public face of the training loop."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from onmanifold.attacks.engine import untouched
from onmanifold.attacks.threads import own_threads, suitable_threads
from onmanifold.classifiers import build_classifier
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.memory import keep_freed_memory
from onmanifold.foundation.registry import METHODS, Context, build_component, describe
from onmanifold.foundation.weights import weights_digest
from onmanifold.training.classification import Classification
from onmanifold.training.config import TrainingConfig
from onmanifold.training.log import History, TensorBoard, progress_bar
from onmanifold.training.loop import Training
from onmanifold.training.methods.base import Method
from onmanifold.training.state import RunFiles, State
from onmanifold.training.task import Task

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from onmanifold.data.dataset import Dataset


@dataclass(frozen=True)
class TrainingResult:
    """What a training gives.

    Attributes:
        classifier: With the best weights, in eval mode, on the device it was trained on.
        history: One entry per epoch, as in ``metrics.jsonl``: epoch (from 1), train_loss, train_accuracy,
            validation_accuracy, validation_robust_accuracy, learning_rate (of the last step), seconds,
            examples_per_second. Accuracies are in [0, 1]; those of training are on the examples trained on.
        best_epoch: The epoch of the best weights, from 1.
        best: The file of the best weights; None where the training had no directory.
        players: The method's own networks, such as a discriminator, by name, as they were in the best epoch, in
            eval mode. They are not averaged, also where ``ema`` averages the classifier. With a directory each
            has a file ``<name>.safetensors`` beside ``best``.
    """

    classifier: nn.Module
    history: History
    best_epoch: int
    best: Path | None
    players: Mapping[str, nn.Module] = field(default_factory=dict)


def train(
    method: Method | str | Mapping[str, Any],
    classifier: nn.Module | str | Mapping[str, Any],
    dataset: Dataset,
    config: TrainingConfig | Mapping[str, Any] | None = None,
    *,
    directory: str | Path | None = None,
    seed: int = 0,
    progress: bool = False,
    tensorboard: bool = False,
    fabric: Fabric | None = None,
) -> TrainingResult:
    """Train a classifier.

    A share of ``dataset`` is held out, and the weights of the epoch with the best robust accuracy on it are
    the result (see `TrainingConfig`). With a directory, ``last.ckpt`` holds the state: the same call continues
    from it after any interruption, ends as an undisturbed training would, and returns at once when there is
    nothing left to do. Beside it stand ``best.safetensors`` and ``metrics.jsonl``, a line per epoch, and where
    the configuration asks for snapshots, ``snapshots/`` (see `snapshots_of`).

    Args:
        method: What loss is taken: a method, or its specification, such as "normal".
        classifier: A module from images in [0, 1] to logits, which is copied and left as it is; or the
            specification of one, whose weights then come from ``seed``.
        dataset: Training images; the test images play no part.
        config: How it is run; None: the defaults.
        directory: Where the files go; None: nothing is written.
        seed: Of all that is random.
        progress: Whether to show a progress bar.
        tensorboard: Whether to write ``tensorboard/`` into the directory.
        fabric: Devices and processes, launched; None: one process on a GPU where there is one. Images of a
            batch are shared among the processes.

    Raises:
        InputError: Something does not fit together.
        ConfigError: A specification is wrong.
        CheckpointError: The directory holds another training, or a damaged one.
        DivergenceError: The loss became NaN, infinite or too large; the last good state is kept.
        DataError: A file could not be written.
        KeyboardInterrupt: Ctrl-C was pressed; the state is saved.
    """
    method = METHODS.build(method)
    if not isinstance(method, Method):
        raise InputError(f"method: expected a training method, found {type(method).__name__}.")
    if not isinstance(config, TrainingConfig):
        config = build_component(TrainingConfig, config or {}, Context(), "training")
    if isinstance(classifier, nn.Module):
        classifier = copy.deepcopy(classifier)
    else:
        spec = {"type": classifier} if isinstance(classifier, str) else classifier
        classifier = build_classifier(spec, dataset.num_classes, dataset.image_shape, seed)
    fabric = fabric or one_process(config.precision)
    identity = {
        "method": describe(method),
        "training": config.identity,
        "dataset": dataset.fingerprint,
        "classifier": {"type": type(classifier).__name__, "weights": weights_digest(classifier)},
        "seed": seed,
    }
    threads = config.threads
    if threads is None and fabric.device.type == "cpu":
        threads = _suitable_threads(classifier, dataset.image_shape, config.batch_size)
    parameter = next(classifier.parameters())
    image = torch.zeros(1, *dataset.image_shape, dtype=parameter.dtype, device=parameter.device)
    with torch.random.fork_rng(devices=[]):
        # A method's own networks draw their weights from the global generator.
        torch.default_generator.manual_seed(seed)
        task = Classification(method, classifier, config, image)
    title = method.registered_name or type(method).__name__
    options = RunOptions(directory, seed, progress, tensorboard, fabric, threads, title)
    state, model, best = run_task(task, dataset, config, identity, options)
    players = {name: player.eval() for name, player in task.others.items()}
    return TrainingResult(model, state.history, state.best_epoch, best, players)


@dataclass(frozen=True)
class RunOptions:
    """How a task is run, apart from what comes out.

    Attributes:
        directory: Where the files go; None: nothing is written.
        seed: Of all that is random.
        progress: Whether to show a progress bar.
        tensorboard: Whether to write ``tensorboard/`` into the directory.
        fabric: Devices and processes, launched.
        threads: CPU threads; None: as set outside.
        title: Of the progress bar.
    """

    directory: str | Path | None
    seed: int
    progress: bool
    tensorboard: bool
    fabric: Fabric
    threads: int | None
    title: str


def run_task(
    task: Task,
    dataset: Dataset,
    config: TrainingConfig,
    identity: Mapping[str, Any],
    options: RunOptions,
) -> tuple[State, nn.Module, Path | None]:
    """Train a task to its end, from where its directory says that it stands.

    Args:
        task: What is trained.
        dataset: Training images.
        config: How it is run.
        identity: What determines the run, as plain data.
        options: The rest.

    Returns:
        Where the training stands, the model with the best weights, and their file.

    Raises:
        InputError: The fabric does not fit the configuration, or TensorBoard lacks a directory.
        CheckpointError: The directory holds another training, or a damaged one.
    """
    fabric, directory = options.fabric, options.directory
    _check_fabric(fabric, config)
    if options.tensorboard and directory is None:
        raise InputError("tensorboard: needs a directory.")
    files = None if directory is None else RunFiles(Path(directory), identity)
    with ExitStack() as stack:
        if fabric.device.type == "cpu":
            keep_freed_memory()
        stack.enter_context(own_threads(options.threads))
        training = Training(task, dataset, config, options.seed, files, fabric)
        training.resume()
        if not training.finished:
            board = None
            if options.tensorboard and files is not None and fabric.is_global_zero:
                board = stack.enter_context(TensorBoard(files.directory))
            shown = options.progress and fabric.is_global_zero
            report = stack.enter_context(
                progress_bar(options.title, config.epochs, training.steps, shown)
            )
            training.run(report, board.write if board is not None else lambda entry: None)
        return training.state, training.result(), None if files is None else files.best


def one_process(precision: str, device: str = "auto") -> Fabric:
    """A Fabric of one process, launched.

    Args:
        precision: As in `TrainingConfig`.
        device: "cpu", "cuda", or "auto": a CUDA GPU where there is one, else the CPU. Apple's GPUs have no
            float64, in which projections and random numbers are computed.

    Raises:
        InputError: There is no such device.
    """
    from lightning_fabric import Fabric

    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda: torch finds no CUDA device here.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    fabric = Fabric(accelerator=device, devices=1, precision=precision)  # type: ignore[arg-type]
    fabric.launch()
    return fabric


def _check_fabric(fabric: Fabric, config: TrainingConfig) -> None:
    from lightning_fabric.strategies.ddp import DDPStrategy
    from lightning_fabric.strategies.single_device import SingleDeviceStrategy

    if not isinstance(fabric.strategy, DDPStrategy | SingleDeviceStrategy):
        raise InputError(
            f"fabric: expected one device or the strategy 'ddp', found {type(fabric.strategy).__name__}."
        )
    precision = fabric.strategy.precision.precision
    if precision != config.precision:
        raise InputError(
            f"fabric: has precision {precision!r}, the configuration says {config.precision!r}."
        )


def _suitable_threads(
    classifier: nn.Module, image_shape: tuple[int, int, int], batch_size: int
) -> int | None:
    parameter = next(classifier.parameters())
    images = torch.zeros(1, *image_shape, dtype=parameter.dtype, device=parameter.device)
    with untouched(classifier):
        return suitable_threads(classifier, images.expand(batch_size, -1, -1, -1))
