"""A discriminator on a classifier's features: do they come from a perturbed image, and of which class are they?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from onmanifold.foundation.errors import CheckpointError, InputError
from onmanifold.foundation.weights import fill_module, read_module, write_module

Reads = Literal["last_hidden", "logits"]

_KIND = "discriminator"


class Discriminator(nn.Module):
    """A perceptron on features, with a manifold output and a class output (ATLD, section 4.1).

    Its activation is smooth (SiLU), so that the gradient of an inner gradient, by which a defence built on it is
    attacked, is not zero.

    Args:
        feature_size: D.
        num_classes: K, of the class output.
        width: Units of each hidden layer.
        depth: Number of hidden layers.
        reads: Which features of a classifier it was made for: "last_hidden" or "logits".

    Attributes:
        reads: See above.
        spec: The arguments, with which it can be made again.
    """

    spec: dict[str, Any]

    def __init__(
        self,
        feature_size: int,
        num_classes: int,
        width: int = 256,
        depth: int = 2,
        reads: Reads = "last_hidden",
    ) -> None:
        super().__init__()
        if reads not in ("last_hidden", "logits"):
            raise InputError(f"reads: expected 'last_hidden' or 'logits', found {reads!r}.")
        layers: list[nn.Module] = []
        before = feature_size
        for _ in range(depth):
            layers += [nn.Linear(before, width), nn.SiLU()]
            before = width
        self.layers = nn.Sequential(*layers, nn.Linear(before, 1 + num_classes))
        self.reads: Reads = reads
        self.spec = {"feature_size": feature_size, "num_classes": num_classes}
        self.spec |= {"width": width, "depth": depth, "reads": reads}

    def forward(self, features: Tensor) -> Tensor:
        """Outputs (B, 1 + K) of features (B, D).

        Column 0 is the manifold output, the logit of the probability that the features are those of a perturbed
        image; the others are logits of the classes.
        """
        outputs: Tensor = self.layers(features)
        return outputs

    def behind(self, classifier: nn.Module) -> Discriminated:
        """The classifier and this as one module, the same at each call, so that attacks prepare it once."""
        known = self.__dict__.get("_behind")
        if known is None or known.classifier is not classifier:
            # Past nn.Module's own __setattr__: what contains this is no part of it.
            known = self.__dict__["_behind"] = Discriminated(classifier, self)
        assert isinstance(known, Discriminated)
        return known


class Discriminated(nn.Module):
    """A classifier's features under a discriminator: images (B, C, H, W) to its outputs (B, 1 + K).

    Args:
        classifier: Gives the features.
        discriminator: Reads them.
    """

    def __init__(self, classifier: nn.Module, discriminator: Discriminator) -> None:
        super().__init__()
        self.classifier = classifier
        self.discriminator = discriminator

    def forward(self, images: Tensor) -> Tensor:
        """The discriminator's outputs (B, 1 + K)."""
        features = read_features(self.classifier, images, self.discriminator.reads)
        outputs: Tensor = self.discriminator(features)
        return outputs


def read_features(classifier: nn.Module, images: Tensor, reads: Reads) -> Tensor:
    """What a discriminator reads of images (B, C, H, W): logits (B, K), or the last hidden layer (B, D).

    Raises:
        InputError: The classifier has no method ``features``, which gives its last hidden layer.
    """
    if reads == "logits":
        logits: Tensor = classifier(images)
        return logits
    method = getattr(classifier, "features", None)
    if not callable(method) or isinstance(method, nn.Module):
        raise InputError(
            f"classifier: {type(classifier).__name__} has no method `features` that gives its last hidden layer "
            "(B, D); expected one such as `build_classifier` makes, or a discriminator that reads 'logits'."
        )
    features: Tensor = method(images)
    return features


def save_discriminator(
    discriminator: Discriminator, path: str | Path, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write a discriminator's weights and specification, atomically.

    Args:
        discriminator: What is written.
        path: The file, usually ``discriminator.safetensors`` beside that of its classifier.
        metadata: Anything JSON can hold.

    Raises:
        InputError: ``metadata`` holds what JSON cannot.
        DataError: The file could not be written; what was there before is left as it was.
    """
    return write_module(_KIND, discriminator, path, discriminator.spec, metadata)


def load_discriminator(path: str | Path) -> Discriminator:
    """Load a discriminator that `save_discriminator`, or a training by ATLD, wrote.

    Args:
        path: The file.

    Returns:
        The discriminator in eval mode, on the CPU.

    Raises:
        CheckpointError: The file is missing, truncated or foreign.
    """
    saved = read_module(_KIND, path)
    try:
        discriminator = Discriminator(**(saved.spec or {}))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: its specification makes no discriminator of this version: {error}."
        ) from error
    fill_module(discriminator, saved.weights, path)
    return discriminator.eval()
