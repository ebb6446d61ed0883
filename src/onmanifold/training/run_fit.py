"""`fit`, the public face of learning a manifold."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from onmanifold.foundation.errors import ConfigError, InputError
from onmanifold.foundation.registry import FITS, Context, build_component, describe, nearest
from onmanifold.foundation.weights import weights_digest
from onmanifold.manifolds.base import Manifold
from onmanifold.manifolds.factory import (
    build_manifold,
    load_manifold,
    manifold_metadata,
    save_manifold,
)
from onmanifold.manifolds.learned import LearnedManifold
from onmanifold.training.checkpoint import Checkpoint
from onmanifold.training.config import TrainingConfig
from onmanifold.training.fits.base import ClosedForm, Fit
from onmanifold.training.fitting import Fitting
from onmanifold.training.log import History
from onmanifold.training.run import RunOptions, one_process, run_task
from onmanifold.training.state import RunFiles

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from onmanifold.data.dataset import Dataset


@dataclass(frozen=True)
class FitResult:
    """What a fit gives.

    Attributes:
        manifold: With the best weights, in eval mode, on the device it was fitted on.
        history: One entry per epoch, as in ``metrics.jsonl``; empty for what is solved and not trained.
        best_epoch: The epoch of the weights, from 1; 0 for what is solved.
        best: The file of the manifold; None where there is no directory.
    """

    manifold: Manifold
    history: History
    best_epoch: int
    best: Path | None


def fit(
    manifold: Manifold | str | Mapping[str, Any],
    dataset: Dataset,
    config: TrainingConfig | Mapping[str, Any] | None = None,
    *,
    fit: Fit | str | Mapping[str, Any] | None = None,
    directory: str | Path | None = None,
    seed: int = 0,
    progress: bool = False,
    tensorboard: bool = False,
    fabric: Fabric | None = None,
) -> FitResult:
    """Learn a manifold from images.

    With a directory, ``last.ckpt`` holds the state: the same call continues from it after any interruption, and
    ends as an undisturbed one would. Beside it stand ``best.safetensors``, which `load_manifold` reads,
    ``metrics.jsonl`` with a line per epoch, and ``pictures/`` with samples after each epoch.

    Args:
        manifold: A specification such as "glow" or ``{"type": "glow", "width": 128}``, whose weights then come
            from ``seed``; or a manifold, which is copied and left as it is.
        dataset: Training images; the test images play no part.
        config: How it is run; what it leaves out is as the fit says, then as `TrainingConfig` says.
        fit: Which losses are taken; None: those of the manifold's own kind, at their defaults.
        directory: Where the files go; None: nothing is written.
        seed: Of all that is random.
        progress: Whether to show a progress bar.
        tensorboard: Whether to write ``tensorboard/`` into the directory.
        fabric: Devices and processes, launched; None: one process on a GPU where there is one.

    Raises:
        InputError: Something does not fit together.
        ConfigError: A specification is wrong.
        CheckpointError: The directory holds another fit, or a damaged one.
        DivergenceError: A loss became NaN, infinite or too large; the last good state is kept.
        DataError: A file could not be written.
        KeyboardInterrupt: Ctrl-C was pressed; the state is saved.
    """
    learned = _manifold(manifold, dataset, seed)
    way = _fit_of(learned, fit)
    if not isinstance(config, TrainingConfig):
        values = {**way.defaults, **(config or {})}
        config = build_component(TrainingConfig, values, Context(), "training")
    identity = {
        "fit": describe(way),
        "training": config.identity,
        "dataset": dataset.fingerprint,
        "manifold": {"spec": learned.spec, "weights": weights_digest(learned)},
        "seed": seed,
    }
    metadata = {"fit": describe(way), "dataset": dataset.fingerprint, "seed": seed}
    if isinstance(way, ClosedForm):
        return _solve(way, learned, dataset, identity, metadata, directory)
    fabric = fabric or one_process(config.precision)
    with torch.random.fork_rng(devices=[]):
        # Discriminators and the like draw their weights from the global generator.
        torch.default_generator.manual_seed(seed)
        task = Fitting(way, learned, metadata)
    title = way.registered_name or type(way).__name__
    options = RunOptions(directory, seed, progress, tensorboard, fabric, config.threads, title)
    state, model, best = run_task(task, dataset, config, identity, options)
    assert isinstance(model, Manifold)
    return FitResult(model, state.history, state.best_epoch, best)


def _manifold(
    given: Manifold | str | Mapping[str, Any], dataset: Dataset, seed: int
) -> LearnedManifold:
    if isinstance(given, Manifold):
        manifold = copy.deepcopy(given)
    else:
        manifold = build_manifold(given, dataset.num_classes, dataset.image_shape, seed)
    if not isinstance(manifold, LearnedManifold):
        raise InputError(f"manifold: {manifold.name} is known already and cannot be fitted.")
    if manifold.image_shape != dataset.image_shape or manifold.num_classes < dataset.num_classes:
        raise InputError(
            f"manifold: is one of {manifold.num_classes} classes of images {manifold.image_shape}; "
            f"{dataset.name} has {dataset.num_classes} classes of images {dataset.image_shape}."
        )
    return manifold


def _fit_of(manifold: Manifold, given: Fit | str | Mapping[str, Any] | None) -> Fit:
    kind = manifold.spec.get("type", manifold.name)
    if given is None:
        if kind not in FITS.entries:
            raise ConfigError(f"fit: there is none for {kind!r}.{nearest(str(kind), FITS.entries)}")
        given = str(kind)
    elif isinstance(given, Mapping) and "type" not in given:
        given = {"type": kind, **given}
    built = FITS.build(given)
    if not isinstance(built, Fit):
        raise InputError(f"fit: expected a fit, found {type(built).__name__}.")
    return built


def _solve(
    way: ClosedForm,
    manifold: LearnedManifold,
    dataset: Dataset,
    identity: Mapping[str, Any],
    metadata: Mapping[str, Any],
    directory: str | Path | None,
) -> FitResult:
    best = None if directory is None else RunFiles(Path(directory), identity).best
    if best is not None and best.exists():
        found = manifold_metadata(best).get("identity", {})
        Checkpoint(found, {}, {}).check_identity(identity, best)
        return FitResult(load_manifold(best, manifold), [], 0, best)
    way.solve(manifold, dataset)
    if best is not None:
        save_manifold(manifold, best, {**metadata, "identity": identity})
    return FitResult(manifold.eval(), [], 0, best)
