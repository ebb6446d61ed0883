"""Networks: images (B, C, H, W) in [0, 1] to logits (B, K), normalisation inside."""

from onmanifold.classifiers.checkpoint import load_classifier, read_metadata, save_classifier
from onmanifold.classifiers.factory import build_classifier
from onmanifold.classifiers.layers import Classifier, Normalize

__all__ = [
    "Classifier",
    "Normalize",
    "build_classifier",
    "load_classifier",
    "read_metadata",
    "save_classifier",
]
