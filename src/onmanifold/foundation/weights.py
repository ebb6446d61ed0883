"""Modules on disk: one safetensors file with the weights, the specification and any metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from onmanifold.foundation.errors import CheckpointError, InputError
from onmanifold.foundation.files import write_atomically

_HEADER = "onmanifold"


class Saved(NamedTuple):
    """What a file holds.

    Attributes:
        spec: What rebuilds the module; None: a module of somebody's own.
        metadata: What was saved beside it.
        weights: By name.
    """

    spec: dict[str, Any] | None
    metadata: dict[str, Any]
    weights: dict[str, Tensor]


def write_module(
    kind: str,
    module: nn.Module,
    path: str | Path,
    spec: Mapping[str, Any] | None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a module's weights and specification, atomically.

    Args:
        kind: What it is, such as "classifier": `read_module` of another kind refuses the file.
        module: Whose weights and buffers are written.
        path: The file, usually ``*.safetensors``.
        spec: What rebuilds the module, as plain data; None: nothing does.
        metadata: Anything JSON can hold.

    Raises:
        InputError: ``metadata`` holds what JSON cannot.
        DataError: The file could not be written; what was there before is left as it was.
    """
    # safetensors wants contiguous tensors that share no memory, and reads them back in any memory format.
    weights = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in module.state_dict().items()
    }
    header = {"kind": kind, "spec": spec or None, "metadata": dict(metadata or {})}
    # Under one key: the format keeps several in no order, and the same module would make different files.
    return write_atomically(path, safetensors.torch.save(weights, {_HEADER: _as_json(header)}))


def read_module(kind: str, path: str | Path, weights: bool = True) -> Saved:
    """Read what `write_module` wrote.

    Args:
        kind: What is expected.
        path: The file.
        weights: Whether to read the weights too.

    Raises:
        CheckpointError: The file is missing, truncated, or of another kind.
    """
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
    found = json.loads(header.get(_HEADER, "{}"))
    if found.get("kind") != kind:
        raise CheckpointError(f"{path} is a safetensors file, but not one of an onmanifold {kind}.")
    return Saved(found["spec"], found["metadata"], tensors)


def fill_module(module: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Load weights that must be the module's own.

    Args:
        module: Receives them.
        weights: By name.
        path: Where they come from, for the message.

    Raises:
        CheckpointError: One is missing, is too many, or has another shape; nothing was loaded.
    """
    expected = module.state_dict()
    missing, surplus = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    if missing or surplus:
        name, problem = (
            (min(missing), "lacks") if missing else (min(surplus), "has, beyond the model,")
        )
        raise CheckpointError(
            f"{path} is a checkpoint of another model: it {problem} the weight {name!r}."
        )
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path} is a checkpoint of another model: {name!r} has shape {tuple(weights[name].shape)}, "
                f"expected {tuple(tensor.shape)}."
            )
    module.load_state_dict(dict(weights))


def weights_digest(module: nn.Module) -> str:
    """A digest of a module's weights and buffers, names and shapes included."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _as_json(header: Mapping[str, Any]) -> str:
    try:
        return json.dumps(header)
    except TypeError as error:
        raise InputError(f"metadata: expected what JSON can hold ({error}).") from None
