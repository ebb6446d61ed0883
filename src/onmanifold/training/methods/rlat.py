"""RLAT: an image and what the layers of the network compute of it, all perturbed at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from onmanifold.attacks import PGD, Attack
from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.modules import frozen
from onmanifold.foundation.registry import METHODS
from onmanifold.threats import ImageBall
from onmanifold.threats.geometry import unit
from onmanifold.training.methods.base import Method, Step, check_weight
from onmanifold.training.methods.layers import changed_outputs, parts

Scaling = Literal["size", "constant"]


@METHODS.register("rlat")
@dataclass(frozen=True)
class RLAT(Method):
    """Relaxed LPIPS adversarial training: cross-entropy with features perturbed (Kireev et al. 2022).

    Adversarial training within the perceptual distance LPIPS looks for an image whose features move by at most so
    much in each layer. Relaxed, the features are moved themselves: the image and the outputs h_l of several layers
    get perturbations d_l of their own, each in an l2 ball, and no image needs to have such features. One step
    finds all at once, from 0: d_l = radius_l · g_l / |g_l|₂ of each sample, g_l the gradient of its cross-entropy
    to d_l. The perturbed image is clipped to [0, 1]. Then the classifier descends the cross-entropy with all
    perturbations in place.

    The radii are those of the released code: radius_l is the radius times the numbers in h_l over those in the
    image, divided by the layer's place in the list, 1 for the image, 2 for the first layer, and so on. The
    gradients are those of the frozen model in eval mode, as for all examples here; the code takes them in train
    mode, so that batch norm's statistics move twice in a step and a perturbation depends on the rest of the batch.

    Attributes:
        radius: Of the image's perturbation, l2, in pixel units of [0, 1] images; by default as the released code
            has it for CIFAR-10.
        layers: What is perturbed: names of submodules of the classifier, such as ("", "body.0", "body.3"), in the
            order of the network, "" for the image; None: the image and each direct part of the body that has a
            convolution or a linear layer (of another module: each such child but the last). Of a residual network
            these are its stem and its stages, as in the released code.
        scaling: "size": radii in proportion to how many numbers a layer puts out; "constant": the same for all.
        descending: Whether radii are divided by the layer's place in the list.
    """

    radius: float = 0.08
    layers: tuple[str, ...] | None = None
    scaling: Scaling = "size"
    descending: bool = True

    def __post_init__(self) -> None:
        check_weight("radius", self.radius)
        if self.layers is not None and len(set(self.layers)) != max(len(self.layers), 1):
            raise ConfigError(
                f"layers: expected at least one name, each once, or None, found {self.layers}."
            )

    @property
    def attacks(self) -> Sequence[Attack]:
        """What robust validation accuracy is measured by: PGD of 10 steps in the image's l2 ball alone."""
        return (PGD(ImageBall("l2", self.radius), steps=10),)

    def loss(self, step: Step) -> Tensor:
        names = self.layers or ("", *_weighted(step.classifier))
        if step.given is None:
            # Before the first forward pass, which changes the batch-norm statistics.
            found = self._perturbed(step, names)
            step.made.extend(found)
        else:
            found = [next(step.given) for _ in names]
        changes = dict(zip(names, found, strict=True))
        # Kept as the image that it makes, as methods keep their examples.
        images = changes.pop("", step.images)
        with changed_outputs(
            step.classifier, {name: _adding(change) for name, change in changes.items()}
        ):
            logits = step.logits(images)
        return functional.cross_entropy(logits, step.labels)

    def _perturbed(self, step: Step, names: Sequence[str]) -> list[Tensor]:
        """The perturbed image (B, C, H, W), and the perturbation of each layer, of its output's shape (B, ...)."""
        zeros: dict[str, Tensor] = {}
        watches = {name: _watching(name, zeros) for name in names}
        with frozen(step.classifier):
            logits = _logits(step.classifier, step, watches)
            loss = functional.cross_entropy(logits, step.labels, reduction="sum")
        for name in names:
            if name not in zeros:
                raise ConfigError(
                    f"layers: {name!r} has no part in what {type(step.classifier).__name__} computes."
                )
        leaves = [zeros[name] for name in names]
        gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
        size = step.images[0].numel()
        moves = [
            self._radius(place, gradient[0].numel() / size) * unit(gradient)
            for place, gradient in enumerate(gradients, start=1)
        ]
        return [
            move if name else (step.images + move).clamp(0, 1)
            for name, move in zip(names, moves, strict=True)
        ]

    def _radius(self, place: int, size: float) -> float:
        """Of the layer at a place in the list, from 1, whose output is so many times as large as the image."""
        radius = self.radius * size if self.scaling == "size" else self.radius
        return radius / place if self.descending else radius


def _weighted(classifier: nn.Module) -> list[str]:
    """The parts that compute something new: not norms, activations and pooling, which follow them.

    To perturb those as well would perturb the same features several times.
    """
    return [
        name
        for name, part in parts(classifier).items()
        if any(weight.ndim > 1 for weight in part.parameters())
    ]


def _logits(
    model: Callable[[Tensor], Tensor], step: Step, changes: Mapping[str, Callable[[Tensor], Tensor]]
) -> Tensor:
    """Logits (B, K) of the step's images by a model around its classifier, layers changed; "" is the image."""
    inner = {name: change for name, change in changes.items() if name}
    images = changes[""](step.images).clamp(0, 1) if "" in changes else step.images
    with changed_outputs(step.classifier, inner):
        return model(images)


def _watching(name: str, zeros: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """Adds a zero, noted by its name; its gradient is right too where the output is overwritten in place."""

    def change(output: Tensor) -> Tensor:
        if name not in zeros:
            zeros[name] = torch.zeros_like(output, requires_grad=True)
        return output + zeros[name]

    return change


def _adding(change: Tensor) -> Callable[[Tensor], Tensor]:
    """Adds a perturbation, in the precision of what it is added to."""
    return lambda output: output + change.to(output.dtype)
