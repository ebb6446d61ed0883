"""What a training trains: its networks, the losses they take in turn, and what is measured and kept of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from onmanifold.data.dataset import Batch
from onmanifold.training.share import Share

if TYPE_CHECKING:
    from onmanifold.data.dataset import Dataset

Turn = Mapping[str, Tensor]
"""The losses () of the players that move at once, by name; each follows its own."""


@dataclass(frozen=True)
class Place:
    """Where a step stands in its training.

    Attributes:
        epoch: From 0.
        number: Of the step, from 0, over all epochs.
        total: Number of steps in all.
        seed: Of what is random per sample; another in each epoch.
        share: Of this process in the step's images.
        summed: Sums a tensor over the processes.
    """

    epoch: int
    number: int
    total: int
    seed: int
    share: float = 1.0
    summed: Callable[[Tensor], Tensor] = lambda tensor: tensor


@dataclass
class Record:
    """Sums and counts of what is logged, by name, on the device; a mean is their quotient."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, total: Tensor, count: int) -> None:
        """Add ``count`` values whose sum () is ``total``."""
        total = total.detach().double()
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.counts[name] = self.counts.get(name, 0) + count


class Task(ABC):
    """What the loop trains. The loop knows neither classifiers nor manifolds.

    Args:
        model: What is trained, averaged, validated and kept.
        players: The networks that move, by name, each with an optimizer of its own: parts of the model, the
            model itself, or others such as a discriminator. No parameter belongs to two.

    Attributes:
        model: See above; moved to the device in place.
        players: See above.
        rates: Factors on the learning rate, for players whose factor is not 1.
        convolutional: Whether images and weights shall have the memory format in which convolutions are fastest.
        autocast: Makes the context in which networks are called, as the precision of the training asks.
    """

    def __init__(self, model: nn.Module, players: Mapping[str, nn.Module]) -> None:
        self.model, self.players = model, dict(players)
        self.rates: Mapping[str, float] = {}
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.convolutional = any(isinstance(part, nn.Conv2d) for part in model.modules())

    @property
    def modules(self) -> dict[str, nn.Module]:
        """All networks, by name, each once: the model, and the players that are no part of it."""
        inside = set(self.model.modules())
        others = {name: part for name, part in self.players.items() if part not in inside}
        return {"model": self.model, **others}

    @abstractmethod
    def turns(self, batch: Batch, place: Place, record: Record) -> Iterator[Turn]:
        """Yield the losses of each turn of a step; the loop lets the players move, then goes on here."""

    def start(self, batch: Batch) -> None:  # noqa: B027 - not every task needs one
        """What depends on data before the first step of all; the batch is the first one."""

    @abstractmethod
    def validate(
        self, model: nn.Module, held_out: Dataset | None, seed: int, share: Share
    ) -> dict[str, float | None]:
        """Figures of the model on held-out images, by name; all None, or none, where there are no images."""

    @abstractmethod
    def score(self, entry: Mapping[str, Any]) -> float | None:
        """What the best epoch has the most of, from its entry of the history; None: later is better."""

    @abstractmethod
    def keep(self, model: nn.Module, path: Path, metadata: Mapping[str, Any]) -> None:
        """Write the model's file, and what belongs to it beside it."""

    def keep_model(self, model: nn.Module, path: Path, metadata: Mapping[str, Any]) -> None:
        """Write the model's file alone; several may stand in one folder."""
        self.keep(model, path, metadata)

    @abstractmethod
    def restore(self, path: Path) -> None:
        """Load the weights from what `keep` wrote."""

    def illustrate(  # noqa: B027 - not every task has some
        self, model: nn.Module, held_out: Dataset | None, directory: Path, epoch: int
    ) -> None:
        """Write pictures of where the training stands, after an epoch (from 1)."""
