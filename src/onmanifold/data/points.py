"""Points of the plane as images of two pixels: two moons and mixtures of Gaussians, which can be drawn whole."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from onmanifold.data.dataset import Dataset
from onmanifold.data.sources import Split
from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.randomness import normal, uniform
from onmanifold.foundation.registry import DATASETS

# The side of the square of the plane, around the middle of the data, that [0, 1] x [0, 1] shows. What lies outside
# comes to its edge.
SIDE = 4.0


@DATASETS.register("two_moons")
def load_two_moons(split: Split, size: int = 2000, noise: float = 0.1, seed: int = 0) -> Dataset:
    """Two half circles of radius 1 that reach into each other, as images of the two pixels (x, y).

    One is (cos t, sin t), the other (1 - cos t, 1/2 - sin t), t uniform in [0, π]. A length of 1 is a quarter of
    the pixels' range, the point (1/2, 1/4) its middle. Every second point is of the other class.

    Args:
        split: "train" or "test", of which the points are others.
        size: Number of points.
        noise: Standard deviation of each coordinate, in radii of the half circles.
        seed: Which points.

    Raises:
        ConfigError: A number out of its range.
    """
    _check(size=size, noise=noise)
    indices = torch.arange(size)
    stream = f"two moons {split}"
    angles = math.pi * uniform(seed, indices, stream=f"{stream}, angles", dtype=torch.float64)
    labels = indices % 2
    places = moon(angles, labels)
    places = places + noise * normal(seed, indices, (2,), stream=stream, dtype=torch.float64)
    middle = torch.tensor([0.5, 0.25], dtype=torch.float64)
    facts = (split, size, noise, seed)
    return _dataset("two_moons", places - middle, labels, ("upper moon", "lower moon"), facts)


@DATASETS.register("blobs")
def load_blobs(
    split: Split,
    size: int = 2000,
    classes: int = 2,
    components: int = 1,
    deviation: float = 0.25,
    seed: int = 0,
) -> Dataset:
    """A mixture of round Gaussians for each class, as images of the two pixels (x, y).

    The means are evenly on a circle of radius 1, of the classes in turn: two classes of two components lie
    crosswise. A length of 1 is a quarter of the pixels' range, the middle of the circle its middle.

    Args:
        split: "train" or "test", of which the points are others.
        size: Number of points.
        classes: K.
        components: Gaussians of each class.
        deviation: Standard deviation of each coordinate, in radii of the circle.
        seed: Which points.

    Raises:
        ConfigError: A number out of its range.
    """
    _check(size=size, classes=classes, components=components, deviation=deviation)
    indices = torch.arange(size)
    # In turn, so that the first points are of all classes and components.
    component = indices % (classes * components)
    angles = 2 * math.pi * component.double() / (classes * components)
    places = torch.stack([angles.cos(), angles.sin()], dim=1)
    noise = normal(seed, indices, (2,), stream=f"blobs {split}", dtype=torch.float64)
    names = tuple(f"class {number}" for number in range(classes))
    facts = (split, size, classes, components, deviation, seed)
    return _dataset("blobs", places + deviation * noise, component % classes, names, facts)


def moon(angles: Tensor, labels: Tensor) -> Tensor:
    """The points (N, 2) of the half circles at angles (N,) in [0, π], of classes (N,) 0 or 1, without noise."""
    upper = torch.stack([angles.cos(), angles.sin()], dim=1)
    lower = torch.stack([1 - angles.cos(), 0.5 - angles.sin()], dim=1)
    return torch.where(labels.unsqueeze(1) == 0, upper, lower)


def _dataset(
    name: str, places: Tensor, labels: Tensor, classes: tuple[str, ...], facts: tuple[object, ...]
) -> Dataset:
    """Points (N, 2) around (0, 0) as images (N, 1, 1, 2)."""
    images = (0.5 + places / SIDE).clamp(0, 1).float().view(-1, 1, 1, 2)
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    return Dataset(name, images, labels, classes, f"{name}-{facts[0]}-{digest}")


def _check(**numbers: float) -> None:
    for name, value in numbers.items():
        least = 0 if name in ("noise", "deviation") else 1
        if not least <= value < float("inf"):
            raise ConfigError(f"{name}: expected a finite number >= {least}, found {value}.")
