"""The images that a specification asks for."""

from __future__ import annotations

from typing import Any

from onmanifold.data import Dataset, load_dataset
from onmanifold.data.fonts import embedded_folder
from onmanifold.experiments.spec import DatasetSpec
from onmanifold.foundation.errors import ConfigError


def dataset_options(spec: DatasetSpec) -> dict[str, Any]:
    """The dataset's own options; the fonts' folder "embedded" is that of the fonts inside matplotlib."""
    options = dict(spec.options)
    if spec.type == "fonts" and options.get("folder") == "embedded":
        options["folder"] = str(embedded_folder())
    return options


def load_split(spec: DatasetSpec, split: str) -> Dataset:
    """The training or test images that a specification asks for.

    Raises:
        ConfigError: There are fewer images than asked for, or an option is wrong.
        DataError: The data is missing or damaged.
    """
    size = spec.train if split == "train" else spec.test
    if spec.type == "fonts":
        sized = {} if size is None else {"size": size}
        return load_dataset(spec.type, split, **sized, **dataset_options(spec))
    dataset = load_dataset(spec.type, split, **dataset_options(spec))
    if size is not None and size > len(dataset):
        raise ConfigError(
            f"dataset.{split}: {spec.type} has {len(dataset)} images, {size} are asked for."
        )
    return dataset if size is None else dataset.take(size)
