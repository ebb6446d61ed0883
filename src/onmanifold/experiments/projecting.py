"""Projecting a dataset from the command line: what `onmanifold project --manifold` does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict

from onmanifold.classifiers import load_classifier
from onmanifold.data.sources import Split
from onmanifold.experiments.datasets import load_split
from onmanifold.experiments.on_manifold import OnManifoldData, Search, project_dataset
from onmanifold.experiments.spec import DatasetSpec, Mapped, apply_overrides, parse_dataset
from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.registry import Context, build_component
from onmanifold.manifolds.encoder import load_encoder
from onmanifold.manifolds.factory import load_manifold
from onmanifold.manifolds.perceptual import Kind, perceptual_distance
from onmanifold.manifolds.project import PROJECTIONS, ProjectionConfig
from onmanifold.training.run import one_process

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class ProjectSpec:
    """A checked request to project a dataset.

    Attributes:
        manifold: File of the manifold.
        dataset: What is projected.
        split: Which part of it: "train" or "test".
        search: As for `project_dataset`.
        preset: The search of `PROJECTIONS` to begin with; None: as `project_dataset` chooses.
        config: Fields of `ProjectionConfig` that differ from the preset's.
        measure: Kind of perceptual distance: "auto", "lpips", "features" or "pyramid".
        classifier: File of the classifier whose features serve; needed by "features".
        encoder: Where the search may start too: "own" for the manifold's encoder, or the file of a trained one.
        batch_size: Images at once.
        shard_size: Images per file.
        seed: Of the search.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    manifold: str
    dataset: DatasetSpec
    split: Split = "test"
    search: Search = "perceptual"
    preset: str | None = None
    config: Mapped = field(default_factory=dict)
    measure: Kind = "auto"
    classifier: str | None = None
    encoder: str | None = None
    batch_size: int = 256
    shard_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in PROJECTIONS:
            raise ConfigError(
                f"preset: expected one of {', '.join(PROJECTIONS)}, found {self.preset!r}."
            )

    def projection(self) -> ProjectionConfig | None:
        """The configuration of the search; None: all is left to `project_dataset`.

        Raises:
            ConfigError: Unknown field, or a wrong value.
        """
        if self.preset is None and not self.config:
            return None
        preset = PROJECTIONS[self.preset or ("fonts" if self.search == "l2" else "quick")]
        return build_component(ProjectionConfig, asdict(preset) | self.config, Context(), "config")


def request(
    manifold: Path, dataset: str, split: Split, count: int | None, settings: Iterable[str] = ()
) -> ProjectSpec:
    """The specification that command-line options make.

    Args:
        manifold: File of the manifold.
        dataset: Name of the dataset.
        split: "train" or "test".
        count: How many images of it; None: all.
        settings: ``"key.sub=value"`` each, such as "config.steps=100" or "dataset.folder=pictures".

    Raises:
        ConfigError: A key is unknown, or a value has the wrong type.
    """
    sizes = {} if count is None else {split: count}
    content: Mapped = {
        "manifold": str(manifold),
        "dataset": {"type": dataset, **sizes},
        "split": split,
    }
    values = apply_overrides(content, settings)
    values["dataset"] = parse_dataset(values["dataset"], "project: dataset")
    return build_component(ProjectSpec, values, Context(), "project")


def run_projection(
    spec: ProjectSpec, out: Path, *, device: str = "auto", bars: bool = False
) -> OnManifoldData:
    """Project the dataset into a folder; goes on where it stopped.

    Args:
        spec: What to do.
        out: The folder.
        device: "auto", "cpu" or "cuda".
        bars: Whether to show a progress bar.

    Raises:
        OnManifoldError: As for `project_dataset`; or a file is missing or damaged.
    """
    manifold = load_manifold(spec.manifold)
    dataset = load_split(spec.dataset, spec.split)
    classifier = None if spec.classifier is None else load_classifier(spec.classifier)
    fabric = one_process("32-true", device)
    own = spec.encoder in (None, "own")
    encoder: Any = spec.encoder if own else load_encoder(str(spec.encoder)).to(fabric.device)
    if classifier is not None:
        classifier = classifier.to(fabric.device)
    return project_dataset(
        manifold.to(fabric.device),
        dataset,
        out,
        split=spec.split,
        search=spec.search,
        config=spec.projection(),
        measure=perceptual_distance(
            spec.measure, classifier=classifier, image_shape=dataset.image_shape
        ),
        encoder=encoder,
        batch_size=spec.batch_size,
        shard_size=spec.shard_size,
        seed=spec.seed,
        fabric=fabric,
        progress=bars,
    )


def reconstruction_table(found: OnManifoldData) -> Table:
    """How near the images are, for the terminal: a row for each class, and one for all."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    columns = ["samples", "L1", "L2", found.measure, "L1 of the mean image", "share of it"]
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    rows: dict[str, Any] = {**found.classes, "all": found.overall}
    for name, row in rows.items():
        numbers = [row.l1, row.l2, row.perceptual, row.mean_image_l1]
        # A set of equal images is its own mean.
        share = f"{row.l1 / row.mean_image_l1:.2f}" if row.mean_image_l1 else "-"
        table.add_row(name, str(row.samples), *(f"{number:.4f}" for number in numbers), share)
    return table
