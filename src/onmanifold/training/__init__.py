"""Training: methods say which examples and which loss, one loop runs them all."""

from onmanifold.training.config import TrainingConfig
from onmanifold.training.examples import training_examples
from onmanifold.training.fits import ClosedForm, Fit, FitStep
from onmanifold.training.methods import (
    ATLD,
    AWP,
    DMAT,
    IAT,
    IJSAT,
    MART,
    RLAT,
    SAM,
    TRADES,
    VAT,
    AdversarialTraining,
    AdvProp,
    Cutout,
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
from onmanifold.training.state import snapshots_of

__all__ = [
    "ATLD",
    "AWP",
    "DMAT",
    "IAT",
    "IJSAT",
    "MART",
    "RLAT",
    "SAM",
    "TRADES",
    "VAT",
    "AdvProp",
    "AdversarialTraining",
    "ClosedForm",
    "Cutout",
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
    "snapshots_of",
    "train",
    "training_examples",
]
