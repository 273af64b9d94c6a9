"""Conditional densities of vectors.

In the order in which a theta meets them: `standardised` scales it, `gaussian` whitens it, `coupling` bends its
`halves` through the maps of `elementwise` and `spline`; `distribution` makes the result a Pyro distribution and
`contract` lets densities of other libraries in. `stacked` trains many of one structure at once, `rebuilding` turns them
into plain data and back. `critics` score pairs instead.
"""

from pyro_voed.densities.classifier import Classifier, MixedDensity
from pyro_voed.densities.contract import ConditionalDensity, as_density
from pyro_voed.densities.coupling import AffineCouplingFlow, SplineCouplingFlow
from pyro_voed.densities.distribution import FlowDistribution
from pyro_voed.densities.spline import rational_quadratic_spline
from pyro_voed.densities.stacked import StackedDensity
from pyro_voed.densities.standardise import Standardise
from pyro_voed.densities.standardised import StandardisedDensity
from pyro_voed.densities.whitening import Whitening

__all__ = [
    "AffineCouplingFlow",
    "Classifier",
    "ConditionalDensity",
    "FlowDistribution",
    "MixedDensity",
    "SplineCouplingFlow",
    "StackedDensity",
    "Standardise",
    "StandardisedDensity",
    "Whitening",
    "as_density",
    "rational_quadratic_spline",
]
