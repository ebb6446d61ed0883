"""The state of a training on disk: one safetensors file, tensors beside JSON, nothing pickled."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from onmanifold.foundation.differences import first_difference
from onmanifold.foundation.errors import CheckpointError
from onmanifold.foundation.files import write_atomically

_KIND = "onmanifold training"


@dataclass(frozen=True)
class Checkpoint:
    """A training at rest.

    Attributes:
        identity: What determines the training; a checkpoint serves only the run that it came from.
        progress: Where the training stands: plain data.
        tensors: All weights and states, by name.
    """

    identity: Mapping[str, Any]
    progress: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def write(self, path: str | Path) -> None:
        """Write the file; at any moment it is the old one or the new one.

        Raises:
            DataError: It could not be written; the old file is left as it was.
        """
        tensors = {
            name: tensor.detach().cpu().contiguous().clone()
            for name, tensor in self.tensors.items()
        }
        header = {"identity": self.identity, "progress": self.progress}
        # Under one key: the format keeps several in no order, and the same state would make different files.
        write_atomically(path, safetensors.torch.save(tensors, {_KIND: json.dumps(header)}))

    @classmethod
    def read(cls, path: str | Path) -> Checkpoint:
        """Read a file that `write` made.

        Raises:
            CheckpointError: The file is truncated, or no training checkpoint.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is no safetensors file, or is truncated ({error}). Delete it to start the training anew."
            ) from None
        if _KIND not in header:
            raise CheckpointError(f"{path} is a safetensors file, but no checkpoint of a training.")
        found = json.loads(header[_KIND])
        return cls(found["identity"], found["progress"], tensors)

    def check_identity(self, identity: Mapping[str, Any], path: str | Path) -> None:
        """Check that the checkpoint belongs to this run.

        Raises:
            CheckpointError: It does not; the message names the first difference.
        """
        expected = json.loads(json.dumps(identity))
        if self.identity == expected:
            return
        place, found, wanted = first_difference(self.identity, expected)
        raise CheckpointError(
            f"{path} belongs to another training: {place} was {found}, now it is {wanted}. "
            "Choose another directory, or delete this one to start anew."
        )


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under ``prefix/name``."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those tensors that stand under ``prefix``, by their own names."""
    start = f"{prefix}/"
    return {
        name.removeprefix(start): tensor
        for name, tensor in tensors.items()
        if name.startswith(start)
    }


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of SGD or Adam by ``number/entry``; what is in the groups comes from the configuration."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}/{entry}": value
        for number, entries in state.items()
        for entry, value in entries.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` took; the parameters are those of the optimizer, in its order."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, entry = name.split("/")
        parameter = parameters[int(number)]
        if tensor.shape == parameter.shape:
            # Fused optimizers walk through memory: moments must lie in the memory format of their weights.
            tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
        state.setdefault(int(number), {})[entry] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def restore_module(module: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Load a module's weights.

    Raises:
        CheckpointError: They are those of another architecture.
    """
    try:
        module.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise CheckpointError(f"{path} is a checkpoint of another model: {error}") from error
