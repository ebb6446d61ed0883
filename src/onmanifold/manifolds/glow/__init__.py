"""Glow: the exact manifold of a normalising flow."""

from onmanifold.manifolds.glow.model import Glow, GlowChart

__all__ = ["Glow", "GlowChart"]
