"""Training: methods say which examples and which loss, one loop runs them all."""

from onmanifold.training.config import TrainingConfig
from onmanifold.training.fits import ClosedForm, Fit, FitStep
from onmanifold.training.methods import (
    DMAT,
    IAT,
    IJSAT,
    MART,
    TRADES,
    AdversarialTraining,
    InputMixup,
    JointAdversarialTraining,
    ManifoldMixup,
    Method,
    Normal,
    RandomPerturbationTraining,
    Staged,
    Step,
)
from onmanifold.training.run import TrainingResult, train
from onmanifold.training.run_fit import FitResult, fit

__all__ = [
    "DMAT",
    "IAT",
    "IJSAT",
    "MART",
    "TRADES",
    "AdversarialTraining",
    "ClosedForm",
    "Fit",
    "FitResult",
    "FitStep",
    "InputMixup",
    "JointAdversarialTraining",
    "ManifoldMixup",
    "Method",
    "Normal",
    "RandomPerturbationTraining",
    "Staged",
    "Step",
    "TrainingConfig",
    "TrainingResult",
    "fit",
    "train",
]
