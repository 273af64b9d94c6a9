"""Figures of what the library returns.

Every `plot_*` takes a result, draws on the axes it is given (or on a new figure) and returns them, so that titles,
limits and files stay the caller's.
"""

from pyro_voed.plots.calibration import plot_coverage, plot_recovery, plot_sbc, plot_tarp
from pyro_voed.plots.certificates import plot_certificate
from pyro_voed.plots.comparisons import plot_comparison
from pyro_voed.plots.estimates import plot_design_path, plot_eig, plot_realisations, plot_training
from pyro_voed.plots.posteriors import plot_posterior_grid, plot_posterior_pair
from pyro_voed.plots.surfaces import plot_eig_surface

__all__ = [
    "plot_certificate",
    "plot_comparison",
    "plot_coverage",
    "plot_design_path",
    "plot_eig",
    "plot_eig_surface",
    "plot_posterior_grid",
    "plot_posterior_pair",
    "plot_realisations",
    "plot_recovery",
    "plot_sbc",
    "plot_tarp",
    "plot_training",
]
