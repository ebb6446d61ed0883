"""Generators with codes, and the projection of images onto them."""

from onmanifold.manifolds.affine import affine_matrix, warp
from onmanifold.manifolds.base import Chart, Manifold
from onmanifold.manifolds.factory import (
    build_manifold,
    load_manifold,
    manifold_metadata,
    save_manifold,
)
from onmanifold.manifolds.fonts import FontsManifold, fonts_manifold
from onmanifold.manifolds.learned import LearnedManifold
from onmanifold.manifolds.project import Projection, project

__all__ = [
    "Chart",
    "FontsManifold",
    "LearnedManifold",
    "Manifold",
    "Projection",
    "affine_matrix",
    "build_manifold",
    "fonts_manifold",
    "load_manifold",
    "manifold_metadata",
    "project",
    "save_manifold",
    "warp",
]
