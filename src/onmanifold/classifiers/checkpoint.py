"""Classifiers on disk: one safetensors file with the weights, the specification and any metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from onmanifold.classifiers.factory import build_classifier
from onmanifold.foundation.errors import CheckpointError, ConfigError, InputError
from onmanifold.foundation.files import write_atomically

_KIND = "onmanifold classifier"


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
    # safetensors wants contiguous tensors that share no memory, and reads them back in any memory format.
    weights = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }
    header = {
        "kind": _KIND,
        "spec": json.dumps(getattr(model, "spec", None) or None),
        "metadata": _as_json(metadata or {}),
    }
    return write_atomically(path, safetensors.torch.save(weights, header))


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
    header, weights = _read(path)
    if model is None:
        spec = json.loads(header["spec"])
        if spec is None:
            raise CheckpointError(
                f"{path} holds the weights of a model of your own: pass a `model` to load them into."
            )
        try:
            model = build_classifier(spec)
        except ConfigError as error:
            raise CheckpointError(
                f"{path} holds a model that cannot be rebuilt: {error}"
            ) from error
    _check_same(path, weights, model.state_dict())
    model.load_state_dict(weights)
    return model.eval()


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata that was saved with a classifier.

    Raises:
        CheckpointError: The file is missing, truncated or foreign.
    """
    header, _ = _read(path, weights=False)
    metadata: dict[str, Any] = json.loads(header["metadata"])
    return metadata


def _as_json(metadata: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(metadata))
    except TypeError as error:
        raise InputError(f"metadata: expected what JSON can hold ({error}).") from None


def _read(path: str | Path, weights: bool = True) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()} if weights else {}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a safetensors file, or is truncated ({error})."
        ) from None
    if header.get("kind") != _KIND:
        raise CheckpointError(
            f"{path} is a safetensors file, but not one of an onmanifold classifier."
        )
    return header, tensors


def _check_same(
    path: str | Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    missing, surplus = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing or surplus:
        name, problem = (
            (min(missing), "lacks") if missing else (min(surplus), "has, beyond the model,")
        )
        raise CheckpointError(
            f"{path} is a checkpoint of another model: it {problem} the weight {name!r}."
        )
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path} is a checkpoint of another model: {name!r} has shape {tuple(found[name].shape)}, "
                f"expected {tuple(tensor.shape)}."
            )
