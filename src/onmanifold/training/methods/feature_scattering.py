"""Feature scattering: examples that move a whole batch of features as far as possible from the clean ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from onmanifold.attacks import PGD, Attack
from onmanifold.attacks.core import gradients_of
from onmanifold.attacks.engine import Engine, FrozenNetwork, frozen, unwrapped
from onmanifold.attacks.stepped import StepSize, check_steps, resolve_step_sizes
from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.registry import METHODS
from onmanifold.threats import ImageBall, Threat
from onmanifold.threats.base import Region, Variables
from onmanifold.threats.geometry import Start
from onmanifold.training.methods.base import Method, Step
from onmanifold.training.smoothing import check_smoothing, smoothed_cross_entropy
from onmanifold.training.transport import transport_distance


@METHODS.register("feature_scattering")
@dataclass(frozen=True)
class FeatureScattering(Method):
    """Cross-entropy of smoothed labels on images scattered in feature space (Zhang and Wang 2019).

    The examples ascend the optimal transport distance between the logits of the clean and of the perturbed
    batch, on the frozen model in eval mode, without the labels; the plan is held fixed in the gradient (see
    `transport_distance`). The plan couples the samples of a batch: an example depends on the others in its
    batch, and, where several processes share a batch, on those in its own process's share. It is no `Objective`
    for that reason, and no attack of the library makes these examples. The last point of the ascent is taken, as
    nothing is measured per sample.

    The defaults are those of the released code, where images are in [-1, 1] and lengths twice as large. With
    another threat model, such as a latent or a joint ball, it is feature scattering on the manifold, or on and
    off it.

    Attributes:
        threat: What may change.
        step_size: In each variable's own units, one number or one per variable; None: the radius.
        steps: Number of steps.
        start: Where the ascent starts, such as "uniform" in the ball. Not "zero": there the distance has its
            minimum, and no gradient.
        smoothing: What the label loses to the other classes, in [0, 1); see `smoothed`.
        regularisation: Of the transport; see `sinkhorn`.
        iterations: Of Sinkhorn, at most.
        tolerance: At which they end.
    """

    threat: Threat = ImageBall(norm="linf", radius=8 / 255)
    step_size: StepSize = None
    steps: int = 1
    start: Start = "uniform"
    smoothing: float = 0.5
    regularisation: float = 0.01
    iterations: int = 100
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        check_steps(self.steps, self.step_size)
        starts = [start for start in get_args(Start) if start != "zero"]
        if self.start not in starts:
            raise ConfigError(f"start: expected one of {starts}, found {self.start!r}.")
        check_smoothing(self.smoothing)
        if not 0 < self.regularisation < float("inf"):
            raise ConfigError(
                f"regularisation: expected a finite number > 0, found {self.regularisation}."
            )
        if self.iterations < 1:
            raise ConfigError(f"iterations: expected at least 1, found {self.iterations}.")
        if not self.tolerance >= 0:
            raise ConfigError(f"tolerance: expected a number >= 0, found {self.tolerance}.")

    @property
    def attacks(self) -> Sequence[Attack]:
        """What robust validation accuracy is measured by: PGD of 10 steps in the threat model."""
        return (PGD(self.threat, steps=10),)

    def loss(self, step: Step) -> Tensor:
        logits = step.logits(self._examples(step))
        return smoothed_cross_entropy(logits, step.labels, self.smoothing)

    def _examples(self, step: Step) -> Tensor:
        """Scattered images (B, C, H, W); those of before where the step is looked at again."""
        if step.given is not None:
            return next(step.given)
        images = step.images
        with frozen(
            step.classifier, images, step.engine(Engine()), seed=step.seed, check=False
        ) as network:
            with torch.no_grad():
                threat = self.threat.facing(unwrapped(step.classifier), images)
                region = threat.around(images, step.labels, step.codes)
                start = region.random(self.start, step.seed, step.indices)
                clean = network(images)
            found = self._scattered(network, region, start, clean)
            with torch.no_grad():
                made = region.render(found).clamp(0, 1)
        step.made.append(made)
        return made

    def _scattered(
        self, network: FrozenNetwork, region: Region, variables: Variables, clean: Tensor
    ) -> Variables:
        """Where the ascent ends that begins at the variables; the clean logits are (B, K)."""
        step_sizes = resolve_step_sizes(self.step_size, region, 1.0)
        settings = self.regularisation, self.iterations, self.tolerance
        for _ in range(self.steps):
            leaves = {name: tensor.detach().requires_grad_() for name, tensor in variables.items()}
            with torch.enable_grad():
                distance = transport_distance(clean, network(region.render(leaves)), *settings)
            gradients = gradients_of(distance, leaves)
            variables = region.project(region.ascend(variables, gradients, step_sizes))
        return variables
