"""The official files of CIFAR-10-C and CIFAR-100-C, where the user has them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from onmanifold.data.cache import digest_of
from onmanifold.data.corruptions import CORRUPTIONS, SEVERITIES, check_severity
from onmanifold.data.dataset import Dataset
from onmanifold.data.locations import data_folder
from onmanifold.data.sources import SOURCES, Split
from onmanifold.foundation.errors import ConfigError, DataError, InputError
from onmanifold.foundation.registry import DATASETS, nearest

EXTRA_CORRUPTIONS = ("gaussian_blur", "saturate", "spatter", "speckle_noise")
"""Official files beyond the fifteen, meant for validation."""


@DATASETS.register("cifar10_c")
def load_cifar10_c(split: Split, corruption: str, severity: int) -> Dataset:
    """CIFAR-10-C: the official corrupted test images of CIFAR-10, from ``$ONMANIFOLD_DATA/cifar10_c/*.npy``.

    Args:
        split: "test"; there is no other.
        corruption: One of the fifteen, or of the four extra ones: the name of the file.
        severity: 1 to 5.

    Raises:
        ConfigError: The train split.
        InputError: Unknown corruption or severity.
        DataError: A file is missing, truncated or foreign.
    """
    return _load("cifar10", "CIFAR-10-C", "2535967", split, corruption, severity)


@DATASETS.register("cifar100_c")
def load_cifar100_c(split: Split, corruption: str, severity: int) -> Dataset:
    """CIFAR-100-C: the official corrupted test images of CIFAR-100, from ``$ONMANIFOLD_DATA/cifar100_c/*.npy``.

    Arguments and errors as for `load_cifar10_c`.
    """
    return _load("cifar100", "CIFAR-100-C", "3555552", split, corruption, severity)


def _load(
    clean: str, archive: str, record: str, split: Split, corruption: str, severity: int
) -> Dataset:
    name = f"{clean}_c"
    if split != "test":
        raise ConfigError(f"{name}: split: expected 'test', the only one it has, found {split!r}.")
    known = (*CORRUPTIONS, *EXTRA_CORRUPTIONS)
    if corruption not in known:
        raise InputError(f"corruption: unknown name {corruption!r}.{nearest(corruption, known)}")
    check_severity(severity)
    folder = _folder(name, archive)
    images_file, labels_file = folder / f"{corruption}.npy", folder / "labels.npy"
    for file in (images_file, labels_file):
        if not file.is_file():
            raise DataError(
                f"Dataset {name!r}: {file} does not exist. To get it, download {archive}.tar from "
                f"https://zenodo.org/records/{record} and unpack it into the folder {name} under "
                "$ONMANIFOLD_DATA; or make similar images with onmanifold.corrupted."
            )
    images, labels = _read(images_file), _read(labels_file)
    _check(images_file, images, labels_file, labels, len(SOURCES[clean].classes))
    count = len(images) // len(SEVERITIES)
    part = slice((severity - 1) * count, severity * count)
    # Copied, and so all read now: a file that is damaged is met here, and not in the middle of an evaluation.
    pixels = np.array(images[part].transpose(0, 3, 1, 2), order="C")
    tensors = torch.from_numpy(pixels), torch.from_numpy(labels[part].astype(np.int64))
    return Dataset(
        f"{name} {corruption} {severity}",
        *tensors,
        SOURCES[clean].classes,
        f"{name}-{corruption}-{severity}-{digest_of(*tensors)}",
    )


def _folder(name: str, archive: str) -> Path:
    """Where the files lie: in the dataset's folder, or where the archive was unpacked in it."""
    folder = (data_folder() or Path("$ONMANIFOLD_DATA")) / name
    unpacked = folder / archive
    return unpacked if unpacked.is_dir() else folder


def _read(file: Path) -> npt.NDArray[np.uint8]:
    try:
        array: npt.NDArray[np.uint8] = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{file} is not a NumPy file, or is truncated ({error}).") from None
    return array


def _check(
    images_file: Path,
    images: npt.NDArray[np.uint8],
    labels_file: Path,
    labels: npt.NDArray[np.uint8],
    classes: int,
) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (32, 32, 3):
        raise DataError(
            f"{images_file}: expected images (N, 32, 32, 3) uint8, found {images.shape} "
            f"{images.dtype}."
        )
    if not len(images) or len(images) % len(SEVERITIES):
        raise DataError(
            f"{images_file}: expected as many images for each of {len(SEVERITIES)} severities, "
            f"found {len(images)} in all."
        )
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise DataError(
            f"{labels_file}: expected {len(images)} whole numbers, one per image, found "
            f"{labels.shape} {labels.dtype}."
        )
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise DataError(
            f"{labels_file}: holds labels {int(labels.min())} to {int(labels.max())}, expected 0 "
            f"to {classes - 1}."
        )
