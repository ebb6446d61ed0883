"""How the worst case is searched: the gradient core and its settings, on any threat model."""

from onmanifold.attacks.base import Attack, AttackResult
from onmanifold.attacks.engine import Engine
from onmanifold.attacks.gradient import (
    FGSM,
    MIA,
    PGD,
    GradientAttack,
    ProjectedAdam,
    RandomPerturbation,
)

__all__ = [
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
