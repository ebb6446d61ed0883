"""What the adversary wants: objectives, one value per sample, larger is better for the adversary.

An objective is a specification. `Objective.bind` ties it to a model and a batch; the bound objective
turns images into values and logits, and lets fooled samples leave.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from onmanifold.foundation.errors import InputError
from onmanifold.foundation.registry import OBJECTIVES, Component

# So that equal logits divide nothing by zero.
_SMALL = 1e-12

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

    @property
    def turns(self) -> int:
        """How many objectives this is, to be searched one after the other: one per target, say."""
        return 1

    def turn(self, number: int) -> BoundObjective:
        """The objective of one turn."""
        return self

    def softened(self, soft_labels: Tensor) -> BoundObjective:
        """The objective for labels that are distributions over classes (B, K), such as those of mixed images.

        Raises:
            InputError: The objective knows nothing but hard labels.
        """
        if not self.objective.takes_soft_labels:
            raise InputError(
                f"objective: {type(self.objective).__name__} takes no soft labels; expected 'ce' or 'kl'."
            )
        return replace(self, extra={**self.extra, "soft_labels": soft_labels})

    def keep(self, mask: Tensor) -> BoundObjective:
        """The objective on the selected samples."""
        extra = {name: tensor[mask] for name, tensor in self.extra.items()}
        return replace(self, labels=self.labels[mask], extra=extra)


class Objective(Component, ABC):
    """What is maximised; per sample, so that no sample's result depends on another's.

    Attributes:
        takes_soft_labels: Whether `value` makes use of, or needs no more than, ``soft_labels`` (B, K).
    """

    registry = OBJECTIVES
    takes_soft_labels: ClassVar[bool] = False

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

    takes_soft_labels: ClassVar[bool] = True

    def value(self, logits: Tensor, labels: Tensor, **extra: Tensor) -> Tensor:
        """The value −log p_y, (B,); of soft labels t, −Σ t_k log p_k."""
        wanted = extra.get("soft_labels", labels)
        return functional.cross_entropy(logits, wanted, reduction="none")


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


def divergence(clean: Tensor, perturbed: Tensor) -> Tensor:
    """KL(p(clean) ‖ p(perturbed)) in nats, (B,), of logits (B, K); differentiable in both.

    >>> divergence(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]))
    tensor([0.1201])
    """
    target = functional.log_softmax(clean, dim=1)
    return functional.kl_div(
        functional.log_softmax(perturbed, dim=1), target, reduction="none", log_target=True
    ).sum(1)


@OBJECTIVES.register("kl")
@dataclass(frozen=True)
class KullbackLeibler(Objective):
    """KL(p(clean) ‖ p(perturbed)), as TRADES maximises it; the labels play no part."""

    takes_soft_labels: ClassVar[bool] = True

    def extra(self, network: Network, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The clean log-probabilities (B, K)."""
        return {"clean": functional.log_softmax(network(images), dim=1)}

    def value(self, logits: Tensor, labels: Tensor, **extra: Tensor) -> Tensor:
        """The divergence in nats, (B,)."""
        return divergence(extra["clean"], logits)


@OBJECTIVES.register("dlr")
@dataclass(frozen=True)
class DLR(Objective):
    """Difference of logits ratio: −(z_y − max over i != y of z_i) / (z_1st − z_3rd) (Croce and Hein 2020, eq. 6).

    Shifting the logits or scaling them by a positive number does not change it. Positive exactly where the sample
    is misclassified. With two classes there is no third logit, and it is the `Margin`.

    >>> DLR().value(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]))
    tensor([-0.5000])
    """

    def value(self, logits: Tensor, labels: Tensor, **extra: Tensor) -> Tensor:
        """The ratio, (B,)."""
        margin = _margin(logits, labels)
        if logits.shape[1] < 3:
            return margin
        top = logits.topk(3, dim=1).values
        return margin / (top[:, 0] - top[:, 2] + _SMALL)


@OBJECTIVES.register("targeted_dlr")
@dataclass(frozen=True)
class TargetedDLR(Objective):
    """DLR towards one class after the other: −(z_y − z_t) / (z_1st − (z_3rd + z_4th) / 2).

    Croce and Hein 2020, eq. 7. The targets are the most likely wrong classes of the clean image; an attack takes
    them in turn, and any misclassification is a success. With fewer than four classes the value is z_t − z_y.

    Attributes:
        targets: How many classes; at most K − 1 are taken.
    """

    targets: int = 9

    def __post_init__(self) -> None:
        if self.targets < 1:
            raise InputError(f"targets: expected at least 1, found {self.targets}.")

    def extra(self, network: Network, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The targets, named "ranking": (B, T), the most likely first."""
        return {"ranking": likeliest_others(network(images), labels, self.targets)}

    def value(self, logits: Tensor, labels: Tensor, **extra: Tensor) -> Tensor:
        """The ratio for the first of the targets, (B,)."""
        chosen = torch.stack([labels, extra["ranking"][:, 0]], dim=1)
        own, target = logits.gather(1, chosen).unbind(1)
        if logits.shape[1] < 4:
            return target - own
        top = logits.topk(4, dim=1).values
        return (target - own) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + _SMALL)

    def bind(
        self, network: Network, images: Tensor, labels: Tensor, targets: Tensor | None = None
    ) -> BoundObjective:
        """Tie the objective to a frozen model and a batch; the targets are not the caller's to choose."""
        bound = super().bind(network, images, labels, targets)
        return InTurn(self, network, labels, bound.extra)


class InTurn(BoundObjective):
    """A bound objective with a turn for each column of its ranking (B, T)."""

    @property
    def turns(self) -> int:
        """T."""
        return self.extra["ranking"].shape[1]

    def turn(self, number: int) -> BoundObjective:
        """The objective towards one of the targets."""
        return replace(self, extra={"ranking": self.extra["ranking"][:, number : number + 1]})


def likeliest_others(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """The classes of the largest logits (B, K) but the label, (B, min(count, K − 1)), the largest first."""
    others = logits.scatter(1, labels.unsqueeze(1), -torch.inf)
    return others.argsort(dim=1, descending=True, stable=True)[:, : min(count, logits.shape[1] - 1)]


class AgainstDiscriminator(BoundObjective):
    """A bound objective that succeeds where a discriminator takes the image for a perturbed one."""

    def fooled(self, logits: Tensor) -> Tensor:
        """Where the manifold output is positive, (B,) bool."""
        return logits[:, 0] > 0


@OBJECTIVES.register("manifold_loss")
@dataclass(frozen=True)
class ManifoldLoss(Objective):
    """The part of ATLD's manifold loss that depends on the perturbed image: log D(f(x')) (ATLD eq. 12).

    The model is a classifier with a discriminator behind it, such as `Discriminator.behind` makes: its first
    output is the logit of the probability D that the features are those of a perturbed image. The labels play no
    part. The other part, log(1 − D(f(x))), is a constant of the ascent.

    >>> ManifoldLoss().value(torch.zeros(1, 4), torch.tensor([0]))
    tensor([-0.6931])
    """

    def value(self, logits: Tensor, labels: Tensor, **extra: Tensor) -> Tensor:
        """The value log σ(first output), (B,)."""
        return functional.logsigmoid(logits[:, 0])

    def bind(
        self, network: Network, images: Tensor, labels: Tensor, targets: Tensor | None = None
    ) -> BoundObjective:
        """Tie the objective to a frozen model and a batch."""
        bound = super().bind(network, images, labels, targets)
        return AgainstDiscriminator(self, network, labels, bound.extra)


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
