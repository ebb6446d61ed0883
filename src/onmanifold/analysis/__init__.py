"""What explains models and manifolds: distances, labels kept, and how good a manifold is."""

from onmanifold.analysis.distance import (
    ManifoldDistance,
    distance_by_neighbours,
    distance_by_projection,
)
from onmanifold.analysis.frechet import frechet_distance
from onmanifold.analysis.nearest import nearest_images
from onmanifold.analysis.quality import Quality, measure_quality
from onmanifold.analysis.validity import NearestClass, keeps_label, nearest_class

__all__ = [
    "ManifoldDistance",
    "NearestClass",
    "Quality",
    "distance_by_neighbours",
    "distance_by_projection",
    "frechet_distance",
    "keeps_label",
    "measure_quality",
    "nearest_class",
    "nearest_images",
]
