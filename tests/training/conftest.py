"""A small problem: 8x8 images whose class is where the bright patch lies."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from onmanifold.data.dataset import Dataset
from onmanifold.manifolds.base import Manifold


def make_dataset(count=120, seed=0, codes=False):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    images = torch.randint(0, 120, (count, 1, 8, 8), generator=generator)
    for number, label in enumerate(labels.tolist()):
        images[number, 0, 2:6, 3 * label : 3 * label + 2] += 130
    return Dataset(
        name="toy",
        images=images.to(torch.uint8),
        labels=labels,
        classes=("left", "middle", "right"),
        codes=torch.rand(count, 3, generator=generator) - 0.5 if codes else None,
        indices=torch.arange(count) + 1000,
        fingerprint=f"toy-{count}-{seed}-{codes}",
    )


class Tint(Manifold):
    """Images of one brightness per third of the picture; enough of a manifold to test with."""

    name = "tint"
    code_size = 3
    latent_size = 3
    image_shape = (1, 8, 8)

    @property
    def fingerprint(self):
        return "tint"

    def encode(self, images, labels):
        return (
            torch.stack([part.mean((1, 2, 3)) for part in images.tensor_split(3, dim=3)], 1) - 0.5
        )

    def decode(self, codes):
        parts = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
        return torch.sigmoid(4 * codes[:, parts]).view(-1, 1, 1, 8).expand(-1, 1, 8, 8)


def make_network(seed=0, batch_norm=True):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        norm = nn.BatchNorm2d(4) if batch_norm else nn.Identity()
        first, second = nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        return nn.Sequential(
            first, norm, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
        )


@pytest.fixture
def dataset():
    return make_dataset()


@pytest.fixture
def coded():
    return make_dataset(codes=True)


@pytest.fixture
def network():
    return make_network()


@pytest.fixture
def tint():
    return Tint()


@pytest.fixture
def fresh_network():
    return make_network


@pytest.fixture
def fresh_dataset():
    return make_dataset
