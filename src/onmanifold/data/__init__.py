"""Datasets: Parquet files and folders of images, decoded once; augmentation; corruptions; letters from fonts."""

from onmanifold.data import corruption_files as corruption_files  # registers its datasets
from onmanifold.data import points as points  # registers its datasets
from onmanifold.data.augment import Augmentation
from onmanifold.data.corruptions import CORRUPTIONS, corrupt, corrupted
from onmanifold.data.dataset import Batch, Dataset
from onmanifold.data.on_manifold import beside
from onmanifold.data.sources import load_dataset

__all__ = [
    "CORRUPTIONS",
    "Augmentation",
    "Batch",
    "Dataset",
    "beside",
    "corrupt",
    "corrupted",
    "load_dataset",
]
