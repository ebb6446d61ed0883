"""What explains models and manifolds: distances, tangents, labels kept, spectra, sweeps, maps, quality."""

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
from onmanifold.analysis.playground import (
    Grid,
    Perturbed,
    distribution_shift,
    grid_logits,
    margins,
    measure_perturbation,
)
from onmanifold.analysis.quality import Quality, measure_quality
from onmanifold.analysis.separation import Separation, separation
from onmanifold.analysis.spectra import (
    ClassSpectra,
    VarianceComparison,
    class_directions,
    class_spectra,
    compare_variances,
)
from onmanifold.analysis.tangent import TangentParts, tangent_parts, tangent_share
from onmanifold.analysis.traversal import Traversal, principal_directions, traverse
from onmanifold.analysis.validity import (
    LabelCheck,
    NearestClass,
    check_label,
    keeps_label,
    nearest_class,
    nearest_of_class,
)

__all__ = [
    "ClassSpectra",
    "Correlation",
    "Grid",
    "LabelCheck",
    "LevelAttack",
    "Line",
    "ManifoldDistance",
    "NearestClass",
    "Perturbed",
    "Quality",
    "Relation",
    "Separation",
    "TangentParts",
    "Traversal",
    "VarianceComparison",
    "activation_maps",
    "agreement",
    "attack_levels",
    "check_label",
    "class_directions",
    "class_spectra",
    "compare_variances",
    "correlate",
    "correlations_table",
    "distance_by_neighbours",
    "distance_by_projection",
    "distribution_shift",
    "frechet_distance",
    "grid_logits",
    "keeps_label",
    "last_convolution",
    "margins",
    "mean_frequency",
    "measure_perturbation",
    "measure_quality",
    "nearest_class",
    "nearest_images",
    "nearest_of_class",
    "principal_directions",
    "regress",
    "relate",
    "separation",
    "share_inside",
    "slopes_table",
    "success_rate",
    "tangent_parts",
    "tangent_share",
    "traverse",
]
