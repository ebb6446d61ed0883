"""On-manifold datasets: generated images with their codes, the originals and the labels (DMAT section 3)."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from onmanifold.data.cache import cached, decode_all
from onmanifold.data.dataset import Dataset, as_floats
from onmanifold.data.on_manifold_files import (
    Header,
    read_shard,
    shards_of,
)
from onmanifold.data.sources import Split
from onmanifold.foundation.errors import DataError, InputError
from onmanifold.foundation.modules import device_of, dtype_of, frozen
from onmanifold.foundation.registry import DATASETS, MANIFOLDS

MANIFOLD_FILE = "manifold.safetensors"
"""The manifold of an on-manifold dataset, in the folder of its Parquet files."""

_NAMES = {
    "generated": "{dataset} on {manifold}",
    "png": "{dataset} on {manifold}, 8 bit",
    "original": "{dataset}, codes on {manifold}",
}
# Codes that are decoded at once.
_PORTION = 256


@DATASETS.register("on_manifold")
def load_on_manifold(
    split: Split,
    folder: str | Path,
    images: Literal["generated", "png", "original"] = "generated",
    manifold: Any = None,
) -> Dataset:
    """Images projected onto a manifold, with codes, as `project_dataset` wrote them.

    Args:
        split: "train" or "test".
        folder: Where its files are.
        images: "generated": ``decode(code)`` in float32, so that a code is exactly that of its image; needs the
            manifold, and is made once. "png": the same rounded to 8 bits, which needs no manifold. "original":
            the images that were projected (DMAT section 5.4); the codes are those of their projections, as the
            name of the dataset says.
        manifold: For "generated": the manifold, its specification, or the file it is saved in; None:
            ``manifold.safetensors`` in the folder.

    Raises:
        DataError: Files are missing, truncated, damaged or foreign, or the manifold is another one.
    """
    root = Path(folder).expanduser()
    files = shards_of(root, split)
    shards = [read_shard(file, pictures=False) for file in files]
    header = shards[0].header
    for file, shard in zip(files, shards, strict=True):
        if shard.header.key != header.key:
            raise DataError(f"{file} belongs to another projection than {files[0].name} does.")
    labels = torch.cat([shard.labels for shard in shards])
    codes = torch.cat([shard.codes for shard in shards])
    texts = [header.key, *(shard.header.rows + shard.header.pictures for shard in shards)]
    digest = hashlib.blake2b(" ".join(texts).encode(), digest_size=8).hexdigest()
    # Looked at also where the images are cached: another manifold is an error.
    given = None if manifold is None else _generator(root, manifold, header)

    def make() -> tuple[Tensor, Tensor]:
        if images == "generated":
            generator = _generator(root, None, header) if given is None else given
            return _decode(generator, codes), labels
        return _pictures(files, images), labels

    pixels = cached(f"on_manifold-{split}-{images}", digest, make).images
    return Dataset(
        name=_NAMES[images].format(dataset=header.dataset, manifold=header.manifold),
        images=pixels,
        labels=labels,
        classes=header.classes,
        fingerprint=f"on_manifold-{split}-{images}-{digest}",
        codes=codes,
        indices=torch.cat([shard.indices for shard in shards]),
    )


def beside(generated: Dataset, natural: Dataset) -> Dataset:
    """The generated images and the natural ones beside them, for training or testing on both (DMAT 5.4).

    They stand in turns: sample i of the one and of the other are the samples 2 i and 2 i + 1 of the result,
    in position and in identity. A natural image has the code of its projection. Where images are to be held
    out, hold them out first: else a picture is trained on and its like is held out.

    Args:
        generated: `load_on_manifold` with "generated" or "png".
        natural: The same samples with "original".

    Raises:
        InputError: Not the same samples, labels, classes or sizes, or one has no codes.
    """
    for what, same in (
        ("shape of images", generated.image_shape == natural.image_shape),
        ("classes", generated.classes == natural.classes),
        ("samples", torch.equal(generated.indices, natural.indices)),
        ("labels", torch.equal(generated.labels, natural.labels)),
    ):
        if not same:
            raise InputError(f"natural: expected the same {what} as the generated images have.")
    if generated.codes is None or natural.codes is None:
        raise InputError("beside: expected codes with both, found none with one of them.")
    if generated.transforms or natural.transforms:
        raise InputError("beside: expected datasets without transforms; add them to the result.")
    if generated.images.dtype == natural.images.dtype:
        pair = (generated.images, natural.images)
    else:
        pair = (as_floats(generated.images), as_floats(natural.images))
    text = f"{generated.fingerprint} beside {natural.fingerprint}"
    return Dataset(
        name=f"{generated.name} beside {natural.name}",
        images=_in_turns(*pair),
        labels=_in_turns(generated.labels, natural.labels),
        classes=generated.classes,
        fingerprint=f"beside-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}",
        codes=_in_turns(generated.codes, natural.codes),
        indices=_in_turns(2 * generated.indices, 2 * natural.indices + 1),
    )


def _in_turns(first: Tensor, second: Tensor) -> Tensor:
    return torch.stack([first, second], dim=1).flatten(0, 1)


def _pictures(files: Sequence[Path], images: str) -> Tensor:
    """(N, C, H, W) uint8, file by file."""
    parts = []
    for file in files:
        shard = read_shard(file)
        chosen = shard.images if images == "png" else shard.originals
        with Image.open(io.BytesIO(chosen[0])) as first:
            mode = first.mode
        parts.append(decode_all(chosen, mode, None, str(file)))
    return torch.cat(parts)


def _generator(root: Path, manifold: Any, header: Header) -> Any:
    """The manifold that decodes the codes, checked to be the one that they are of."""
    if manifold is None:
        manifold = root / MANIFOLD_FILE
        if not manifold.is_file():
            raise DataError(
                f"{manifold} does not exist, and images='generated' needs the manifold: pass it, or ask for "
                "images='png', the same images rounded to 8 bits."
            )
    if isinstance(manifold, str | Path):
        manifold = {"type": "saved", "path": str(manifold)}
    built = MANIFOLDS.build(manifold)
    if built.fingerprint != header.fingerprint:
        raise DataError(
            f"{root} holds codes of the manifold {header.fingerprint}; this one is {built.fingerprint}."
        )
    return built


@torch.no_grad()
def _decode(manifold: Any, codes: Tensor) -> Tensor:
    """(N, C, H, W) float32 on the CPU: what the manifold makes of the codes, on its own device."""
    place = device_of(manifold), dtype_of(manifold)
    images = torch.empty(len(codes), *manifold.image_shape)
    with frozen(manifold):
        for start in range(0, len(codes), _PORTION):
            part = slice(start, start + _PORTION)
            images[part] = manifold.decode(codes[part].to(*place)).to(images)
    return images
