"""How a training is run, whatever its method."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from onmanifold.attacks import Attack
from onmanifold.attacks.engine import Engine, Precision
from onmanifold.data.augment import Augmentation
from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.registry import Component, describe
from onmanifold.training.schedules import Exponential, Schedule

_WITHOUT_EFFECT = (
    *("checkpoint_epochs", "checkpoint_minutes", "snapshot_epochs"),
    *("compile", "loss_limit", "threads"),
)


@dataclass(frozen=True)
class TrainingConfig(Component):
    """How a training is run; the defaults are those of Disentangling, section 3.1.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images per step, over all processes. An epoch is cut into batches of nearly equal size,
            none larger than this, so that no image is left out and no batch is tiny.
        optimizer: "adam", "adamax" or "sgd".
        learning_rate: At factor 1 of the schedule.
        schedule: "constant", "exponential", "step", "cyclic" or "cosine", with its fields as a mapping.
        momentum: Of SGD.
        nesterov: Whether SGD's momentum is Nesterov's.
        betas: Of Adam and Adamax; the released code of Disentangling has (0.5, 0.9).
        weight_decay: Added to the gradient as weight_decay · weight, for all weights.
        gradient_clip: Largest Euclidean norm of the gradient; None: not clipped.
        ema: Decay of the moving average of the weights, such as 0.995; the average is then what is validated
            and kept. None: no average.
        precision: "32-true", "bf16-mixed" (bfloat16 autocast) or "64-true".
        attack_precision: "32" or "bf16" for the attacks in training; None: as each attack's engine says.
        compile: Whether to compile the classifier with torch.compile, in training and for the attacks: slow at
            first, then faster on a GPU.
        augmentation: Flips and crops, such as ``{flip: true, crop_padding: 4}``; None: none. Augmented images
            lose their stored codes, which are no longer theirs.
        validation_fraction: Share of the training images that is held out to choose the best checkpoint.
            0: none, and the last weights are the result.
        validation_attack: What robust validation accuracy is measured with; None: the method's own attacks,
            a sample being robust that withstands each. A method without attacks is judged by clean accuracy.
        checkpoint_epochs: Epochs between checkpoints; there is always one at the end.
        checkpoint_minutes: Minutes after which a checkpoint is written inside an epoch.
        snapshot_epochs: Epochs between snapshots: ``snapshots/epoch-0004.safetensors`` in the training's directory
            holds the weights as they were then, the averaged ones where there is an average. There is always one
            at the end. None: none are kept. They change nothing of what is trained.
        loss_limit: A larger loss counts as diverged.
        threads: CPU threads; None: 1 for a model so small that handing work around costs more than it saves,
            else as set outside.

    >>> TrainingConfig(epochs=3).learning_rate
    0.01
    """

    epochs: int = 20
    batch_size: int = 100
    optimizer: Literal["adam", "adamax", "sgd"] = "adam"
    learning_rate: float = 0.01
    schedule: Schedule = Exponential(decay=0.95)
    momentum: float = 0.9
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    gradient_clip: float | None = None
    ema: float | None = None
    precision: Literal["32-true", "bf16-mixed", "64-true"] = "32-true"
    attack_precision: Precision | None = None
    compile: bool = False
    augmentation: Augmentation | None = None
    validation_fraction: float = 0.05
    validation_attack: Attack | None = None
    checkpoint_epochs: int = 1
    checkpoint_minutes: float = 10.0
    snapshot_epochs: int | None = None
    loss_limit: float = 1000.0
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "checkpoint_epochs"):
            self._check(name, getattr(self, name) >= 1, "an integer >= 1")
        for name in ("learning_rate", "weight_decay", "checkpoint_minutes"):
            self._check(name, 0 <= getattr(self, name) < math.inf, "a finite number >= 0")
        self._check("momentum", 0 <= self.momentum < 1, "a number in [0, 1)")
        self._check("nesterov", not self.nesterov or self.momentum > 0, "a momentum > 0 beside it")
        self._check("betas", all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)")
        self._check(
            "gradient_clip", self.gradient_clip is None or self.gradient_clip > 0, "a number > 0"
        )
        self._check("ema", self.ema is None or 0 < self.ema < 1, "a number in (0, 1)")
        self._check("validation_fraction", 0 <= self.validation_fraction < 1, "a number in [0, 1)")
        self._check("loss_limit", self.loss_limit > 0, "a number > 0")
        for name in ("snapshot_epochs", "threads"):
            value = getattr(self, name)
            self._check(name, value is None or value >= 1, "an integer >= 1")

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that decide what comes out of a training, and not only how it is run."""
        return {key: value for key, value in describe(self).items() if key not in _WITHOUT_EFFECT}

    def engine(self, own: Engine) -> Engine:
        """How an attack in the training runs the model: its own way, but for what is set here."""
        precision = own.precision if self.attack_precision is None else self.attack_precision
        return replace(own, precision=precision, compile=own.compile or self.compile)

    def _check(self, name: str, right: bool, expected: str) -> None:
        if not right:
            raise ConfigError(f"{name}: expected {expected}, found {getattr(self, name)!r}.")
