"""Manifolds by name, and on disk."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onmanifold.foundation.building import build_seeded
from onmanifold.foundation.errors import CheckpointError, ConfigError
from onmanifold.foundation.registry import MANIFOLDS
from onmanifold.foundation.weights import fill_module, read_module, write_module
from onmanifold.manifolds.base import Manifold

_KIND = "manifold"


def build_manifold(
    name: str | Mapping[str, Any],
    num_classes: int = 10,
    image_shape: tuple[int, int, int] = (3, 32, 32),
    seed: int | None = None,
    **options: Any,
) -> Manifold:
    """Build a registered manifold, not yet fitted; its initial weights depend on the seed alone.

    Args:
        name: Such as "ppca", "cvae", "vae_gan", "glow", "sngan" or "stylegan"; or a specification
            ``{"type": name, ...}``, whose values win over the other arguments.
        num_classes: K.
        image_shape: (C, H, W).
        seed: Of the initial weights; None: a fresh one. ``manifold.spec`` says which it was.
        options: The manifold's own.

    Returns:
        The manifold, in eval mode, float32, on the CPU.

    Raises:
        ConfigError: Unknown name or option (the nearest valid one is named), or a wrong value.
    """
    kind = name if isinstance(name, str) else str(name.get("type"))
    accepted = inspect.signature(MANIFOLDS.get(kind)).parameters
    shared = {"num_classes": num_classes, "image_shape": tuple(image_shape)}
    shared = {key: value for key, value in shared.items() if key in accepted}
    manifold, spec = build_seeded(MANIFOLDS, name, seed, shared | options)
    if not isinstance(manifold, Manifold):
        raise ConfigError(f"manifold {kind!r} is no Manifold but {type(manifold).__name__}.")
    # One that is known already, such as FONTS, says itself what rebuilds it.
    manifold.spec = manifold.spec or spec
    return manifold.eval()


def save_manifold(
    manifold: Manifold, path: str | Path, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write a manifold's weights and specification, atomically.

    Args:
        manifold: Made by `build_manifold` or `fit`, or FONTS.
        path: The file, usually ``*.safetensors``.
        metadata: Anything JSON can hold, such as how it was fitted; `manifold_metadata` gives it back.

    Raises:
        InputError: ``metadata`` holds what JSON cannot.
        DataError: The file could not be written; what was there before is left as it was.
    """
    return write_module(_KIND, manifold, path, manifold.spec, metadata)


def load_manifold(path: str | Path, manifold: Manifold | None = None) -> Manifold:
    """Load a manifold that `save_manifold` wrote.

    Args:
        path: The file.
        manifold: One of the saved architecture to load the weights into; needed where the saved one is of a
            class of your own.

    Returns:
        The manifold in eval mode, on the CPU (or ``manifold``, on its device).

    Raises:
        CheckpointError: The file is missing, truncated or foreign, or holds another manifold's weights.
    """
    saved = read_module(_KIND, path)
    if manifold is None:
        if saved.spec is None:
            raise CheckpointError(
                f"{path} holds a manifold of your own: pass a `manifold` to load the weights into."
            )
        try:
            manifold = build_manifold(saved.spec)
        except ConfigError as error:
            raise CheckpointError(
                f"{path} holds a manifold that cannot be rebuilt: {error}"
            ) from error
    fill_module(manifold, saved.weights, path)
    return manifold.eval()


def manifold_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata that was saved with a manifold.

    Raises:
        CheckpointError: The file is missing, truncated or foreign.
    """
    return read_module(_KIND, path, weights=False).metadata


@MANIFOLDS.register("saved")
def saved_manifold(path: str | Path) -> Manifold:
    """A manifold from the file that `fit` or `save_manifold` wrote."""
    return load_manifold(path)
