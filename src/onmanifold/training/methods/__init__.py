"""Which examples to train on and which loss to take: one file per family."""

from onmanifold.training.methods.adversarial import AdversarialTraining
from onmanifold.training.methods.advprop import AdvProp
from onmanifold.training.methods.atld import ATLD
from onmanifold.training.methods.base import Method, Step
from onmanifold.training.methods.cutout import Cutout
from onmanifold.training.methods.dual_manifold import DMAT
from onmanifold.training.methods.feature_scattering import FeatureScattering
from onmanifold.training.methods.label_smoothing import LabelSmoothing
from onmanifold.training.methods.mixup import IAT, IJSAT, InputMixup, ManifoldMixup
from onmanifold.training.methods.normal import Normal
from onmanifold.training.methods.random_perturbation import RandomPerturbationTraining
from onmanifold.training.methods.rlat import RLAT
from onmanifold.training.methods.several import JointAdversarialTraining, Staged
from onmanifold.training.methods.trades import MART, TRADES
from onmanifold.training.methods.virtual_adversarial import VAT
from onmanifold.training.methods.weight_perturbation import AWP, SAM

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
    "Cutout",
    "FeatureScattering",
    "InputMixup",
    "JointAdversarialTraining",
    "LabelSmoothing",
    "ManifoldMixup",
    "Method",
    "Normal",
    "RandomPerturbationTraining",
    "Staged",
    "Step",
]
