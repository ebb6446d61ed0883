"""Which examples to train on and which loss to take: one file per family."""

from onmanifold.training.methods.adversarial import AdversarialTraining
from onmanifold.training.methods.base import Method, Step
from onmanifold.training.methods.dual_manifold import DMAT
from onmanifold.training.methods.mixup import IAT, IJSAT, InputMixup, ManifoldMixup
from onmanifold.training.methods.normal import Normal
from onmanifold.training.methods.random_perturbation import RandomPerturbationTraining
from onmanifold.training.methods.several import JointAdversarialTraining, Staged
from onmanifold.training.methods.trades import MART, TRADES

__all__ = [
    "DMAT",
    "IAT",
    "IJSAT",
    "MART",
    "TRADES",
    "AdversarialTraining",
    "InputMixup",
    "JointAdversarialTraining",
    "ManifoldMixup",
    "Method",
    "Normal",
    "RandomPerturbationTraining",
    "Staged",
    "Step",
]
