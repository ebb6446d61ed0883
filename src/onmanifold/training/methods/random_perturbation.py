"""Training on random perturbations: the baseline of adversarial training that does not optimise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from onmanifold.attacks.engine import unwrapped
from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.modules import frozen
from onmanifold.foundation.registry import METHODS
from onmanifold.threats import Threat
from onmanifold.threats.geometry import Start
from onmanifold.training.methods.base import Method, Step


@METHODS.register("random_perturbation")
@dataclass(frozen=True)
class RandomPerturbationTraining(Method):
    """Cross-entropy on random perturbations, "without any optimization" (Disentangling appendix H).

    On an image ball this is training with noise, on a latent ball random on-manifold training, on a
    `TransformationBall` the random data augmentation of Disentangling section 3.4.1. The released code of
    that baseline samples the scale around 0 and so clips it to its lowest value; here it is sampled around
    the identity.

    Attributes:
        threat: What may change.
        variant: "full": all images are perturbed; "half": the first half of each batch stays clean.
        start: "uniform" in the ball's volume, as in the text of appendix H, or "distance": uniform distance,
            then direction (eq. 19), as attacks start.
    """

    threat: Threat
    variant: Literal["full", "half"] = "full"
    start: Start = "uniform"

    def __post_init__(self) -> None:
        if self.start not in ("uniform", "distance"):
            raise ConfigError(f"start: expected 'uniform' or 'distance', found {self.start!r}.")

    def loss(self, step: Step) -> Tensor:
        clean = len(step.images) // 2 if self.variant == "half" else 0
        codes = None if step.codes is None else step.codes[clean:]
        with torch.no_grad(), frozen(step.classifier):
            images = step.images[clean:]
            threat = self.threat.facing(unwrapped(step.classifier), images)
            region = threat.around(images, step.labels[clean:], codes)
            points = region.random(self.start, step.seed, step.indices[clean:])
            perturbed = region.render(points).clamp(0, 1)
        return step.cross_entropy(
            torch.cat([step.images[:clean], perturbed]) if clean else perturbed
        )
