"""Learning a manifold: the task behind `fit`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from onmanifold.data.dataset import Batch
from onmanifold.foundation.files import write_atomically
from onmanifold.foundation.modules import device_of, dtype_of
from onmanifold.foundation.pictures import image_grid
from onmanifold.manifolds.base import Manifold
from onmanifold.manifolds.factory import load_manifold, save_manifold
from onmanifold.training.fits.base import Fit, FitStep
from onmanifold.training.share import Share
from onmanifold.training.task import Place, Record, Task, Turn

if TYPE_CHECKING:
    from onmanifold.data.dataset import Dataset

_BATCH_SIZE = 250
_COLUMNS = 10
_SEED = 0


class Fitting(Task):
    """A manifold and the fit that it is learned by.

    Args:
        fit: Which losses its players take.
        manifold: Trained in place.
        metadata: What is saved with the manifold.
    """

    model: Manifold

    def __init__(self, fit: Fit, manifold: Manifold, metadata: Mapping[str, Any]) -> None:
        super().__init__(manifold, fit.players(manifold))
        self.fit, self.metadata = fit, dict(metadata)
        self.rates = fit.rates()

    def start(self, batch: Batch) -> None:
        """What the fit does with the first images."""
        with torch.no_grad():
            self.fit.start(self.model, batch.images, batch.labels)

    def turns(self, batch: Batch, place: Place, record: Record) -> Iterator[Turn]:
        """The fit's losses, turn by turn, and what it logs."""
        step = FitStep(
            *(self.model, self.players, batch.images, batch.labels, batch.indices),
            *(place.epoch, place.number, place.total, place.seed),
        )
        turns = self.fit.turns(step)
        while True:
            with self.autocast():
                turn = next(turns, None)
            if turn is None:
                break
            yield turn
        for name, mean in step.metrics.items():
            record.add(name, mean * len(batch.images), len(batch.images))

    @torch.no_grad()
    def validate(
        self, model: nn.Module, held_out: Dataset | None, seed: int, share: Share
    ) -> dict[str, float | None]:
        """Means of the fit's figures over the held-out images."""
        if held_out is None:
            return {}
        manifold = _as_manifold(model).eval()
        dtype = dtype_of(manifold)
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
        for positions in torch.split(share.of(len(held_out)), _BATCH_SIZE):
            images, labels, _, indices = held_out.batch(positions)
            figures = self.fit.validate(manifold, images.to(dtype), labels, indices, seed)
            for name, values in figures.items():
                sums[name] += torch.tensor([values.double().sum(), len(values)]).double()
        # Every process has images, so that all know the same names.
        means = {name: share.total(parts) for name, parts in sorted(sums.items())}
        return {name: (total / count).item() for name, (total, count) in means.items()}

    def score(self, entry: Mapping[str, Any]) -> float | None:
        """The less of the fit's score, the better."""
        if self.fit.score is None:
            return None
        value = entry.get(f"validation_{self.fit.score}")
        return None if value is None else -float(value)

    def keep(self, model: nn.Module, path: Path, metadata: Mapping[str, Any]) -> None:
        save_manifold(_as_manifold(model), path, self.metadata | dict(metadata))

    def restore(self, path: Path) -> None:
        load_manifold(path, self.model)

    @torch.no_grad()
    def illustrate(
        self, model: nn.Module, held_out: Dataset | None, directory: Path, epoch: int
    ) -> None:
        """A picture of samples, always of the same codes; ten of a class to a column where there are classes."""
        manifold = _as_manifold(model).eval()
        classes = getattr(manifold, "num_classes", _COLUMNS)
        columns = min(classes, _COLUMNS)
        labels = torch.arange(8 * columns, device=device_of(manifold)) % columns
        codes = manifold.sample_codes(labels, _SEED).to(dtype_of(manifold))
        picture = image_grid(manifold.decode(codes).float().cpu(), columns)
        write_atomically(directory / f"epoch-{epoch:04d}.png", picture)


def _as_manifold(model: nn.Module) -> Manifold:
    assert isinstance(model, Manifold)
    return model
