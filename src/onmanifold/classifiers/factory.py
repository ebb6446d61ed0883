"""Building a classifier by name, its weights by seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Imported for their registrations.
from onmanifold.classifiers import plain, residual  # noqa: F401
from onmanifold.classifiers.layers import Classifier
from onmanifold.foundation.building import build_seeded
from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.registry import CLASSIFIERS


def build_classifier(
    name: str | Mapping[str, Any],
    num_classes: int = 10,
    image_shape: tuple[int, int, int] = (3, 32, 32),
    seed: int | None = None,
    **options: Any,
) -> Classifier:
    """Build a registered network; its initial weights depend on the seed alone.

    The global random state is left as it was found, and has no influence.

    Args:
        name: "conv_net", "mlp", "lenet5", "vgg_small", "resnet13", "resnet18", "resnet32",
            "resnet50" or "wide_resnet"; or a specification ``{"type": name, ...}``, as in an
            experiment file or in ``classifier.spec``, whose values win over the other arguments.
        num_classes: K, the number of logits.
        image_shape: (C, H, W) of the images it will see.
        seed: Of the initial weights; None: a fresh one. ``classifier.spec`` says which it was.
        options: The network's own, such as ``width``; all take ``mean`` and ``std``.

    Returns:
        The classifier, in train mode, float32, on the CPU.

    Raises:
        ConfigError: Unknown name or option (the nearest valid one is named), or a wrong value.

    >>> import torch
    >>> classifier = build_classifier("mlp", num_classes=3, image_shape=(1, 8, 8), seed=0)
    >>> classifier(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 3])
    """
    shared = {"num_classes": num_classes, "image_shape": tuple(image_shape)}
    classifier, spec = build_seeded(CLASSIFIERS, name, seed, shared | options)
    if not isinstance(classifier, Classifier):
        raise ConfigError(
            f"classifier {spec['type']!r} is no Classifier but {type(classifier).__name__}."
        )
    classifier.spec = spec
    return classifier
