"""Adversarial training on one attack: AT, OM-AT, adversarial transformation training, training on JSA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from onmanifold.attacks import Attack
from onmanifold.foundation.registry import METHODS
from onmanifold.training.methods.base import Method, Step, persistent


@METHODS.register("adversarial")
@dataclass(frozen=True)
class AdversarialTraining(Method):
    """Cross-entropy on the examples of an attack (Madry et al. 2018; Disentangling eq. 2, 4, 5, app. H).

    With an attack on an image ball this is AT, on a latent ball OM-AT, on a transformation ball adversarial
    transformation training, on a joint ball training on JSA. While training, the attack does all its steps
    and the point with the largest loss is taken, whatever its ``early_stop`` says, except in the weak variant.

    Attributes:
        attack: What makes the examples.
        variant: "full": all examples are adversarial. "half": the first half of each batch stays clean, one
            forward pass, mean loss; this is what Disentangling calls adversarial training. "weak": as
            "half", and the attack stops at the first success of each sample.
    """

    attack: Attack
    variant: Literal["full", "half", "weak"] = "full"

    @property
    def attacks(self) -> Sequence[Attack]:
        """The attack."""
        return (self.attack,)

    def loss(self, step: Step) -> Tensor:
        attack = persistent(self.attack, early_stop=self.variant == "weak")
        if self.variant == "full":
            return step.cross_entropy(step.examples(attack))
        clean = len(step.images) // 2
        examples = step.examples(attack, slice(clean, None))
        return step.cross_entropy(torch.cat([step.images[:clean], examples]))
