"""The experiment file: YAML in, a checked specification out; command-line overrides included."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict

from onmanifold.evaluation.ledger import STANDARD, WORST_CASE
from onmanifold.foundation.errors import ConfigError, DataError
from onmanifold.foundation.registry import Context, build_component, nearest
from onmanifold.reports.claims import OVERFITTING, Claim

Mapped = dict[str, Any]


@dataclass(frozen=True)
class DatasetSpec:
    """Which dataset, and how many images of it.

    Attributes:
        type: Its name for `load_dataset`.
        train: Number of training images; None: all.
        test: Number of test images; None: all.
        options: Passed to `load_dataset`.
    """

    type: str
    train: int | None = None
    test: int | None = None
    options: Mapped = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationSpec:
    """How the trained classifiers are evaluated.

    Attributes:
        batch_size: Images at once.
        seed: Of the attacks' random starts.
        precision: Of the attacks: "32" or "bf16", success always checked in float32; None: as each attack says.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    batch_size: int = 250
    seed: int = 0
    precision: Literal["32", "bf16"] | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size: expected at least 1, found {self.batch_size}.")


@dataclass(frozen=True)
class Experiment:
    """A checked experiment file. Components stay specifications here; `prepare` builds them.

    Attributes:
        name: Names the folder of results.
        dataset: What is learned.
        classifier: Specification of the network.
        methods: How it is trained, by the names that the table shows.
        attacks: How it is attacked, by the names that the table shows.
        title: Heading of the report.
        description: A paragraph for the report.
        seeds: One training for each method and seed.
        manifold: Specification; None: the dataset's own, where it has one.
        threats: Threat models that methods and attacks may name.
        training: Fields of `TrainingConfig`.
        evaluation: How the classifiers are evaluated.
        worst_case: Further columns: per-sample worst case over the attacks listed.
        claims: Statements to be judged from the results.
        content: What the file said, overrides included.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    name: str
    dataset: DatasetSpec
    classifier: Mapped
    methods: Mapped
    attacks: Mapped
    title: str = ""
    description: str = ""
    seeds: tuple[int, ...] = (0,)
    manifold: Any = None
    threats: Mapped = field(default_factory=dict)
    training: Mapped = field(default_factory=dict)
    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)
    worst_case: dict[str, tuple[str, ...]] = field(default_factory=dict)
    claims: tuple[Claim, ...] = ()
    content: Mapped = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def columns(self) -> list[str]:
        """Columns of the table: standard, then attacks, each worst case after the last of its attacks."""
        columns = [STANDARD, *self.attacks]
        for name, members in self.worst_case.items():
            last = max(columns.index(member) for member in members)
            while last + 1 < len(columns) and columns[last + 1] in self.worst_case:
                last += 1
            columns.insert(last + 1, name)
        return columns


def load_experiment(source: str | Path | Mapped, overrides: Iterable[str] = ()) -> Experiment:
    """Read an experiment file.

    Args:
        source: Path of a YAML file, or its content as a mapping.
        overrides: ``"key.sub=value"`` each, the value in YAML.

    Raises:
        DataError: The file cannot be read.
        ConfigError: It is not YAML; a key is unknown (the nearest valid one is named) or missing; a value
            has the wrong type.
    """
    content = source if isinstance(source, Mapping) else read_yaml(Path(source))
    label = "experiment" if isinstance(source, Mapping) else str(source)
    return parse_experiment(apply_overrides(dict(content), overrides), label)


_MERGE = "tag:yaml.org,2002:merge"


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping; YAML itself would silently keep the last.

    What a merge (``<<``) brings may be said anew: mappings are checked as they are written, before merging.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping of the file."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                shown = f"{key.value!r}" if key.tag == _MERGE else f"{self.construct_object(key)!r}"
                raise yaml.MarkedYAMLError(
                    problem=f"the key {shown} stands twice", problem_mark=key.start_mark
                )
            seen.add((key.tag, key.value))
        return node


def read_yaml(path: Path) -> Mapped:
    """Read a YAML mapping.

    Raises:
        DataError: No such file.
        ConfigError: Not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"Could not read the experiment file {path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a text file in UTF-8.") from None
    return _parse_yaml(text, str(path))


def _parse_yaml(text: str, label: str) -> Mapped:
    try:
        content = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a subclass of SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{label}{place}: {error.problem or 'not YAML'}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{label}: not YAML ({error}).") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{label}: expected a mapping, found {type(content).__name__}.")
    return content


def apply_overrides(content: Mapped, overrides: Iterable[str]) -> Mapped:
    """A copy of ``content`` with ``"key.sub=value"`` settings applied in order.

    A key that holds dots or spaces, such as the name of a method, is written as it is. A name in place of a
    mapping (``methods.Normal: normal``) becomes ``{type: name}`` when a key below it is set. A new name for
    the dataset keeps the numbers of images, so that two datasets can be compared.

    Raises:
        ConfigError: Not of this form, or below a value that has no keys.
    """
    result: Mapped = _copy(content)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path.strip():
            raise ConfigError(f"override {override!r}: expected key=value.")
        try:
            value = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a subclass of SafeLoader
        except yaml.YAMLError:
            raise ConfigError(f"override {override!r}: {text!r} is not YAML.") from None
        _set(result, path.strip(), value, override)
    return result


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _set(content: Mapped, path: str, value: object, override: str) -> None:
    old = content.get(path)
    if path == "dataset" and isinstance(value, str) and isinstance(old, Mapping):
        value = {"type": value} | {key: old[key] for key in ("train", "test") if key in old}
    known = [key for key in content if path.startswith(f"{key}.")]
    if path in content or (not known and "." not in path):
        content[path] = value
        return
    key = max(known, key=len) if known else path.partition(".")[0]
    below = content.setdefault(key, {})
    if isinstance(below, str):
        below = content[key] = {"type": below}
    if not isinstance(below, dict):
        raise ConfigError(f"override {override!r}: {key!r} is {below!r} and has no keys below it.")
    _set(below, path[len(key) + 1 :], value, override)


def parse_experiment(content: Mapped, label: str) -> Experiment:
    """Check the content of an experiment file.

    Raises:
        ConfigError: As for `load_experiment`; the message begins with ``label`` and the path of the key.
    """
    values = dict(content)
    if "dataset" in values:
        values["dataset"] = parse_dataset(values["dataset"], f"{label}: dataset")
    if isinstance(values.get("classifier"), str):
        values["classifier"] = {"type": values["classifier"]}
    if isinstance(evaluation := values.get("evaluation"), Mapping):
        values["evaluation"] = build_component(
            EvaluationSpec, evaluation, Context(), f"{label}: evaluation"
        )
    claims = values.get("claims") or []
    if not isinstance(claims, list):
        raise ConfigError(f"{label}: claims: expected a list, found {type(claims).__name__}.")
    values["claims"] = tuple(
        Claim.parse(claim, f"{label}: claims.{number}") for number, claim in enumerate(claims)
    )
    experiment = _check_names(build_component(Experiment, values, Context(), label), label)
    object.__setattr__(experiment, "content", _copy(content))
    return experiment


def parse_dataset(value: object, label: str) -> DatasetSpec:
    """A dataset's name, or a mapping with its type, numbers of images and options, as a specification.

    Raises:
        ConfigError: Neither, or a number of images that is none; the message begins with ``label``.
    """
    if isinstance(value, str):
        return DatasetSpec(value)
    if not isinstance(value, Mapping) or not isinstance(value.get("type"), str):
        raise ConfigError(
            f"{label}: expected a name or a mapping with the key 'type', found {value!r}."
        )
    sizes: dict[str, int | None] = {}
    for key in ("train", "test"):
        size = value.get(key)
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ConfigError(f"{label}.{key}: expected a number of images, found {size!r}.")
        sizes[key] = size
    options = {
        str(key): item for key, item in value.items() if key not in ("type", "train", "test")
    }
    return DatasetSpec(value["type"], sizes["train"], sizes["test"], options)


def _check_names(experiment: Experiment, label: str) -> Experiment:
    """Check that names refer to something; fills in the default worst case."""
    for key in ("methods", "attacks", "seeds"):
        if not getattr(experiment, key):
            raise ConfigError(f"{label}: {key}: expected at least one.")
    if len(set(experiment.seeds)) < len(experiment.seeds):
        raise ConfigError(f"{label}: seeds: found one twice in {list(experiment.seeds)}.")
    if "/" in experiment.name or experiment.name in ("", ".", ".."):
        raise ConfigError(f"{label}: name: expected a folder's name, found {experiment.name!r}.")
    for name in (STANDARD, WORST_CASE):
        if name in experiment.attacks:
            raise ConfigError(f"{label}: attacks: {name!r} cannot be an attack's name.")
    worst_case = experiment.worst_case or {WORST_CASE: tuple(experiment.attacks)}
    for name, members in worst_case.items():
        if name in experiment.attacks or name == STANDARD:
            raise ConfigError(f"{label}: worst_case: {name!r} is the name of an attack.")
        if not members:
            raise ConfigError(f"{label}: worst_case.{name}: expected at least one attack.")
        for member in members:
            if member not in experiment.attacks:
                raise ConfigError(
                    f"{label}: worst_case.{name}: unknown attack {member!r}."
                    f"{nearest(member, experiment.attacks)}"
                )
    experiment = replace(experiment, worst_case=worst_case)
    for number, claim in enumerate(experiment.claims):
        for method, column in sorted(claim.cells()):
            place = f"{label}: claims.{number}"
            if method not in experiment.methods:
                raise ConfigError(
                    f"{place}: unknown method {method!r}.{nearest(method, experiment.methods)}"
                )
            known = [*experiment.columns, OVERFITTING]
            if column not in known:
                raise ConfigError(f"{place}: unknown column {column!r}.{nearest(column, known)}")
    return experiment
