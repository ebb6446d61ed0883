"""Which examples to train on and which loss to take: one file per family."""

from onmanifold.training.methods.adversarial import AdversarialTraining
from onmanifold.training.methods.base import Method, Step
from onmanifold.training.methods.dual_manifold import DMAT
from onmanifold.training.methods.normal import Normal
from onmanifold.training.methods.random_perturbation import RandomPerturbationTraining

__all__ = [
    "DMAT",
    "AdversarialTraining",
    "Method",
    "Normal",
    "RandomPerturbationTraining",
    "Step",
]
