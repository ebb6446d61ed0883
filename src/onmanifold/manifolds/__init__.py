"""Generators with codes, and the projection of images onto them."""

from onmanifold.manifolds.affine import affine_matrix, warp
from onmanifold.manifolds.base import Chart, Manifold
from onmanifold.manifolds.cvae import CVAE
from onmanifold.manifolds.encoder import load_encoder, save_encoder, train_encoder
from onmanifold.manifolds.factory import (
    build_manifold,
    load_manifold,
    manifold_metadata,
    save_manifold,
)
from onmanifold.manifolds.fonts import FontsManifold, fonts_manifold
from onmanifold.manifolds.glow import Glow
from onmanifold.manifolds.learned import LearnedManifold
from onmanifold.manifolds.perceptual import (
    FeatureDistance,
    PerceptualDistance,
    PyramidDistance,
    perceptual_distance,
)
from onmanifold.manifolds.ppca import PPCA
from onmanifold.manifolds.project import PROJECTIONS, Projection, ProjectionConfig, project
from onmanifold.manifolds.sngan import SNGAN
from onmanifold.manifolds.stylegan import StyleGAN
from onmanifold.manifolds.vae_gan import VAEGAN

__all__ = [
    "CVAE",
    "PPCA",
    "PROJECTIONS",
    "SNGAN",
    "VAEGAN",
    "Chart",
    "FeatureDistance",
    "FontsManifold",
    "Glow",
    "LearnedManifold",
    "Manifold",
    "PerceptualDistance",
    "Projection",
    "ProjectionConfig",
    "PyramidDistance",
    "StyleGAN",
    "affine_matrix",
    "build_manifold",
    "fonts_manifold",
    "load_encoder",
    "load_manifold",
    "manifold_metadata",
    "perceptual_distance",
    "project",
    "save_encoder",
    "save_manifold",
    "train_encoder",
    "warp",
]
