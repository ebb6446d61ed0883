"""Training: methods say which examples and which loss, one loop runs them all."""

from onmanifold.training.config import TrainingConfig
from onmanifold.training.fits import ClosedForm, Fit, FitStep
from onmanifold.training.methods import (
    DMAT,
    AdversarialTraining,
    Method,
    Normal,
    RandomPerturbationTraining,
    Step,
)
from onmanifold.training.run import TrainingResult, train
from onmanifold.training.run_fit import FitResult, fit

__all__ = [
    "DMAT",
    "AdversarialTraining",
    "ClosedForm",
    "Fit",
    "FitResult",
    "FitStep",
    "Method",
    "Normal",
    "RandomPerturbationTraining",
    "Step",
    "TrainingConfig",
    "TrainingResult",
    "fit",
    "train",
]
