"""What explains models and manifolds: distances, labels kept, how good a manifold is, what goes together."""

from onmanifold.analysis.activation_maps import (
    activation_maps,
    agreement,
    last_convolution,
    share_inside,
)
from onmanifold.analysis.distance import (
    ManifoldDistance,
    distance_by_neighbours,
    distance_by_projection,
)
from onmanifold.analysis.flow_levels import LevelAttack, attack_levels, mean_frequency
from onmanifold.analysis.frechet import frechet_distance
from onmanifold.analysis.generalisation import (
    Correlation,
    Line,
    Relation,
    correlate,
    correlations_table,
    regress,
    relate,
    slopes_table,
    success_rate,
)
from onmanifold.analysis.nearest import nearest_images
from onmanifold.analysis.quality import Quality, measure_quality
from onmanifold.analysis.traversal import Traversal, principal_directions, traverse
from onmanifold.analysis.validity import NearestClass, keeps_label, nearest_class

__all__ = [
    "Correlation",
    "LevelAttack",
    "Line",
    "ManifoldDistance",
    "NearestClass",
    "Quality",
    "Relation",
    "Traversal",
    "activation_maps",
    "agreement",
    "attack_levels",
    "correlate",
    "correlations_table",
    "distance_by_neighbours",
    "distance_by_projection",
    "frechet_distance",
    "keeps_label",
    "last_convolution",
    "mean_frequency",
    "measure_quality",
    "nearest_class",
    "nearest_images",
    "principal_directions",
    "regress",
    "relate",
    "share_inside",
    "slopes_table",
    "success_rate",
    "traverse",
]
