"""Where finished batches are kept: a Parquet file each, in folders named by what produced them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from onmanifold.evaluation.digests import Digests
from onmanifold.evaluation.ledger import completed, read_table, write_table
from onmanifold.foundation.errors import DataError
from onmanifold.foundation.files import write_atomically

LEDGER = "ledger.parquet"
MANIFEST = "manifest.json"
_FORMAT = 2
_KEY = b"key"


def model_digest(model: nn.Module) -> str:
    """A digest of a model's structure, of all its weights and buffers, and of the settings of its modules.

    It is the same in every process, on any device, and in train and eval mode. Settings are the public attributes
    of modules: numbers, switches, functions with what they refer to, tensors, containers and objects of such.
    Attributes whose names begin with an underscore do not count; what a forward pass leaves behind belongs there.
    Nor does the code of classes.
    """
    return Digests().of(model)


def array_digest(*tensors: Tensor | None) -> str:
    """A digest of the values of CPU tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        if tensor is not None:
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).data)
    return digest.hexdigest()


def shard_key(facts: Mapping[str, Any]) -> str:
    """The name of the folder for what ``facts`` (JSON-able) produce."""
    text = json.dumps({"format": _FORMAT, **facts}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


class Shards:
    """The finished batches of one attack, or of the clean pass.

    The folder's name is a digest of dataset, model, attack, seed and batch size; so the shards of another
    model or of an edited attack are never met. Each file is whole or absent; one that is damaged nevertheless
    counts as absent, and its batch is computed again.
    """

    def __init__(self, directory: Path, key: str, images: bool = False) -> None:
        self.folder = directory / "shards" / key
        self.key = key
        self.images = images

    def read(self, batch: int, samples: Tensor) -> pa.Table | None:
        """The outcome of a batch, or None where it has to be computed."""
        try:
            table = read_table(self._path(batch, "parquet"))
            if self.images:
                saved_samples(self._path(batch, "safetensors"))
        except DataError:
            return None
        metadata = table.schema.metadata or {}
        whole = metadata.get(_KEY) == self.key.encode()
        if not whole or not np.array_equal(table["sample"].to_numpy(), samples.numpy()):
            return None
        return completed(table.replace_schema_metadata(None))

    def write(self, batch: int, table: pa.Table, images: Tensor | None = None) -> None:
        """Keep the outcome of a batch, and the attack's images (B, C, H, W) where they are wanted.

        Raises:
            DataError: The disk is full or the folder cannot be written.
        """
        if self.images and images is not None:
            tensors = {
                "images": images.detach().to("cpu", torch.float32).contiguous(),
                "sample": torch.from_numpy(table["sample"].to_numpy().copy()),
            }
            # Before the table: where the table is, the images are.
            write_atomically(self._path(batch, "safetensors"), safetensors.torch.save(tensors))
        write_table(self._path(batch, "parquet"), table.replace_schema_metadata({_KEY: self.key}))

    def read_images(self, batch: int) -> tuple[Tensor, Tensor]:
        """Saved images (B, C, H, W) float32 of a batch and their sample numbers (B,).

        Raises:
            DataError: They were not saved, or are damaged.
        """
        path = self._path(batch, "safetensors")
        return _load(path, "images"), saved_samples(path)

    def tidy(self) -> None:
        """Remove what an interrupted write left behind; only when no process writes any more."""
        for path in self.folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)

    def _path(self, batch: int, suffix: str) -> Path:
        return self.folder / f"{batch:06d}.{suffix}"


def saved_samples(path: Path) -> Tensor:
    """The sample numbers (B,) in a file of saved images.

    Raises:
        DataError: The file is missing, truncated or foreign.
    """
    return _load(path, "sample")


def _load(path: Path, name: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} holds no saved images, or is truncated ({error}).") from None
