"""The manifest of an on-manifold dataset: what produced its files, and so whose a folder is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onmanifold.data.dataset import Dataset
from onmanifold.foundation.differences import first_difference
from onmanifold.foundation.errors import DataError
from onmanifold.foundation.files import read_json

MANIFEST = "manifest.json"
_KIND = "on-manifold dataset"
_FORMAT = 1
# Images that are read at once for the digest of a dataset.
_PORTION = 512


def content_of(dataset: Dataset) -> dict[str, Any]:
    """What a dataset holds, not when its files were written: they may be copied without harm."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in (dataset.labels, dataset.indices):
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).data)
    for positions in torch.split(torch.arange(len(dataset)), _PORTION):
        # Pixels as they are stored take a quarter of the time.
        plain = not dataset.transforms
        images = dataset.images[positions] if plain else dataset.batch(positions).images
        digest.update(str(images.dtype).encode())
        digest.update(np.ascontiguousarray(images.cpu().numpy()).data)
    return {
        "name": dataset.name,
        "samples": len(dataset),
        "image_shape": dataset.image_shape,
        "classes": dataset.classes,
        "digest": digest.hexdigest(),
    }


def key_of(facts: Mapping[str, Any]) -> str:
    """A digest of ``facts``, by which files say what they belong to."""
    text = json.dumps({"format": _FORMAT, **facts}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def claim(folder: Path, split: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The folder's manifest with a split in it, to be written there.

    Args:
        folder: Of the on-manifold dataset; it may not exist yet.
        split: "train" or "test".
        facts: All that the rows of the split depend on; ``facts["manifold"]`` is the same for both splits.

    Raises:
        DataError: The folder holds another projection, or something else.
    """
    path = folder / MANIFEST
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file; expected a folder for the on-manifold dataset.")
    if not path.exists():
        stranger = next(iter(sorted(folder.glob("*.parquet"))), None)
        if stranger is not None:
            raise DataError(
                f"{folder} holds {stranger.name}, but no {MANIFEST} of an on-manifold dataset; nothing there "
                "is overwritten. Choose another folder."
            )
        return {"kind": _KIND, "format": _FORMAT, "splits": {split: dict(facts)}}
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("kind") != _KIND:
        raise DataError(
            f"{path} is not the manifest of an on-manifold dataset. Choose another folder."
        )
    plain = json.loads(json.dumps(facts))
    # A projection that failed before it finished a file has no claim to the folder.
    splits = {
        name: known
        for name, known in manifest["splits"].items()
        if any(folder.glob(f"{name}-*.parquet"))
    }
    for name, known in splits.items():
        # The splits share the manifold; all else is a split's own.
        shared = plain.keys() if name == split else {"manifold"}
        before, after = ({key: facts.get(key) for key in shared} for facts in (known, plain))
        if before != after:
            place, was, now = first_difference(before, after)
            raise DataError(
                f"{folder} belongs to another projection: {place} of {name} was {was}, now it is {now}. "
                "Choose another folder, or delete this one to start anew."
            )
    return {**manifest, "splits": splits | {split: plain}}
