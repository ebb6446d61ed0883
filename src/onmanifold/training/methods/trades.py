"""TRADES and MART: the clean loss, and how far adversarial examples move the prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from onmanifold.attacks import Attack
from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.registry import METHODS
from onmanifold.objectives import KullbackLeibler, divergence
from onmanifold.training.methods.base import (
    Method,
    Step,
    check_weight,
    maximising,
    persistent,
)

# Of MART's released code: no logarithm of 0, no weight of 0.
_ABOVE_ONE, _SMALL, _FLOOR = 1.0001, 1e-12, 1e-7


@METHODS.register("trades")
@dataclass(frozen=True)
class TRADES(Method):
    """CE(x, y) + weight · KL(p(x) ‖ p(x')), where x' maximises the divergence (Zhang et al. 2019, eq. 5).

    The attacks maximise the divergence, whatever objective they bring; in the released code they start "nearby",
    0.001 times a Gaussian point away, since the clean image itself has no gradient. On a latent ball this is
    TRADES on the manifold, on a joint ball TRADES with JSA examples (IJSAT table 5); with an image and a latent
    attack it is DMAT + TRADES (DMAT eq. 11). Each kind of images goes through the model in a pass of its own.

    Attributes:
        attack: Makes the examples.
        weight: Of the divergence, β.
        latent_attack: Makes examples of a second kind, with a divergence of their own; None: there are none.
        latent_weight: Of that; None: as the other.
    """

    attack: Attack
    weight: float = 6.0
    latent_attack: Attack | None = None
    latent_weight: float | None = None

    def __post_init__(self) -> None:
        check_weight("weight", self.weight)
        check_weight("latent_weight", self.latent_weight or 0.0)
        if self.latent_weight is not None and self.latent_attack is None:
            raise ConfigError("latent_weight: expected a latent_attack beside it, found none.")
        for attack in self.attacks:
            # Says so if it has no objective, or would start where the divergence has no gradient.
            maximising(attack, KullbackLeibler())

    @property
    def attacks(self) -> Sequence[Attack]:
        """The attacks, with objectives of their own: robust validation accuracy asks whether labels change."""
        return (self.attack,) if self.latent_attack is None else (self.attack, self.latent_attack)

    def loss(self, step: Step) -> Tensor:
        examples = [step.examples(maximising(attack, KullbackLeibler())) for attack in self.attacks]
        clean = step.logits(step.images)
        loss = functional.cross_entropy(clean, step.labels)
        weights = (self.weight, self.weight if self.latent_weight is None else self.latent_weight)
        for images, weight in zip(examples, weights, strict=False):
            loss = loss + weight * divergence(clean, step.model(images)).mean()
        return loss


@METHODS.register("mart")
@dataclass(frozen=True)
class MART(Method):
    """Misclassification-aware adversarial training (Wang et al. 2020, eq. 11).

    BCE(p(x'), y) + weight · mean of KL(p(x) ‖ p(x')) · (1 − p_y(x)), where BCE = −log p'_y − log(1 − max over
    i ≠ y of p'_i): examples whose clean image is wrong count more. The attack has its own objective, usually
    cross-entropy; in the released code it starts "nearby".

    Attributes:
        attack: Makes the examples; on a joint ball this is MART with JSA examples (IJSAT table 5).
        weight: Of the divergence, λ: 5 in the released script, 6 in IJSAT.
    """

    attack: Attack
    weight: float = 5.0

    def __post_init__(self) -> None:
        check_weight("weight", self.weight)

    @property
    def attacks(self) -> Sequence[Attack]:
        """The attack."""
        return (self.attack,)

    def loss(self, step: Step) -> Tensor:
        examples = step.examples(persistent(self.attack))
        perturbed, clean = step.model(examples), step.logits(step.images)
        boosted = boosted_cross_entropy(perturbed, step.labels)
        own = clean.softmax(1).gather(1, step.labels.unsqueeze(1)).squeeze(1)
        aware = divergence(clean, perturbed) * (1 + _FLOOR - own)
        return boosted.mean() + self.weight * aware.mean()


def boosted_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """MART's BCE (B,) of logits (B, K): −log p_y − log(1 − largest other p), kept finite as in its code."""
    likelihoods = logits.softmax(1)
    others = likelihoods.scatter(1, labels.unsqueeze(1), 0.0).amax(1)
    return functional.cross_entropy(logits, labels, reduction="none") - torch.log(
        _ABOVE_ONE - others + _SMALL
    )
