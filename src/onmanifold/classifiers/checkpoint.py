"""Classifiers on disk: one safetensors file with the weights, the specification and any metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from onmanifold.classifiers.factory import build_classifier
from onmanifold.foundation.errors import CheckpointError, ConfigError
from onmanifold.foundation.weights import fill_module, read_module, write_module

_KIND = "classifier"


def save_classifier(
    model: nn.Module, path: str | Path, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write a model's weights and specification, atomically.

    Args:
        model: Made by `build_classifier`; or any module, whose weights `load_classifier` can then
            put into a module of the same architecture.
        path: The file, usually ``*.safetensors``.
        metadata: Anything JSON can hold, such as accuracies; `read_metadata` gives it back.

    Raises:
        InputError: ``metadata`` holds what JSON cannot.
        DataError: The file could not be written; what was there before is left as it was.
    """
    return write_module(_KIND, model, path, getattr(model, "spec", None), metadata)


def load_classifier(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Load a classifier that `save_classifier` wrote.

    Args:
        path: The file.
        model: A module of the saved architecture to load the weights into; needed where the saved
            one was not made by `build_classifier`.

    Returns:
        The classifier in eval mode, on the CPU (or ``model``, on its device).

    Raises:
        CheckpointError: The file is missing, truncated or foreign, or holds another model's weights.
    """
    saved = read_module(_KIND, path)
    if model is None:
        if saved.spec is None:
            raise CheckpointError(
                f"{path} holds the weights of a model of your own: pass a `model` to load them into."
            )
        try:
            model = build_classifier(saved.spec)
        except ConfigError as error:
            raise CheckpointError(
                f"{path} holds a model that cannot be rebuilt: {error}"
            ) from error
    fill_module(model, saved.weights, path)
    return model.eval()


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata that was saved with a classifier.

    Raises:
        CheckpointError: The file is missing, truncated or foreign.
    """
    return read_module(_KIND, path, weights=False).metadata
