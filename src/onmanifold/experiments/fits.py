"""Learning a manifold from a file or by name: what `onmanifold fit` does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from onmanifold.classifiers import load_classifier
from onmanifold.data.dataset import Dataset
from onmanifold.experiments.datasets import load_split
from onmanifold.experiments.spec import (
    DatasetSpec,
    Mapped,
    apply_overrides,
    parse_dataset,
    read_yaml,
)
from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.registry import MANIFOLDS, Context, build_component, nearest
from onmanifold.manifolds.base import Manifold
from onmanifold.training.run import one_process
from onmanifold.training.run_fit import FitResult, fit

# As `write_manifold_report` names them.
_PAGE, _QUALITY = "manifold.html", "quality.json"


@dataclass(frozen=True)
class QualitySpec:
    """What is measured of a fitted manifold.

    Attributes:
        count: Number of test images and of samples; 0: nothing is measured.
        encoded: Number of test images that are reconstructed; None: all of them. For encoders that search.
        classifier: File of a classifier, whose features the Fréchet distance is measured on; None: none is.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    count: int = 1000
    encoded: int | None = None
    classifier: str | None = None

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ConfigError(f"count: expected a number of images >= 0, found {self.count}.")


@dataclass(frozen=True)
class FitSpec:
    """A checked fit file.

    Attributes:
        name: Names the folder of results.
        dataset: What is learned.
        manifold: Specification of the manifold.
        fit: Fields of its fit.
        training: Fields of `TrainingConfig`.
        seed: Of all that is random.
        title: Heading of the report.
        description: A paragraph for the report.
        quality: What is measured in the end.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    name: str
    dataset: DatasetSpec
    manifold: Mapped
    fit: Mapped | str | None = None
    training: Mapped = field(default_factory=dict)
    seed: int = 0
    title: str = ""
    description: str = ""
    quality: QualitySpec = field(default_factory=QualitySpec)


def load_fit(
    source: str | Path | Mapped, dataset: str | None = None, overrides: Iterable[str] = ()
) -> FitSpec:
    """Read a fit file, or make one of a manifold's name.

    Args:
        source: Path of a YAML file, its content, or the name of a manifold such as "glow".
        dataset: Name of the dataset, in place of the file's own; needed beside a mere name.
        overrides: ``"key.sub=value"`` each, the value in YAML.

    Raises:
        DataError: The file cannot be read.
        ConfigError: It is not YAML; a key is unknown or missing; a value has the wrong type.
    """
    content, label = _content(source, dataset)
    values = apply_overrides(content, overrides)
    if "dataset" in values:
        values["dataset"] = parse_dataset(values["dataset"], f"{label}: dataset")
    if isinstance(values.get("manifold"), str):
        values["manifold"] = {"type": values["manifold"]}
    if isinstance(quality := values.get("quality"), Mapping):
        values["quality"] = build_component(QualitySpec, quality, Context(), f"{label}: quality")
    spec = build_component(FitSpec, values, Context(), label)
    if "/" in spec.name or spec.name in ("", ".", ".."):
        raise ConfigError(f"{label}: name: expected a folder's name, found {spec.name!r}.")
    return spec


def _content(source: str | Path | Mapped, dataset: str | None) -> tuple[Mapped, str]:
    if isinstance(source, Mapping):
        content, label = dict(source), "fit"
    elif Path(source).suffix in (".yaml", ".yml"):
        content, label = read_yaml(Path(source)), str(source)
    else:
        name = str(source)
        if name not in MANIFOLDS.entries:
            raise ConfigError(
                f"{name!r} is neither a YAML file nor a manifold.{nearest(name, MANIFOLDS.entries)}"
            )
        if dataset is None:
            raise ConfigError(f"fit {name!r}: which dataset? Say --dataset NAME.")
        content, label = {"name": f"{name}-{dataset}", "manifold": {"type": name}}, f"fit {name!r}"
    if dataset is not None:
        content["dataset"] = dataset
    return content, label


def run_fit(
    spec: FitSpec,
    out: Path | None = None,
    *,
    device: str = "auto",
    say: Callable[[str], object] = lambda line: None,
    bars: bool = False,
) -> FitResult:
    """Learn the manifold, measure it, and write its report; goes on where it stopped.

    Args:
        spec: What to do.
        out: Folder of the results; None: ``runs/<name>``.
        device: "auto", "cpu" or "cuda".
        say: Is given a line where there is something to say.
        bars: Whether to show progress bars.

    Raises:
        OnManifoldError: As for `fit`.
    """
    out = Path("runs") / spec.name if out is None else out
    train = load_split(spec.dataset, "train")
    training: dict[str, Any] = dict(spec.training)
    fabric = one_process(str(training.get("precision", "32-true")), device)
    found = fit(
        spec.manifold,
        train,
        training,
        fit=spec.fit,
        directory=out,
        seed=spec.seed,
        progress=bars,
        fabric=fabric,
    )
    say(f"Manifold: {found.best}")
    if spec.quality.count:
        say(f"Quality: {_measure(spec, found, train, out, bars)}")
    return found


def _measure(spec: FitSpec, found: FitResult, train: Dataset, out: Path, bars: bool) -> Path:
    """Measure the manifold and write its page, unless that is done."""
    from onmanifold.analysis.quality import Quality, measure_quality
    from onmanifold.reports.manifold import write_manifold_report
    from onmanifold.reports.manifold_pictures import picture_manifold

    manifold, asked = found.manifold, spec.quality
    if (out / _PAGE).is_file() and (out / _QUALITY).is_file():
        before = Quality.from_json(out / _QUALITY).facts
        if before.get("fingerprint") == manifold.fingerprint:
            return out / _PAGE
    test = load_split(spec.dataset, "test")
    classifier = None
    if asked.classifier is not None:
        classifier = load_classifier(asked.classifier).to(next(manifold.parameters()).device)
    quality = measure_quality(
        manifold,
        train,
        test,
        classifier=classifier,
        count=asked.count,
        encoded=asked.encoded,
        seed=spec.seed,
        progress=bars,
    )
    pictures = picture_manifold(manifold, train, test, seed=spec.seed)
    return write_manifold_report(out, manifold, quality, pictures, found.history)


@MANIFOLDS.register("fitted")
def fitted_manifold(
    file: str | Path, out: str | Path | None = None, settings: tuple[str, ...] = ()
) -> Manifold:
    """The manifold of a fit file; learned first where it is not yet, as by `onmanifold fit`.

    Args:
        file: The fit file.
        out: Folder of the fit's results; None: ``runs/<name>``.
        settings: ``"key.sub=value"`` each.
    """
    found = run_fit(load_fit(file, overrides=settings), None if out is None else Path(out))
    return found.manifold.cpu()
