"""Search for the design with the largest expected information gain."""

from pyro_voed.design.optimise import optimise_design
from pyro_voed.design.search import search_grid, search_random
from pyro_voed.design.spsa import search_spsa

__all__ = ["optimise_design", "search_grid", "search_random", "search_spsa"]
