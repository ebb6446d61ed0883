"""Generators with codes, and the projection of images onto them."""

from onmanifold.manifolds.affine import affine_matrix, warp
from onmanifold.manifolds.base import Chart, Manifold
from onmanifold.manifolds.fonts import FontsManifold, fonts_manifold
from onmanifold.manifolds.project import Projection, project

__all__ = [
    "Chart",
    "FontsManifold",
    "Manifold",
    "Projection",
    "affine_matrix",
    "fonts_manifold",
    "project",
    "warp",
]
