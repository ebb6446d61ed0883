"""The analyses by name: what `onmanifold analyse` runs. Each module registers its own."""

from onmanifold.experiments.analyses import activation_maps as activation_maps
from onmanifold.experiments.analyses import curves as curves
from onmanifold.experiments.analyses import flow_levels as flow_levels
from onmanifold.experiments.analyses import leaving as leaving
from onmanifold.experiments.analyses import playground as playground
from onmanifold.experiments.analyses import snapshots as snapshots
from onmanifold.experiments.analyses import spectra as spectra
from onmanifold.experiments.analyses import sweep as sweep
from onmanifold.experiments.analyses import theory as theory
from onmanifold.experiments.analyses import transferring as transferring
from onmanifold.experiments.analyses import traversal as traversal
from onmanifold.experiments.analyses import tsipras as tsipras
from onmanifold.experiments.analyses import validity as validity
