"""Networks: images (B, C, H, W) in [0, 1] to logits (B, K), normalisation inside."""

from onmanifold.classifiers.checkpoint import load_classifier, read_metadata, save_classifier
from onmanifold.classifiers.discriminator import (
    Discriminator,
    load_discriminator,
    save_discriminator,
)
from onmanifold.classifiers.factory import build_classifier
from onmanifold.classifiers.layers import Classifier, Normalize

__all__ = [
    "Classifier",
    "Discriminator",
    "Normalize",
    "build_classifier",
    "load_classifier",
    "load_discriminator",
    "read_metadata",
    "save_classifier",
    "save_discriminator",
]
