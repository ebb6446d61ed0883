"""Decoded once: images as a memory-mapped uint8 array in a cache folder, whole or absent."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from onmanifold.data.locations import cache_folder
from onmanifold.foundation.errors import DataError
from onmanifold.foundation.files import write_atomically

# Images that a thread decodes before it asks for more work.
_PORTION = 512


def stamp(files: Sequence[Path], *extra: object) -> str:
    """A digest of files by folder, name, size and time of change, and of ``extra``: for this machine alone."""
    facts = [
        (file.parent.name, file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in files
    ]
    return hashlib.sha256(json.dumps([facts, *map(str, extra)]).encode()).hexdigest()[:16]


class Decoded(NamedTuple):
    """Images as a network takes them, bytes still.

    Attributes:
        images: (N, C, H, W) uint8.
        labels: (N,) int64.
        digest: Of both; the same on every machine, whatever became of the files.
    """

    images: Tensor
    labels: Tensor
    digest: str


def digest_of(images: Tensor, labels: Tensor) -> str:
    """A digest of images (N, C, H, W) uint8 and labels (N,) int64 by shape and values."""
    digest = hashlib.blake2b(repr(tuple(images.shape)).encode(), digest_size=8)
    for tensor in (images, labels):
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def cached(name: str, key: str, make: Callable[[], tuple[Tensor, Tensor]]) -> Decoded:
    """Images (N, C, H, W) uint8, memory-mapped, and labels (N,) int64; made and stored where absent.

    Args:
        name: Of the dataset, for the files' names.
        key: A digest of what they are made from.
        make: Makes both; called where the cache has nothing whole.

    Raises:
        DataError: The cache folder cannot be written.
    """
    images_file, labels_file, digest_file = (
        cache_folder() / f"{name}-{key}-{part}"
        for part in ("images.npy", "labels.npy", "digest.txt")
    )
    try:
        labels = torch.from_numpy(np.load(labels_file, allow_pickle=False))
        return Decoded(_map(images_file), labels, digest_file.read_text("ascii"))
    except (OSError, ValueError, EOFError):
        pass  # absent or damaged: made anew
    images, labels = make()
    digest = digest_of(images, labels)
    write_atomically(images_file, _writer(images))
    write_atomically(labels_file, _writer(labels))
    write_atomically(digest_file, digest.encode("ascii"))
    return Decoded(_map(images_file), labels, digest)


def _map(file: Path) -> Tensor:
    # Copy on write: torch wants a writable array, and nothing may reach the file.
    return torch.from_numpy(np.load(file, mmap_mode="c", allow_pickle=False))


def _writer(tensor: Tensor) -> Callable[[BinaryIO], object]:
    return lambda file: np.save(file, tensor.numpy(), allow_pickle=False)


def decode_all(
    encoded: Sequence[bytes | Path], mode: str, size: tuple[int, int] | None, source: str
) -> Tensor:
    """Decode image files in parallel.

    Args:
        encoded: The files' contents, or their paths.
        mode: "L" for grey, "RGB" for colour.
        size: (height, width) to resize to; None: all must be of the size of the first.
        source: Named in errors.

    Returns:
        (N, C, H, W) uint8.

    Raises:
        DataError: A file is no image or is truncated, or its size differs from the first one's.
    """
    if not encoded:
        raise DataError(f"{source} holds no images.")
    first = _decode(encoded[0], mode, size, source, 0)
    images = np.empty((len(encoded), *first.shape), dtype=np.uint8)

    def fill(start: int) -> None:
        for position in range(start, min(start + _PORTION, len(encoded))):
            image = _decode(encoded[position], mode, size, source, position)
            if image.shape != first.shape:
                raise DataError(
                    f"{source}: image {position} is {image.shape[1]}x{image.shape[2]}, the first "
                    f"{first.shape[1]}x{first.shape[2]}; give a size to resize to."
                )
            images[position] = image

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for _ in pool.map(fill, range(0, len(encoded), _PORTION)):
            pass
    return torch.from_numpy(images)


def _decode(
    item: bytes | Path, mode: str, size: tuple[int, int] | None, source: str, position: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    try:
        with Image.open(io.BytesIO(item) if isinstance(item, bytes) else item) as opened:
            image = opened.convert(mode)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, AttributeError) as error:
        place = item if isinstance(item, Path) else f"image {position} of {source}"
        raise DataError(f"{place} is not a readable image, or is truncated ({error}).") from None
    if size is not None and image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
