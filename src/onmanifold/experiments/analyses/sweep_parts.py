"""An experiment over several numbers of training images and networks: its parts, and what they measure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pandas as pd

from onmanifold.analysis.generalisation import success_rate
from onmanifold.attacks import Attack
from onmanifold.classifiers import load_classifier
from onmanifold.data import Dataset
from onmanifold.evaluation import Evaluation, evaluate
from onmanifold.evaluation.recheck import SavedImages
from onmanifold.experiments.analyses.base import Workplace
from onmanifold.experiments.datasets import load_split
from onmanifold.experiments.runner import Session, open_session, train_only
from onmanifold.experiments.spec import Mapped, apply_overrides, load_experiment
from onmanifold.experiments.store import slug
from onmanifold.experiments.summary import Trained
from onmanifold.foundation.errors import ConfigError, OnManifoldError
from onmanifold.foundation.registry import nearest

FACTS = ("classifier", "method", "size", "seed", "epochs", "test_error", "error")
"""Columns beside those of the attacks."""

_TRANSFERRED = ", transferred"
_HELD_OUT = "held out"


@dataclass(frozen=True)
class HeldOut:
    """A training apart, whose adversarial examples are shown to all (Disentangling appendix E).

    Attributes:
        method: Name of one of the experiment's methods.
        size: Number of training images.
        seed: None of the experiment's.
    """

    method: str
    size: int = 10000
    seed: int = 1000


@dataclass(frozen=True)
class Part:
    """The experiment with one network and one number of training images.

    Attributes:
        classifier: Name of the network.
        size: Number of training images.
        session: The experiment, opened.
    """

    classifier: str
    size: int
    session: Session


@dataclass(frozen=True)
class Grid:
    """What is put in place of the experiment's own; None: its own. For the fields see `Generalisation`."""

    sizes: tuple[int, ...]
    classifiers: Mapping[str, Any] | None = None
    methods: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None
    attacks: Mapped | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        # Each network has a folder of its own, and so has the training apart.
        folders = {slug(_HELD_OUT): _HELD_OUT}
        for name in self.classifiers or ():
            other = folders.setdefault(slug(name), name)
            if other != name:
                raise ConfigError(
                    "analysis: classifiers: expected names that differ in letters or digits, found "
                    f"{name!r} beside {other!r}: both stand for the folder {slug(name)!r}."
                )

    def parts(self, place: Workplace) -> Iterator[Part]:
        """The experiment once for each network and size, all with its store, which shares what is equal."""
        content = self._content(place)
        own = content["classifier"]
        name = own if isinstance(own, str) else own["type"]
        for classifier, spec in (self.classifiers or {name: own}).items():
            for size in self.sizes:
                yield self._open(place, {**content, "classifier": spec}, classifier, size)

    def held_out(self, place: Workplace, source: HeldOut) -> tuple[Part, Trained]:
        """The experiment's own network, trained apart.

        Raises:
            ConfigError: Unknown method, or a training that is not apart.
            OnManifoldError: The training failed.
        """
        content = self._content(place)
        if source.method not in content["methods"]:
            raise ConfigError(
                f"analysis: held_out: unknown method {source.method!r}."
                f"{nearest(source.method, content['methods'])}"
            )
        seeds = content.get("seeds", place.experiment.setup.experiment.seeds)
        if source.seed in seeds:
            raise ConfigError(
                f"analysis: held_out: seed: expected none of {list(seeds)}, found {source.seed}."
            )
        methods = {source.method: content["methods"][source.method]}
        content = {**content, "methods": methods, "seeds": [source.seed]}
        part = self._open(place, content, _HELD_OUT, source.size)
        (job,) = train_only(part.session, None, None)
        if job.error:
            raise OnManifoldError(f"{_HELD_OUT}, {job.method}: {job.error}")
        return part, job

    def _content(self, place: Workplace) -> Mapped:
        """The experiment's content with what is put in its place."""
        content = dict(place.experiment.setup.experiment.content)
        # They speak of the whole experiment, and of attacks and methods that may not be there.
        for key in ("claims", "worst_case"):
            content.pop(key, None)
        for name in self.methods or ():
            if name not in content["methods"]:
                raise ConfigError(
                    f"analysis: methods: unknown method {name!r}.{nearest(name, content['methods'])}"
                )
        if self.methods is not None:
            content["methods"] = {name: content["methods"][name] for name in self.methods}
        if self.seeds is not None:
            content["seeds"] = list(self.seeds)
        if self.attacks is not None:
            content["attacks"] = self.attacks
        return content

    def _open(self, place: Workplace, content: Mapped, classifier: str, size: int) -> Part:
        base = place.experiment
        epochs = self._epochs(base, size)
        overrides = [f"dataset.train={size}", f"training.epochs={epochs}"]
        session = open_session(
            load_experiment(apply_overrides(content, overrides)),
            place.out / "trainings" / f"{slug(classifier)}-{size}",
            store=base.store.root,
            device=place.device,
            say=partial(_say, place, f"{classifier}, {size:,} images"),
            bars=place.bars,
        )
        return Part(classifier, size, session)

    def _epochs(self, base: Session, size: int) -> int:
        training = base.setup.training
        kept = size - round(training.validation_fraction * size)
        batches = max(1, -(-kept // training.batch_size))
        return max(training.epochs, -(-(self.steps or 0) // batches))


def load_error_images(place: Workplace, count: int) -> Dataset:
    """The test images on which test error is measured, where they are not those that are attacked.

    Raises:
        ConfigError: The test set has fewer.
    """
    spec = place.experiment.setup.experiment.dataset
    try:
        return load_split(replace(spec, test=count), "test")
    except ConfigError as error:
        raise ConfigError(f"analysis: error_images: {error}") from error


def measure(
    parts: Sequence[Part],
    jobs: Sequence[Sequence[Trained]],
    more: Dataset | None,
    source: tuple[Part, Trained] | None,
) -> pd.DataFrame:
    """Test error and success rates of all trainings.

    Args:
        parts: From `Grid.parts`.
        jobs: The finished runs of each.
        more: From `load_error_images`: images on which test error is measured; None: those that are attacked.
        source: From `Grid.held_out`: its adversarial examples are tried too; None: there is none.

    Returns:
        A row for each training: classifier, method, size, seed, epochs, test_error and for each attack the
        success rate, all shares in [0, 1]. Of transferred images they are shares of those that both classifiers
        see correctly. Trainings that failed have no numbers, and say why in the column "error".

    Raises:
        OnManifoldError: All trainings failed.
    """
    shown = None if source is None else _Shown.of(*source)
    rows = []
    for part, own in zip(parts, jobs, strict=True):
        for job in own:
            row: dict[str, Any] = {
                "classifier": part.classifier,
                "method": job.method,
                "size": part.size,
                "seed": job.seed,
                "epochs": part.session.setup.training.epochs,
            }
            rows.append(
                row | ({"error": job.error} if job.error else _numbers(part, job, more, shown))
            )
    errors = [row["error"] for row in rows if "error" in row]
    if len(errors) == len(rows):
        raise OnManifoldError(f"All trainings failed; the first: {errors[0]}")
    return pd.DataFrame(rows)


def transferred(attack: str) -> str:
    """Name of an attack whose images were made on the held-out classifier."""
    return attack + _TRANSFERRED


@dataclass(frozen=True)
class _Shown:
    """The held-out classifier's adversarial examples."""

    made: Evaluation
    saved: Mapping[str, Attack]

    @staticmethod
    def of(part: Part, job: Trained) -> _Shown:
        folder = job.training.folder / "held out"
        setup = part.session.setup
        made = _evaluated(part, job, setup.test, setup.attacks, "held out", save_images=True)
        saved: Mapping[str, Any] = {name: SavedImages(folder, made, name) for name in setup.attacks}
        return _Shown(made, saved)

    def rates(self, part: Part, job: Trained) -> dict[str, float]:
        """Success rates on another classifier, of what both see correctly."""
        tried = _evaluated(part, job, part.session.setup.test, self.saved, "transferred")
        both = self.made.correct() & tried.correct()
        return {
            transferred(name): success_rate(both, tried.correct(name) & both) for name in self.saved
        }


def _numbers(
    part: Part, job: Trained, more: Dataset | None, shown: _Shown | None
) -> dict[str, float]:
    evaluation = Evaluation.load(job.evaluation.folder / "ledger.parquet")
    clean = evaluation if more is None else _evaluated(part, job, more, {}, "test error")
    rates = {name: evaluation.success_rate(name) for name in evaluation.names}
    others = {} if shown is None else shown.rates(part, job)
    return {"test_error": 1 - clean.accuracy(), **rates, **others}


def _evaluated(
    part: Part,
    job: Trained,
    dataset: Dataset,
    attacks: Mapping[str, Attack],
    folder: str,
    save_images: bool = False,
) -> Evaluation:
    """An evaluation beside a training's own; what is finished is read."""
    spec = part.session.setup.experiment.evaluation
    return evaluate(
        load_classifier(job.classifier),
        dataset,
        attacks,
        spec.batch_size,
        spec.seed,
        directory=job.training.folder / folder,
        save_images=save_images,
        fabric=part.session.fabric,
    )


def _say(place: Workplace, label: str, line: str) -> None:
    place.say(f"{label}: {line}")
