"""What may change: image, latent and joint balls, transformations, and the unforeseen attacks' effects."""

from onmanifold.threats.base import Ball, Region, Threat, Variables
from onmanifold.threats.elastic import Elastic
from onmanifold.threats.fog import Fog
from onmanifold.threats.gabor import Gabor
from onmanifold.threats.image import ImageBall
from onmanifold.threats.joint import JointBall
from onmanifold.threats.jpeg import JPEG
from onmanifold.threats.latent import LatentBall
from onmanifold.threats.perceptual import PerceptualBall
from onmanifold.threats.snow import Snow
from onmanifold.threats.transformation import TransformationBall

__all__ = [
    "JPEG",
    "Ball",
    "Elastic",
    "Fog",
    "Gabor",
    "ImageBall",
    "JointBall",
    "LatentBall",
    "PerceptualBall",
    "Region",
    "Snow",
    "Threat",
    "TransformationBall",
    "Variables",
]
