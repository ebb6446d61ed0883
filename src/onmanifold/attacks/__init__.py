"""How the worst case is searched, on any threat model."""

from onmanifold.attacks.apgd import APGD
from onmanifold.attacks.autoattack import AutoAttack
from onmanifold.attacks.base import Attack, AttackResult
from onmanifold.attacks.carlini_wagner import CarliniWagner
from onmanifold.attacks.engine import Engine
from onmanifold.attacks.fab import FAB
from onmanifold.attacks.gradient import GradientAttack
from onmanifold.attacks.perceptual import FastLPA
from onmanifold.attacks.rays import RayS, adbd
from onmanifold.attacks.square import Square
from onmanifold.attacks.stepped import FGSM, MIA, PGD, ProjectedAdam, RandomPerturbation

__all__ = [
    "APGD",
    "FAB",
    "FGSM",
    "MIA",
    "PGD",
    "Attack",
    "AttackResult",
    "AutoAttack",
    "CarliniWagner",
    "Engine",
    "FastLPA",
    "GradientAttack",
    "ProjectedAdam",
    "RandomPerturbation",
    "RayS",
    "Square",
    "adbd",
]
