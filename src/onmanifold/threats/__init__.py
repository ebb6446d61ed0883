"""What may change: image, latent and joint balls, and transformations."""

from onmanifold.threats.base import Ball, Region, Threat, Variables
from onmanifold.threats.image import ImageBall
from onmanifold.threats.joint import JointBall
from onmanifold.threats.latent import LatentBall
from onmanifold.threats.transformation import TransformationBall

__all__ = [
    "Ball",
    "ImageBall",
    "JointBall",
    "LatentBall",
    "Region",
    "Threat",
    "TransformationBall",
    "Variables",
]
