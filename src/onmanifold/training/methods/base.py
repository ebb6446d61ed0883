"""What a training method is: which examples to make, and which loss to take on them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from onmanifold.attacks import Attack
from onmanifold.attacks.engine import Engine
from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.registry import METHODS, Component
from onmanifold.objectives import Objective
from onmanifold.training.task import Turn


def _alone(tensor: Tensor) -> Tensor:
    """The sum over one process."""
    return tensor


def _own(engine: Engine) -> Engine:
    """An attack's own engine."""
    return engine


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
        engine: How attacks run the model here, from how they would by themselves.
        players: The method's own networks, by name, in train mode.
        share: Of this process in the images of the step, and the sum over the processes.
        given: Examples that were made before, in order, for a step that is looked at `again`.
        made: Examples that were made in this step, in order.
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
    engine: Callable[[Engine], Engine] = _own
    players: Mapping[str, nn.Module] = field(default_factory=dict)
    share: tuple[float, Callable[[Tensor], Tensor]] = (1.0, _alone)
    given: Iterator[Tensor] | None = None
    made: list[Tensor] = field(default_factory=list, init=False)
    correct: Tensor = field(init=False)
    counted: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.correct = torch.zeros((), dtype=torch.int64, device=self.images.device)

    def examples(
        self,
        attack: Attack,
        rows: slice = slice(None),
        *,
        model: nn.Module | None = None,
        images: Tensor | None = None,
        soft_labels: Tensor | None = None,
    ) -> Tensor:
        """Adversarial images (rows, C, H, W) of some rows, made in eval mode; the model is left untouched.

        Args:
            attack: How they are made.
            rows: Of which samples.
            model: What is attacked; None: the classifier.
            images: (rows, C, H, W) in place of the step's own, such as mixed ones; the codes are not theirs then.
            soft_labels: (rows, K) distributions over classes, in place of the labels.
        """
        if self.given is not None:
            return next(self.given)
        known = self.codes is not None and images is None
        found = attack.examples(
            self.classifier if model is None else model,
            self.images[rows] if images is None else images,
            self.labels[rows],
            codes=self.codes[rows] if self.codes is not None and known else None,
            seed=self.seed,
            indices=self.indices[rows],
            engine=self.engine(attack.engine),
            soft_labels=soft_labels,
        )
        self.made.append(found)
        return found

    def again(self) -> Step:
        """This step once more, with the examples that were made in it: to look at its loss at other weights."""
        return replace(self, given=iter(self.made))

    def cross_entropy(self, images: Tensor, soft_labels: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of images (B, C, H, W), row for row those of the step; one forward pass.

        Args:
            images: What the model sees.
            soft_labels: (B, K) distributions over classes; None: the labels.
        """
        wanted = self.labels if soft_labels is None else soft_labels
        return functional.cross_entropy(self.logits(images), wanted)

    def logits(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images, row for row those of the step, counted in the training accuracy."""
        logits = self.model(images)
        self.count(logits)
        return logits

    def count(self, logits: Tensor) -> None:
        """Count the predictions of logits (B, K) in the training accuracy that is logged."""
        with torch.no_grad():
            self.correct += (logits.argmax(1) == self.labels).sum()
        self.counted += len(logits)

    def gradients(self, loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The gradient of the step's loss, over all processes, to some parameters; 0 where there is none."""
        share, total = self.share
        found = torch.autograd.grad(share * loss, parameters, allow_unused=True)
        return [
            total(torch.zeros_like(parameter) if gradient is None else gradient)
            for parameter, gradient in zip(parameters, found, strict=True)
        ]


class Method(Component, ABC):
    """A training method. It holds no state; the loop knows none by name."""

    registry = METHODS

    @abstractmethod
    def loss(self, step: Step) -> Tensor:
        """The classifier's loss in a step, a mean over the batch; the loop takes its gradient."""

    def turns(self, step: Step) -> Iterator[Turn]:
        """Yield the losses of each turn of a step: by default one turn, the classifier's loss.

        The loop takes the gradient of each loss to its player's parameters alone, then lets the players of the
        turn move, then goes on with this generator: so a later turn sees the moved players.
        """
        yield {"classifier": self.loss(step)}

    def players(self, classifier: nn.Module, image: Tensor) -> dict[str, nn.Module]:
        """Networks of the method's own that are trained too, by name, such as a discriminator.

        Each has an optimizer of its own. Their initial weights come from the global generator, which is seeded.

        Args:
            classifier: What is trained.
            image: (1, C, H, W), to see the shapes inside the classifier.
        """
        return {}

    def rates(self) -> Mapping[str, float]:
        """Factors on the learning rate, for players whose factor is not 1."""
        return {}

    @property
    def attacks(self) -> Sequence[Attack]:
        """The attacks trained against; robust validation accuracy is measured by them by default."""
        return ()


def check_weight(name: str, weight: float) -> None:
    """Raises ConfigError unless ``weight`` is a finite number of at least 0."""
    if not 0 <= weight < float("inf"):
        raise ConfigError(f"{name}: expected a finite number >= 0, found {weight}.")


def maximising(attack: Attack, objective: Objective) -> Attack:
    """The attack on another objective, as training uses it.

    Raises:
        ConfigError: The attack has no objective to choose.
    """
    names = {entry.name for entry in fields(attack)}
    if "objective" not in names:
        raise ConfigError(
            f"attack: {type(attack).__name__} follows no objective that could be chosen."
        )
    return persistent(replace(attack, objective=objective))  # type: ignore[call-arg]


def persistent(attack: Attack, early_stop: bool = False) -> Attack:
    """The attack as training uses it: all steps are done, and the point with the largest loss is kept.

    Args:
        attack: Any attack; one that has no ``early_stop`` is returned as it is.
        early_stop: True: stop at the first success of each sample.
    """
    if any(entry.name == "early_stop" for entry in fields(attack)):
        return replace(attack, early_stop=early_stop)  # type: ignore[call-arg]
    return attack
