"""Virtual adversarial training (VAT)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from onmanifold.foundation import randomness
from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.modules import frozen
from onmanifold.foundation.registry import METHODS
from onmanifold.objectives import divergence
from onmanifold.threats.geometry import unit
from onmanifold.training.methods.base import Method, Step, check_weight


@METHODS.register("virtual_adversarial")
@dataclass(frozen=True)
class VAT(Method):
    """Cross-entropy on clean images, plus the change of the prediction where it changes most (Miyato et al. 2018).

    The loss is CE(p(x), y) + weight · KL(p(x) ‖ p(x + r)), the first argument of the divergence held fixed. To
    second order the divergence is rᵀ H r / 2, and r is the dominant eigenvector of H, of length ``radius``. It is
    found by power iteration from a random direction d: d ← ∇ KL(p(x) ‖ p(x + difference · d)), normalised (the
    paper's algorithm 1). Labels play no part in it. x + r is clipped to [0, 1], which the paper leaves out.

    The direction is found in eval mode, as all examples are here; the paper's code uses the statistics of the
    batch. Both passes of the loss update batch norm's statistics; in that code the clean one alone.

    Attributes:
        radius: l2 length of r, in pixel units of [0, 1] images (ε).
        weight: Of the divergence (α); the paper leaves it at 1.
        iterations: Of the power iteration (K).
        difference: l2 length of the finite difference (ξ). The paper's is 1e-6, whose effect on the logits is
            lost in the rounding of float32.
    """

    radius: float = 0.5
    weight: float = 1.0
    iterations: int = 1
    difference: float = 1e-2

    def __post_init__(self) -> None:
        check_weight("radius", self.radius)
        check_weight("weight", self.weight)
        if self.iterations < 1:
            raise ConfigError(f"iterations: expected at least 1, found {self.iterations}.")
        if not 0 < self.difference < float("inf"):
            raise ConfigError(f"difference: expected a finite number > 0, found {self.difference}.")

    def loss(self, step: Step) -> Tensor:
        # Before the first forward pass, which changes the batch-norm statistics.
        moved = self._moved(step) if step.given is None else next(step.given)
        step.made.append(moved)
        clean = step.logits(step.images)
        change = divergence(clean.detach(), step.model(moved)).mean()
        return functional.cross_entropy(clean, step.labels) + self.weight * change

    def _moved(self, step: Step) -> Tensor:
        """The images moved by r, (B, C, H, W) in [0, 1]."""
        images = step.images
        start = randomness.normal(
            step.seed, step.indices, images.shape[1:], stream="virtual", dtype=images.dtype
        )
        directions = unit(start)
        with frozen(step.classifier):
            for _ in range(self.iterations):
                directions = self._sharpened(step.classifier, images, directions)
        return (images + self.radius * directions).clamp(0, 1)

    def _sharpened(self, classifier: nn.Module, images: Tensor, directions: Tensor) -> Tensor:
        """One power iteration on unit directions (B, C, H, W)."""
        with torch.no_grad():
            clean = classifier(images)
        point = (images + self.difference * directions).requires_grad_()
        change = divergence(clean, classifier(point)).sum()
        (gradient,) = torch.autograd.grad(change, point)
        # Where the prediction does not change at all, any direction is as good.
        flat = gradient.flatten(1).abs().amax(1) > 0
        return torch.where(flat.view(-1, 1, 1, 1), unit(gradient), directions)
