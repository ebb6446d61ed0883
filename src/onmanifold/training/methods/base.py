"""What a training method is: which examples to make, and which loss to take on them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from onmanifold.attacks import Attack
from onmanifold.attacks.engine import Precision
from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.registry import METHODS, Component


@dataclass
class Step:
    """One step of training, as a method sees it.

    Attributes:
        model: Images (B, C, H, W) to logits (B, K); in train mode, its gradients are those of the step. It
            may be called as often as a method needs.
        classifier: The module inside ``model``, for attacks and for its own methods, such as features.
        images: (B, C, H, W) in [0, 1], augmented.
        labels: (B,) int64.
        codes: (B, code_size) of the images, or None.
        indices: (B,) int64, stable over epochs.
        epoch: From 0.
        seed: Of all that is random in this step; another in each epoch.
        attack_precision: The precision of attacks ("32" or "bf16"); None: as each attack says.
        correct: Correct predictions among those counted, () on the device; for the log.
        counted: Predictions that were counted.
    """

    model: Callable[[Tensor], Tensor]
    classifier: nn.Module
    images: Tensor
    labels: Tensor
    codes: Tensor | None
    indices: Tensor
    epoch: int
    seed: int
    attack_precision: Precision | None = None
    correct: Tensor = field(init=False)
    counted: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.correct = torch.zeros((), dtype=torch.int64, device=self.images.device)

    def examples(self, attack: Attack, rows: slice = slice(None)) -> Tensor:
        """Adversarial images (rows, C, H, W) of some rows, made in eval mode; the model is left untouched."""
        engine = attack.engine
        if self.attack_precision is not None:
            engine = replace(engine, precision=self.attack_precision)
        return attack.examples(
            self.classifier,
            self.images[rows],
            self.labels[rows],
            codes=None if self.codes is None else self.codes[rows],
            seed=self.seed,
            indices=self.indices[rows],
            engine=engine,
        )

    def cross_entropy(self, images: Tensor) -> Tensor:
        """Mean cross-entropy of images (B, C, H, W), row for row those of the step; one forward pass."""
        logits = self.model(images)
        self.count(logits)
        return functional.cross_entropy(logits, self.labels)

    def count(self, logits: Tensor) -> None:
        """Count the predictions of logits (B, K) in the training accuracy that is logged."""
        with torch.no_grad():
            self.correct += (logits.argmax(1) == self.labels).sum()
        self.counted += len(logits)


class Method(Component, ABC):
    """A training method. It holds no state; the loop knows none by name."""

    registry = METHODS

    @abstractmethod
    def loss(self, step: Step) -> Tensor:
        """The loss of a step, a mean over the batch; the loop takes its gradient."""

    @property
    def attacks(self) -> Sequence[Attack]:
        """The attacks trained against; robust validation accuracy is measured by them by default."""
        return ()


def check_attack(name: str, attack: object) -> None:
    """Raises ConfigError unless ``attack`` is an attack."""
    if not isinstance(attack, Attack):
        raise ConfigError(f"{name}: expected an attack, found {type(attack).__name__}.")


def persistent(attack: Attack, early_stop: bool = False) -> Attack:
    """The attack as training uses it: all steps are done, and the point with the largest loss is kept.

    Args:
        attack: Any attack; one that has no ``early_stop`` is returned as it is.
        early_stop: True: stop at the first success of each sample.
    """
    if any(entry.name == "early_stop" for entry in fields(attack)):
        return replace(attack, early_stop=early_stop)  # type: ignore[call-arg]
    return attack
