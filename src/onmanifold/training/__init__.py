"""Training: methods say which examples and which loss, one loop runs them all."""

from onmanifold.training.config import TrainingConfig
from onmanifold.training.fits import ClosedForm, Fit, FitStep
from onmanifold.training.methods import (
    ATLD,
    DMAT,
    IAT,
    IJSAT,
    MART,
    TRADES,
    AdversarialTraining,
    FeatureScattering,
    InputMixup,
    JointAdversarialTraining,
    LabelSmoothing,
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
    "ATLD",
    "DMAT",
    "IAT",
    "IJSAT",
    "MART",
    "TRADES",
    "AdversarialTraining",
    "ClosedForm",
    "FeatureScattering",
    "Fit",
    "FitResult",
    "FitStep",
    "InputMixup",
    "JointAdversarialTraining",
    "LabelSmoothing",
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
