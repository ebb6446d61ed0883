"""Generators with codes, and the projection of images onto them."""
