"""Where datasets come from: Parquet files as the Hugging Face hub serves them, and folders of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from onmanifold.data.cache import cached, decode_all, stamp
from onmanifold.data.dataset import Dataset
from onmanifold.data.locations import data_folder
from onmanifold.foundation.errors import ConfigError, DataError
from onmanifold.foundation.randomness import permutation
from onmanifold.foundation.registry import DATASETS, Context, build_component

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Source:
    """A dataset in Parquet files.

    Attributes:
        repository: On the Hugging Face hub.
        classes: Names of the classes.
        mode: "L" for grey images, "RGB" for colour.
        image: Column of the images.
        label: Column of the labels.
        size: (height, width) to resize to; None: as they are.
        prefix: Folder of the files on the hub, where there are several configurations.
        transposed: Whether rows and columns are swapped in the files.
    """

    repository: str
    classes: tuple[str, ...]
    mode: str = "RGB"
    image: str = "image"
    label: str = "label"
    size: tuple[int, int] | None = None
    prefix: str = ""
    transposed: bool = False


_DIGITS = tuple("0123456789")
_GARMENTS = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat")
_FOOTWEAR = ("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_THINGS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

SOURCES = {
    "mnist": Source("ylecun/mnist", _DIGITS, mode="L"),
    "fashion_mnist": Source("zalando-datasets/fashion_mnist", (*_GARMENTS, *_FOOTWEAR), mode="L"),
    # The letters lie on their side there, as in the original files.
    "emnist": Source(
        "tanganke/emnist_letters", tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), mode="L", transposed=True
    ),
    "cifar10": Source("uoft-cs/cifar10", _THINGS, image="img"),
    "cifar100": Source(
        "uoft-cs/cifar100", tuple(f"class {i}" for i in range(100)), image="img", label="fine_label"
    ),
    "svhn": Source("ufldl-stanford/svhn", _DIGITS, prefix="cropped_digits/"),
    "celeba": Source("flwrlabs/celeba", ("Female", "Male"), label="Male", size=(56, 48)),
}


def load_dataset(name: str, split: str = "test", **options: Any) -> Dataset:
    """Load a dataset, decoded once into a memory-mapped cache.

    It is looked for as ``$ONMANIFOLD_DATA/<name>/<split>-*.parquet``, else fetched from the Hugging Face hub.

    Args:
        name: "fashion_mnist", "mnist", "emnist", "cifar10", "cifar100", "svhn", "celeba", "imagefolder",
            "fonts", "cifar10_c", "cifar100_c", or points of the plane: "two_moons", "blobs".
        split: "train" or "test".
        options: The dataset's own, such as ``size`` and ``seed`` of "fonts", ``folder`` of "imagefolder", or
            ``corruption`` and ``severity`` of "cifar10_c".

    Raises:
        ConfigError: Unknown name, split or option.
        DataError: The files are missing, truncated or foreign.
    """
    if split not in ("train", "test"):
        raise ConfigError(f"split: expected 'train' or 'test', found {split!r}.")
    maker = DATASETS.get(name)
    values = {"split": split, **options}
    return cast(Dataset, build_component(maker, values, Context(), f"dataset {name!r}"))


def _register(name: str, source: Source) -> Callable[[Split], Dataset]:
    def load(split: Split) -> Dataset:
        return _load_parquet(name, source, split)

    load.__doc__ = f"{source.repository}, {source.mode} images, {len(source.classes)} classes."
    load.__qualname__ = f"load_{name}"
    return DATASETS.register(name)(load)


for _name, _source in SOURCES.items():
    _register(_name, _source)


def _load_parquet(name: str, source: Source, split: Split) -> Dataset:
    files = _find(name, source, split)

    def decode() -> tuple[Tensor, Tensor]:
        # File by file: the compressed images of one at a time are in memory.
        parts = [_decode_file(file, source) for file in files]
        shapes = {tuple(images.shape[1:]) for images, _ in parts}
        if len(shapes) > 1:
            raise DataError(f"{name} ({split}): the files hold images of sizes {sorted(shapes)}.")
        return torch.cat([images for images, _ in parts]), torch.cat(
            [labels for _, labels in parts]
        )

    images, labels, digest = cached(f"{name}-{split}", stamp(files, source), decode)
    low, high = int(labels.min()), int(labels.max())
    if low == 1 and high == len(source.classes):
        # The letters of EMNIST are numbered from 1.
        labels, low, high = labels - 1, 0, high - 1
    if low < 0 or high >= len(source.classes):
        raise DataError(
            f"{files[0]}: column {source.label!r} holds labels {low} to {high}, expected 0 to "
            f"{len(source.classes) - 1}."
        )
    return Dataset(name, images, labels, source.classes, f"{name}-{split}-{digest}")


def _decode_file(file: Path, source: Source) -> tuple[Tensor, Tensor]:
    table = _read(file, source)
    try:
        encoded = [item["bytes"] for item in table.column(0).to_pylist()]
        labels = torch.tensor(table.column(1).to_pylist(), dtype=torch.int64)
    except (TypeError, KeyError, ValueError):
        raise DataError(
            f"{file}: expected the bytes of an image and a whole number in every row, found "
            f"{table.schema.field(0).type} and {table.schema.field(1).type}."
        ) from None
    images = decode_all(encoded, source.mode, source.size, str(file))
    return images.transpose(2, 3).contiguous() if source.transposed else images, labels


def _find(name: str, source: Source, split: Split) -> list[Path]:
    """The Parquet files of a split: in the data folder, else from the hub."""
    root = data_folder() or Path("$ONMANIFOLD_DATA")
    files = sorted((root / name).glob(f"{split}-*.parquet"))
    if files:
        return files
    looked_for = root / name / f"{split}-*.parquet"
    try:
        return _fetch(source, split)
    except Exception as error:  # the hub fails in many ways: no network, no such file, no package
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"Dataset {name!r}: looked for {looked_for}, found nothing there; then asked the Hugging Face "
            f"hub for {source.repository}, in vain ({reason}). To get it, download the Parquet files of "
            f"https://huggingface.co/datasets/{source.repository} into that folder, and set ONMANIFOLD_DATA "
            "to the folder above it."
        ) from None


def _fetch(source: Source, split: Split) -> list[Path]:
    from huggingface_hub import HfApi, hf_hub_download

    # Asked in this way, an unreachable hub is an error at once and not after half a minute of attempts.
    siblings = HfApi().dataset_info(source.repository, timeout=10).siblings or []
    names = [sibling.rfilename for sibling in siblings]
    wanted = [
        file
        for file in sorted(names)
        if file.endswith(".parquet")
        and source.prefix in file
        and file.rpartition("/")[2].startswith(f"{split}-")
    ]
    if not wanted:
        raise FileNotFoundError(f"no {split}-*.parquet in {source.repository}")
    return [Path(hf_hub_download(source.repository, file, repo_type="dataset")) for file in wanted]


def _read(file: Path, source: Source) -> Any:
    """The image and the label column of a Parquet file."""
    try:
        names = pq.read_schema(file).names
        image = source.image if source.image in names else "image"
        label = source.label if source.label in names else "label"
        missing = {image, label} - set(names)
        if missing:
            raise DataError(
                f"{file}: has no column {sorted(missing)[0]!r}, only {', '.join(names)}."
            )
        return pq.read_table(file, columns=[image, label]).rename_columns(["image", "label"])
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file} is not a Parquet file, or is truncated ({str(error).splitlines()[0]})."
        ) from None


_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


@DATASETS.register("imagefolder")
def load_image_folder(
    split: Split, folder: str, size: tuple[int, int] | None = None, grey: bool = False
) -> Dataset:
    """A folder of images, one sub-folder per class: ``folder/<split>/<class>/*.png``.

    Args:
        split: Sub-folder of ``folder``. Where there is neither "train" nor "test", ``folder`` itself holds the
            classes and is the test split; nothing is trained on images that are tested on.
        folder: Where the images are.
        size: (height, width) to resize to; None: all must have the same size.
        grey: One channel in place of three.

    Raises:
        DataError: No such folder, no class, no image, or one that cannot be read.
    """
    root = Path(folder).expanduser()
    if split == "train" or any((root / part).is_dir() for part in ("train", "test")):
        root = root / split
    classes = (
        sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
    )
    if not classes:
        raise DataError(f"imagefolder: looked for class folders in {root}, found none.")
    files: list[Path] = []
    numbers: list[int] = []
    for number, name in enumerate(classes):
        found = _images_in(root / name)
        files += found
        numbers += [number] * len(found)
    # In an order of its own, so that the first images of a set are of all classes.
    order = permutation(0, len(files), stream="imagefolder").tolist()
    files, numbers = [files[i] for i in order], [numbers[i] for i in order]
    if not files:
        raise DataError(f"imagefolder: {root} holds no image ({', '.join(_ENDINGS)}).")
    images, labels, digest = cached(
        f"imagefolder-{split}",
        stamp(files, root, size, grey),
        lambda: (
            decode_all(files, "L" if grey else "RGB", size, str(root)),
            torch.tensor(numbers, dtype=torch.int64),
        ),
    )
    return Dataset(root.name, images, labels, tuple(classes), f"imagefolder-{split}-{digest}")


def _images_in(folder: Path) -> Sequence[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in _ENDINGS)
