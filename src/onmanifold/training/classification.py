"""Training a classifier by a method: the task behind `train`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from onmanifold.classifiers import load_classifier, save_classifier
from onmanifold.data.dataset import Batch
from onmanifold.foundation.errors import ConfigError
from onmanifold.foundation.weights import fill_module, read_module, write_module
from onmanifold.training.config import TrainingConfig
from onmanifold.training.methods.base import Method, Step
from onmanifold.training.share import Share
from onmanifold.training.task import Place, Record, Task, Turn
from onmanifold.training.validation import validate

if TYPE_CHECKING:
    from onmanifold.data.dataset import Dataset


# What files and parts of a training are called already.
_RESERVED = {"average", "best", "classifier", "last", "model"}


class Classification(Task):
    """A classifier and the method that it is trained by.

    Args:
        method: What loss is taken.
        classifier: Trained in place.
        config: Says how robust accuracy is validated, and the precision of attacks.
        image: (1, C, H, W), from which a method sees the shapes inside the classifier.
    """

    def __init__(
        self, method: Method, classifier: nn.Module, config: TrainingConfig, image: Tensor
    ) -> None:
        self.others = method.players(classifier, image)
        for name in self.others:
            if not name.isidentifier() or name in _RESERVED:
                raise ConfigError(
                    f"players: {type(method).__name__} calls one {name!r}; expected an identifier other than "
                    f"{', '.join(sorted(_RESERVED))}."
                )
        super().__init__(classifier, {"classifier": classifier, **self.others})
        self.method, self.config, self.rates = method, config, method.rates()
        self._compiled = torch.compile(classifier) if config.compile else classifier

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) in the precision of the training, as the default dtype."""
        with self.autocast():
            logits: Tensor = self._compiled(images)
        return logits.to(torch.get_default_dtype())

    def turns(self, batch: Batch, place: Place, record: Record) -> Iterator[Turn]:
        """The method's losses."""
        images, labels, codes, indices = batch
        step = Step(
            *(self.forward, self.model, images, labels, codes, indices),
            *(
                place.epoch,
                place.seed,
                self.config.engine,
                self.others,
                (place.share, place.summed),
            ),
        )
        yield from self.method.turns(step)
        record.add("accuracy", step.correct, step.counted)

    def validate(
        self, model: nn.Module, held_out: Dataset | None, seed: int, share: Share
    ) -> dict[str, float | None]:
        """Clean accuracy, and the accuracy under all of the attacks."""
        clean: float | None = None
        robust: float | None = None
        if held_out is not None:
            chosen = self.config.validation_attack
            attacks = self.method.attacks if chosen is None else [chosen]
            clean, robust = validate(
                model, held_out, attacks, seed=seed, engine=self.config.engine, share=share
            )
        return {"accuracy": clean, "robust_accuracy": robust}

    def score(self, entry: Mapping[str, Any]) -> float | None:
        """Robust accuracy where it is measured, else clean accuracy."""
        clean, robust = entry["validation_accuracy"], entry["validation_robust_accuracy"]
        score: float | None = clean if robust is None else robust
        return score

    def keep(self, model: nn.Module, path: Path, metadata: Mapping[str, Any]) -> None:
        """Write the classifier's file, and beside it one for each of the method's own networks, by its name."""
        for name, part in self.others.items():
            spec = getattr(part, "spec", None)
            write_module(name, part, _beside(path, name), spec, metadata)
        self.keep_model(model, path, metadata)

    def keep_model(self, model: nn.Module, path: Path, metadata: Mapping[str, Any]) -> None:
        save_classifier(model, path, metadata)

    def restore(self, path: Path) -> None:
        for name, part in self.others.items():
            file = _beside(path, name)
            fill_module(part, read_module(name, file).weights, file)
        load_classifier(path, self.model)


def _beside(path: Path, name: str) -> Path:
    return path.with_name(f"{name}.safetensors")
