"""Building a network from its specification, its weights by seed."""

from __future__ import annotations

import inspect
import secrets
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.registry import Registry


def build_seeded(
    registry: Registry[Any],
    given: str | Mapping[str, Any],
    seed: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Build a registered network; its initial weights depend on the seed alone.

    The global random state is left as it was found, and has no influence.

    Args:
        registry: Of the network's kind.
        given: Its name, or a specification ``{"type": name, ...}``, whose values win over the other arguments.
        seed: Of the initial weights; None: a fresh one.
        options: The network's own.

    Returns:
        The network, and the specification with all defaults and the seed said, as plain data: it outlives a
        change of a default.

    Raises:
        ConfigError: Unknown name or option (the nearest valid one is named), or a wrong value.
    """
    given = {"type": given} if isinstance(given, str) else dict(given)
    if "type" not in given:
        raise ConfigError(f"A {registry.kind} needs the key 'type', found only {sorted(given)}.")
    values = {"seed": seed, **(options or {}), **given}
    chosen = values.pop("seed")
    if chosen is None:
        chosen = secrets.randbits(31)
    if not isinstance(chosen, int):
        raise ConfigError(f"{registry.kind}: expected an integer seed, found {chosen!r}.")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(chosen)
        module: nn.Module = registry.build(values)
    return module, _complete(registry, values) | {"seed": chosen}


def _complete(registry: Registry[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(registry.get(values["type"])).parameters.items()
        if parameter.default is not parameter.empty
    }
    complete = {"type": values["type"]} | defaults | dict(values)
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in complete.items()
    }
