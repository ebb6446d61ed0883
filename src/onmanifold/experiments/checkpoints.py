"""Work on a saved classifier: evaluate it, attack some images, project images onto the manifold."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from onmanifold.attacks import AttackResult
from onmanifold.classifiers import load_classifier
from onmanifold.evaluation import Evaluation, wilson_interval
from onmanifold.experiments.setup import Setup
from onmanifold.foundation.errors import CheckpointError, ConfigError, DataError
from onmanifold.foundation.files import write_atomically
from onmanifold.foundation.registry import nearest
from onmanifold.reports.html import format_seconds
from onmanifold.reports.tables import Table

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from onmanifold.data import Batch

_SHOWN = 5


def load_for(setup: Setup, checkpoint: Path) -> nn.Module:
    """The classifier of a checkpoint, checked to fit the experiment's images and classes.

    Raises:
        CheckpointError: The file is missing or damaged, or its classifier is for other data.
    """
    model = load_classifier(checkpoint)
    spec: dict[str, Any] = getattr(model, "spec", None) or {}
    shape, classes = setup.test.image_shape, setup.test.num_classes
    found = (tuple(spec.get("image_shape", shape)), spec.get("num_classes", classes))
    if found != (tuple(shape), classes):
        raise CheckpointError(
            f"{checkpoint} classifies images {found[0]} into {found[1]} classes; "
            f"{setup.test.name} has images {tuple(shape)} and {classes} classes."
        )
    return model


def table_of(setup: Setup, name: str, evaluation: Evaluation) -> Table:
    """One row: the accuracies of a single classifier."""
    experiment = setup.experiment
    outcomes = {(name, column): [evaluation.correct(column)] for column in experiment.attacks}
    outcomes[name, "standard"] = [evaluation.correct()]
    for column, members in experiment.worst_case.items():
        correct = evaluation.correct()
        for member in members:
            correct = correct & evaluation.correct(member)
        outcomes[name, column] = [correct]
    return Table.of([name], experiment.columns, outcomes)


def attack_images(
    setup: Setup, checkpoint: Path, name: str | None, count: int, out: Path, fabric: Fabric
) -> Iterator[str]:
    """Attack the first test images; keep the images and a picture of some; tell about it.

    Writes ``attack.safetensors`` (images, clean images, labels, predictions, success, sample numbers and,
    where the data has them, codes) and ``attack.png``.

    Yields:
        Lines for the terminal.

    Raises:
        ConfigError: No such attack in the experiment.
    """
    name = list(setup.attacks)[-1] if name is None else name
    if name not in setup.attacks:
        raise ConfigError(f"Unknown attack {name!r}.{nearest(name, setup.attacks)}")
    model = load_for(setup, checkpoint)
    device = fabric.device
    batch = setup.test.batch(torch.arange(min(count, len(setup.test))), device=device)
    result = setup.attacks[name](
        model.to(device),
        batch.images,
        batch.labels,
        batch.codes,
        seed=setup.experiment.evaluation.seed,
        indices=batch.indices,
    )
    with torch.no_grad():
        right = model(batch.images).argmax(1) == batch.labels
    yield from _told(name, result, right.cpu())
    tensors = {
        "images": result.images.float(),
        "clean": batch.images,
        "labels": batch.labels,
        "predictions": result.predictions,
        "success": result.success,
        "samples": batch.indices,
    }
    if batch.codes is not None:
        tensors["codes"] = batch.codes
    plain = {key: value.cpu().contiguous() for key, value in tensors.items()}
    yield f"Images: {write_atomically(out / 'attack.safetensors', safetensors.torch.save(plain))}"
    yield f"Picture: {_picture(setup, name, checkpoint.stem, batch, result, out / 'attack.png')}"


def _told(name: str, result: AttackResult, right: Tensor) -> Iterator[str]:
    count, correct = len(right), int(right.sum())
    kept = int((right & ~result.success.cpu()).sum())
    yield f"{name} on {count} images: {_share(correct, count)} correct before, {_share(kept, count)} after."
    if correct:
        yield f"Success rate on what was correct: {100 * (correct - kept) / correct:.1f} %."
    for variable, size in result.size.items():
        yield f"Size of the {variable} perturbation: mean {size.mean():.4g}, largest {size.max():.4g}."
    forwards, backwards = result.forwards.float().mean(), result.backwards.float().mean()
    yield f"Passes per image: {forwards:.1f} forward, {backwards:.1f} backward."


def _share(part: int, count: int) -> str:
    low, high = wilson_interval(part, count)
    return f"{100 * part / count:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _picture(
    setup: Setup, attack: str, name: str, batch: Batch, result: AttackResult, path: Path
) -> Path:
    from onmanifold.reports.figures import Examples, examples_figure, to_png

    classes = setup.test.classes
    examples = Examples(
        batch.images[:_SHOWN].cpu().numpy(),
        [classes[int(label)] for label in batch.labels[:_SHOWN]],
        {attack: {name: result.images[:_SHOWN].float().cpu().numpy()}},
        {attack: {name: [classes[int(label)] for label in result.predictions[:_SHOWN]]}},
    )
    return write_atomically(path, to_png(examples_figure(examples, attack)))


def project_images(setup: Setup, path: Path | None, count: int) -> Iterator[str]:
    """Project images onto the experiment's manifold and tell how far from it they are.

    Clean test images are projected from a wrong start (the middle of the manifold's box), so that what comes
    out says how well the search works. Images kept by an attack start at the codes of the clean ones: their
    distance is that to the manifold (Disentangling, section 3.2).

    Args:
        setup: The experiment's objects.
        path: ``attack.safetensors`` of `attack_images`; None: clean test images.
        count: How many.

    Yields:
        Lines for the terminal.

    Raises:
        ConfigError: The experiment has no manifold, or its data no codes.
        DataError: The file is missing, truncated or foreign.
    """
    from onmanifold.manifolds.project import project

    if setup.manifold is None or setup.test.codes is None:
        raise ConfigError(f"{setup.test.name} has no manifold with codes to project onto.")
    if path is None:
        batch = setup.test.batch(torch.arange(min(count, len(setup.test))))
        images, codes, what = batch.images, batch.codes, "clean test images"
        assert codes is not None
        start = codes.clone()
        start[:, : setup.manifold.latent_size] = 0
    else:
        kept = _read_attack(path)
        images, start, what = kept["images"][:count], kept["codes"][:count], f"images of {path}"
    began = time.perf_counter()
    found = project(setup.manifold, images, start)
    seconds = time.perf_counter() - began
    with torch.no_grad():
        before = (setup.manifold.decode(start) - images).flatten(1).norm(dim=1)
    yield f"{len(images)} {what} projected onto {setup.manifold.name} in {format_seconds(seconds)}."
    yield f"L2 distance at the start: {_spread(before)}."
    yield f"L2 distance to the manifold: {_spread(found.distance)}."


def _spread(distance: Tensor) -> str:
    share = torch.quantile(distance.double(), 0.95)
    return f"mean {distance.mean():.3f}, 95 % below {share:.3f}, largest {distance.max():.3f}"


def _read_attack(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            missing = {"images", "codes"} - set(file.keys())
            if missing:
                raise DataError(
                    f"{path} holds no {min(missing)}; expected a file of `onmanifold attack`."
                )
            return {name: file.get_tensor(name) for name in ("images", "codes")}
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is no safetensors file, or is truncated ({error}).") from None
