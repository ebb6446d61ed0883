"""How the worst case is searched, on any threat model."""

from onmanifold.attacks.apgd import APGD
from onmanifold.attacks.base import Attack, AttackResult
from onmanifold.attacks.engine import Engine
from onmanifold.attacks.gradient import GradientAttack
from onmanifold.attacks.stepped import FGSM, MIA, PGD, ProjectedAdam, RandomPerturbation

__all__ = [
    "APGD",
    "FGSM",
    "MIA",
    "PGD",
    "Attack",
    "AttackResult",
    "Engine",
    "GradientAttack",
    "ProjectedAdam",
    "RandomPerturbation",
]
