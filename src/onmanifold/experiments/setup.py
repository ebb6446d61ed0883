"""From a checked specification to objects: data, manifold, threat models, methods, attacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onmanifold.attacks import Attack
from onmanifold.classifiers import build_classifier
from onmanifold.classifiers.layers import Classifier
from onmanifold.data import Dataset
from onmanifold.data.on_manifold import MANIFOLD_FILE
from onmanifold.experiments.datasets import dataset_options, load_split
from onmanifold.experiments.spec import DatasetSpec, Experiment
from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.registry import (
    ATTACKS,
    DATASETS,
    MANIFOLDS,
    METHODS,
    THREATS,
    Context,
    Registry,
    build_component,
    describe,
    nearest,
)
from onmanifold.manifolds.base import Manifold
from onmanifold.manifolds.factory import load_manifold
from onmanifold.training import Method, TrainingConfig


@dataclass(frozen=True)
class Setup:
    """The objects of an experiment.

    Attributes:
        experiment: The specification.
        train: Training images.
        test: Test images.
        manifold: The manifold that latent threat models refer to, or None.
        methods: By the names that the table shows.
        attacks: By the names that the table shows.
        training: How trainings are run.
    """

    experiment: Experiment
    train: Dataset
    test: Dataset
    manifold: Manifold | None
    methods: Mapping[str, Method]
    attacks: Mapping[str, Attack]
    training: TrainingConfig

    def classifier(self, seed: int) -> Classifier:
        """A fresh network for this data, its weights drawn by the seed."""
        options = {"num_classes": self.train.num_classes, "image_shape": self.train.image_shape}
        return build_classifier(options | self.experiment.classifier, seed=seed)

    def training_key(self, method: str, seed: int) -> dict[str, Any]:
        """All that determines a trained classifier."""
        return {
            "method": describe(self.methods[method]),
            "seed": seed,
            "dataset": self.train.fingerprint,
            "classifier": self.classifier(seed).spec,
            "training": self.training.identity,
        }

    def evaluation_key(self, training_key: Mapping[str, Any]) -> dict[str, Any]:
        """All that determines the ledger of a trained classifier."""
        return {
            "training": dict(training_key),
            "dataset": self.test.fingerprint,
            "attacks": describe(self.attacks),
            "evaluation": describe(self.experiment.evaluation),
        }


def prepare(experiment: Experiment) -> Setup:
    """Load the data and build all components.

    Raises:
        ConfigError: A component's specification is wrong; the message begins with its place in the file.
        DataError: The data is missing or damaged.
    """
    DATASETS.get(experiment.dataset.type)
    manifold = manifold_of(experiment.manifold, experiment.dataset)
    methods, attacks, training = build_parts(experiment, manifold)
    train, test = (load_split(experiment.dataset, split) for split in ("train", "test"))
    if (train.image_shape, train.classes) != (test.image_shape, test.classes):
        raise ConfigError("dataset: training and test images differ in shape or classes.")
    setup = Setup(experiment, train, test, manifold, methods, attacks, training)
    try:
        setup.classifier(experiment.seeds[0])
    except ConfigError as error:
        raise ConfigError(f"classifier: {error}") from error
    return setup


def build_parts(
    experiment: Experiment, manifold: Manifold | None
) -> tuple[dict[str, Method], dict[str, Attack], TrainingConfig]:
    """The methods, the attacks, and how trainings are run: what needs no data.

    Args:
        experiment: The specification.
        manifold: What latent threat models refer to.

    Raises:
        ConfigError: A component's specification is wrong; the message begins with its place in the file.
    """
    defaults: dict[str, object] = {} if manifold is None else {"manifold": manifold}
    threats = _build_all(THREATS, "threats", experiment.threats, Context({}, defaults))
    context = Context({"threat": threats}, defaults)
    attacks = _build_all(ATTACKS, "attacks", experiment.attacks, context)
    context = Context({"threat": threats, "attack": attacks}, defaults)
    methods = _build_all(METHODS, "methods", experiment.methods, context)
    training = build_component(TrainingConfig, experiment.training, context, "training")
    precision = experiment.evaluation.precision
    if precision is not None:
        attacks = {
            name: replace(attack, engine=replace(attack.engine, precision=precision))
            for name, attack in attacks.items()
        }
    return methods, attacks, training


def _build_all(
    registry: Registry[Any], place: str, specifications: Mapping[str, object], context: Context
) -> dict[str, Any]:
    built = {}
    for name, specification in specifications.items():
        try:
            built[name] = registry.build(specification, context)
        except ConfigError as error:
            raise ConfigError(f"{place}.{name}: {error}") from error
    return built


def chosen_attacks(attacks: Mapping[str, Attack], names: Sequence[str] | None) -> dict[str, Attack]:
    """The attacks of these names; None: all.

    Raises:
        ConfigError: There is no such attack.
    """
    for name in names or ():
        if name not in attacks:
            raise ConfigError(f"attacks: unknown attack {name!r}.{nearest(name, attacks)}")
    return {name: attacks[name] for name in (attacks if names is None else names)}


def manifold_of(specification: Any, dataset: DatasetSpec) -> Manifold | None:
    """The manifold that a specification asks for; None: the dataset's own, where it has one.

    Raises:
        ConfigError: The specification is wrong.
    """
    if specification is not None:
        # Registers "fitted", which no lower room can know.
        from onmanifold.experiments import fits  # noqa: F401

        try:
            manifold = MANIFOLDS.build(specification)
        except ConfigError as error:
            raise ConfigError(f"manifold: {error}") from error
        if not isinstance(manifold, Manifold):
            raise ConfigError(f"manifold: expected a manifold, found {specification!r}.")
        return manifold
    if dataset.type == "on_manifold":
        folder = Path(str(dataset.options.get("folder")))
        return load_manifold(folder / MANIFOLD_FILE)
    if dataset.type != "fonts":
        return None
    from onmanifold.manifolds.fonts import fonts_manifold

    options = dataset_options(dataset)
    chosen: dict[str, Any] = {key: options[key] for key in ("folder", "variant") if key in options}
    return build_component(fonts_manifold, chosen, Context(), "dataset 'fonts'")
