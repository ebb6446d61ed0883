"""Datasets: Parquet files and folders of images, decoded once; augmentation; letters rendered from fonts."""

from onmanifold.data.augment import Augmentation
from onmanifold.data.dataset import Batch, Dataset
from onmanifold.data.sources import load_dataset

__all__ = ["Augmentation", "Batch", "Dataset", "load_dataset"]
