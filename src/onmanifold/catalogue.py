"""What is registered, read from the package's source without importing it: instant, and never out of date."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

Definition = ast.ClassDef | ast.FunctionDef

KINDS = {
    "DATASETS": "dataset",
    "MANIFOLDS": "manifold",
    "CLASSIFIERS": "classifier",
    "THREATS": "threat",
    "OBJECTIVES": "objective",
    "ATTACKS": "attack",
    "METHODS": "method",
    "FITS": "fit",
    "SCHEDULES": "schedule",
    "ANALYSES": "analysis",
}
"""Names of the registries in the source, and the kinds that they hold."""


class Listed(NamedTuple):
    """A registered component.

    Attributes:
        kind: Such as "attack".
        name: As in an experiment file.
        summary: First line of its docstring.
        fields: Its fields and arguments; those without a default are marked with ``*``.
    """

    kind: str
    name: str
    summary: str
    fields: tuple[str, ...]


def catalogue() -> list[Listed]:
    """All components that decorators ``@KIND.register("name")`` enter, by kind and name."""
    nodes: list[Definition] = []
    found: list[Listed] = []
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes += [node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
        found += [source for node in tree.body for source in _sources(node)]
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    found += [
        Listed(
            kind,
            name,
            (ast.get_docstring(node) or "").partition("\n")[0],
            tuple(_fields(node, classes)),
        )
        for node in nodes
        for kind, name in _registrations(node)
    ]
    order = list(KINDS.values())
    return sorted(found, key=lambda item: (order.index(item.kind), item.name))


def _sources(node: ast.stmt) -> list[Listed]:
    """The datasets in Parquet files, which one table describes: ``SOURCES = {name: Source(repository, ...)}``."""
    match node:
        case ast.Assign(targets=[ast.Name(id="SOURCES")], value=ast.Dict(keys=keys, values=values)):
            return [
                Listed(
                    "dataset",
                    name,
                    f"From Parquet files, as {repository} on the Hugging Face hub.",
                    (),
                )
                for key, value in zip(keys, values, strict=True)
                if isinstance(key, ast.Constant) and isinstance(name := key.value, str)
                if isinstance(value, ast.Call) and isinstance(first := value.args[0], ast.Constant)
                if isinstance(repository := first.value, str)
            ]
    return []


def _registrations(node: Definition) -> list[tuple[str, str]]:
    found = []
    for decorator in node.decorator_list:
        match decorator:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id=registry), attr="register"),
                args=[ast.Constant(value=str(name))],
            ) if registry in KINDS:
                found.append((KINDS[registry], name))
    return found


def _fields(node: Definition, classes: Mapping[str, ast.ClassDef]) -> list[str]:
    if isinstance(node, ast.FunctionDef):
        return _arguments(node.args)
    makers = [item for item in node.body if isinstance(item, ast.FunctionDef)]
    for maker in makers:
        if maker.name == "__init__":
            return [name for name in _arguments(maker.args) if name.rstrip("*") != "self"]
    # As a dataclass has them: those of its bases first, a redefined one at its old place.
    fields: dict[str, str] = {}
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes:
            fields |= {name.rstrip("*"): name for name in _fields(classes[base.id], classes)}
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            name = item.target.id
            if not name.startswith("_") and not ast.unparse(item.annotation).startswith("ClassVar"):
                fields[name] = name + ("" if item.value else "*")
    return list(fields.values())


def _arguments(arguments: ast.arguments) -> list[str]:
    plain = [*arguments.posonlyargs, *arguments.args]
    required = len(plain) - len(arguments.defaults)
    named = [item.arg + ("*" if place < required else "") for place, item in enumerate(plain)]
    keyword = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    return named + [item.arg + ("" if default else "*") for item, default in keyword]
