"""Training: methods say which examples and which loss, one loop runs them all."""

from onmanifold.training.config import TrainingConfig
from onmanifold.training.methods import (
    DMAT,
    AdversarialTraining,
    Method,
    Normal,
    RandomPerturbationTraining,
    Step,
)
from onmanifold.training.run import TrainingResult, train

__all__ = [
    "DMAT",
    "AdversarialTraining",
    "Method",
    "Normal",
    "RandomPerturbationTraining",
    "Step",
    "TrainingConfig",
    "TrainingResult",
    "train",
]
