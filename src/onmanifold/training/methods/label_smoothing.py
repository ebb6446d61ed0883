"""Normal training on smoothed labels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from onmanifold.foundation.registry import METHODS
from onmanifold.training.methods.base import Method, Step
from onmanifold.training.smoothing import check_smoothing, smoothed_cross_entropy


@METHODS.register("label_smoothing")
@dataclass(frozen=True)
class LabelSmoothing(Method):
    """Cross-entropy of smoothed labels on the training images as they are.

    The baseline of methods that smooth labels, such as Feature Scattering and ATLD: smoothing alone raises the
    accuracy under weak attacks, without robustness (Fu et al. 2020, arXiv:2009.08233), and shows how much of
    theirs is due to it.

    Attributes:
        smoothing: What the label loses to the other classes, in [0, 1); see `smoothed`.
    """

    smoothing: float = 0.5

    def __post_init__(self) -> None:
        check_smoothing(self.smoothing)

    def loss(self, step: Step) -> Tensor:
        return smoothed_cross_entropy(step.logits(step.images), step.labels, self.smoothing)
