"""Training against several threat models at once, and training in stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from onmanifold.attacks import Attack
from onmanifold.attacks.engine import untouched
from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.registry import METHODS
from onmanifold.training.methods.base import Method, Step, persistent
from onmanifold.training.methods.normal import Normal
from onmanifold.training.task import Turn


@METHODS.register("joint")
@dataclass(frozen=True)
class JointAdversarialTraining(Method):
    """Cross-entropy on the examples of several attacks (Directions, table 2; Tramèr and Boneh 2019).

    Attributes:
        against: Two or more attacks, such as PGD in l1 and linf, or PGD and an attack on a latent ball.
        combine: "mean" of the losses on each attack's examples; their "sum"; or "worst",
            each sample's example with the larger loss, which costs one more forward pass of all examples.
    """

    against: tuple[Attack, ...]
    combine: Literal["mean", "sum", "worst"] = "mean"

    def __post_init__(self) -> None:
        if len(self.against) < 2:
            raise ConfigError(f"against: expected two or more attacks, found {len(self.against)}.")

    @property
    def attacks(self) -> Sequence[Attack]:
        """All of them."""
        return self.against

    def loss(self, step: Step) -> Tensor:
        # All are made before the first forward pass, which changes the batch-norm statistics.
        examples = [step.examples(persistent(attack)) for attack in self.against]
        if self.combine == "worst":
            # Chosen once: a step that is looked at again has the same examples.
            worst = _worst(step, examples) if step.given is None else next(step.given)
            step.made.append(worst)
            return step.cross_entropy(worst)
        total = torch.stack([step.cross_entropy(images) for images in examples]).sum()
        return total / len(examples) if self.combine == "mean" else total


def _worst(step: Step, examples: Sequence[Tensor]) -> Tensor:
    """Of each sample the example with the largest loss, judged as the attacks judge: in eval mode."""
    with torch.no_grad(), untouched(step.classifier):
        losses = [
            functional.cross_entropy(step.model(images), step.labels, reduction="none")
            for images in examples
        ]
    chosen = torch.stack(losses).argmax(0)
    return torch.stack(list(examples))[chosen, torch.arange(len(chosen), device=chosen.device)]


@METHODS.register("staged")
@dataclass(frozen=True)
class Staged(Method):
    """One method for a number of epochs, then another, as Directions begins VAE-Adv after normal epochs.

    Attributes:
        then: The method after the first epochs; robust validation accuracy is measured by its attacks.
        epochs: How many are of the first.
        first: The method of the first epochs.
    """

    then: Method
    epochs: int
    first: Method = Normal()

    def __post_init__(self) -> None:
        for name in ("first", "then"):
            if not isinstance(getattr(self, name), Method):
                raise ConfigError(
                    f"{name}: expected a method, found {type(getattr(self, name)).__name__}."
                )
        if self.epochs < 0:
            raise ConfigError(f"epochs: expected a number >= 0, found {self.epochs}.")

    @property
    def attacks(self) -> Sequence[Attack]:
        """Those of the later method."""
        return self.then.attacks

    def loss(self, step: Step) -> Tensor:
        return self._now(step).loss(step)

    def turns(self, step: Step) -> Iterator[Turn]:
        """Those of the method whose turn it is."""
        yield from self._now(step).turns(step)

    def players(self, classifier: nn.Module, image: Tensor) -> dict[str, nn.Module]:
        """Those of both methods."""
        found = self.first.players(classifier, image)
        later = self.then.players(classifier, image)
        if shared := found.keys() & later.keys():
            raise ConfigError(f"first and then: both train {sorted(shared)} of their own.")
        return {**found, **later}

    def rates(self) -> Mapping[str, float]:
        """Those of both methods."""
        return {**self.first.rates(), **self.then.rates()}

    def _now(self, step: Step) -> Method:
        return self.first if step.epoch < self.epochs else self.then
