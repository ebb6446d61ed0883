"""What the adversary wants: objectives, one value per sample, larger is better for the adversary.

An objective is a specification. `Objective.bind` ties it to a model and a batch; the bound objective
turns images into values and logits, and lets fooled samples leave.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from onmanifold.foundation.errors import InputError
from onmanifold.foundation.registry import OBJECTIVES, Component

Network = Callable[[Tensor], Tensor]
"""A frozen model: images (B, C, H, W) to logits (B, K)."""


@dataclass(frozen=True)
class BoundObjective:
    """An objective on a batch.

    Attributes:
        objective: What gives the values.
        network: The frozen model.
        labels: (B,) int64.
        extra: Further per-sample tensors that the objective asked for, such as targets.
    """

    objective: Objective
    network: Network
    labels: Tensor
    extra: dict[str, Tensor]

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Values (B,) and logits (B, K) of images; one forward pass, differentiable."""
        logits = self.network(images)
        return self.objective.value(logits, self.labels, **self.extra), logits

    def fooled(self, logits: Tensor) -> Tensor:
        """Which samples are misclassified, (B,) bool."""
        return logits.argmax(1) != self.labels

    def finished(self, values: Tensor, logits: Tensor) -> Tensor:
        """Which samples are fooled, and by as much as the objective wants, (B,) bool."""
        return self.fooled(logits) & self.objective.reached(values)

    def keep(self, mask: Tensor) -> BoundObjective:
        """The objective on the selected samples."""
        extra = {name: tensor[mask] for name, tensor in self.extra.items()}
        return replace(self, labels=self.labels[mask], extra=extra)


class Objective(Component, ABC):
    """What is maximised; per sample, so that no sample's result depends on another's."""

    registry = OBJECTIVES

    @abstractmethod
    def value(self, logits: Tensor, labels: Tensor, **extra: Tensor) -> Tensor:
        """Values (B,) of logits (B, K) for labels (B,)."""

    def reached(self, values: Tensor) -> Tensor:
        """Which values (B,) need not be raised further once the sample is fooled, (B,) bool."""
        return torch.ones_like(values, dtype=torch.bool)

    def extra(self, network: Network, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Per-sample tensors that `value` needs besides the labels; computed once per attack."""
        return {}

    def bind(
        self, network: Network, images: Tensor, labels: Tensor, targets: Tensor | None = None
    ) -> BoundObjective:
        """Tie the objective to a frozen model and a batch.

        Raises:
            InputError: Targets for an objective that has none.
        """
        if targets is not None:
            raise InputError(f"targets: {type(self).__name__} is untargeted.")
        with torch.no_grad():
            return BoundObjective(self, network, labels, self.extra(network, images, labels))


@OBJECTIVES.register("ce")
@dataclass(frozen=True)
class CrossEntropy(Objective):
    """Cross-entropy of the label.

    >>> CrossEntropy().value(torch.zeros(1, 2), torch.tensor([0]))
    tensor([0.6931])
    """

    def value(self, logits: Tensor, labels: Tensor, **extra: Tensor) -> Tensor:
        """The value −log p_y, (B,)."""
        return functional.cross_entropy(logits, labels, reduction="none")


@OBJECTIVES.register("margin")
@dataclass(frozen=True)
class Margin(Objective):
    """Largest other logit minus the label's (Carlini and Wagner 2017; Disentangling eq. 20 with sign turned).

    Positive exactly where the sample is misclassified.

    Attributes:
        confidence: The value is not pushed beyond this; None: without bound.

    >>> Margin().value(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]))
    tensor([-1.])
    """

    confidence: float | None = None

    def __post_init__(self) -> None:
        _check_confidence(self.confidence)

    def value(self, logits: Tensor, labels: Tensor, **extra: Tensor) -> Tensor:
        """The largest z_i over i != y, minus z_y, (B,)."""
        return _capped(_margin(logits, labels), self.confidence)

    def reached(self, values: Tensor) -> Tensor:
        return values >= (self.confidence or 0.0)


@OBJECTIVES.register("kl")
@dataclass(frozen=True)
class KullbackLeibler(Objective):
    """KL(p(clean) ‖ p(perturbed)), as TRADES maximises it; the labels play no part."""

    def extra(self, network: Network, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The clean log-probabilities (B, K)."""
        return {"clean": functional.log_softmax(network(images), dim=1)}

    def value(self, logits: Tensor, labels: Tensor, **extra: Tensor) -> Tensor:
        """The divergence in nats, (B,)."""
        perturbed = functional.log_softmax(logits, dim=1)
        return functional.kl_div(perturbed, extra["clean"], reduction="none", log_target=True).sum(
            1
        )


Target = Literal["second", "least"]


@dataclass(frozen=True)
class _Targeted(Objective, ABC):
    """Base of the targeted forms.

    Attributes:
        target: Which class is the target where the call brings none: "second", the most likely wrong class
            of the clean image, or "least", the least likely one.
    """

    target: Target = "second"

    def bind(
        self, network: Network, images: Tensor, labels: Tensor, targets: Tensor | None = None
    ) -> BoundObjective:
        """Tie the objective to a frozen model, a batch and its targets (B,) int64.

        Raises:
            InputError: Targets of the wrong shape or dtype, or equal to the label.
        """
        if targets is None:
            with torch.no_grad():
                logits = network(images)
            score = logits if self.target == "second" else -logits
            targets = score.scatter(1, labels.unsqueeze(1), -torch.inf).argmax(1)
        if targets.dtype != torch.int64 or targets.shape != labels.shape:
            raise InputError(
                f"targets: expected int64 {tuple(labels.shape)}, found {targets.dtype} {tuple(targets.shape)}."
            )
        if bool((targets == labels).any()):
            raise InputError("targets: a target must differ from the label.")
        return TargetedObjective(self, network, labels, {"targets": targets})


class TargetedObjective(BoundObjective):
    """A bound objective that succeeds only where the target is predicted."""

    def fooled(self, logits: Tensor) -> Tensor:
        """Which samples are predicted as their target, (B,) bool."""
        return logits.argmax(1) == self.extra["targets"]


@OBJECTIVES.register("targeted_ce")
@dataclass(frozen=True)
class TargetedCrossEntropy(_Targeted):
    """Log-probability of a target class."""

    def value(self, logits: Tensor, labels: Tensor, **extra: Tensor) -> Tensor:
        """The target's log-probability, (B,)."""
        return -functional.cross_entropy(logits, extra["targets"], reduction="none")


@OBJECTIVES.register("targeted_margin")
@dataclass(frozen=True)
class TargetedMargin(_Targeted):
    """The target's logit minus the largest other one; positive exactly where the target is predicted.

    Attributes:
        confidence: The value is not pushed beyond this; None: without bound.
    """

    confidence: float | None = None

    def __post_init__(self) -> None:
        _check_confidence(self.confidence)

    def value(self, logits: Tensor, labels: Tensor, **extra: Tensor) -> Tensor:
        """z_t − max over i != t of z_i, (B,)."""
        return _capped(-_margin(logits, extra["targets"]), self.confidence)

    def reached(self, values: Tensor) -> Tensor:
        return values >= (self.confidence or 0.0)


def _margin(logits: Tensor, classes: Tensor) -> Tensor:
    column = classes.unsqueeze(1)
    others = logits.scatter(1, column, -torch.inf).amax(1)
    return others - logits.gather(1, column).squeeze(1)


def _check_confidence(confidence: float | None) -> None:
    if confidence is not None and not confidence >= 0:
        raise InputError(f"confidence: expected a number >= 0 or None, found {confidence}.")


def _capped(values: Tensor, confidence: float | None) -> Tensor:
    return values if confidence is None else values.clamp(max=confidence)
