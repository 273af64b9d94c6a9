"""Search for the design with the largest expected information gain."""

from pyro_voed.design.constraints import budget, fixed_sum, increasing, min_gap
from pyro_voed.design.cost import per_cost
from pyro_voed.design.exchange import allocation, search_exchange
from pyro_voed.design.optimise import optimise_design
from pyro_voed.design.search import search_grid, search_random
from pyro_voed.design.spsa import search_spsa

__all__ = [
    "allocation",
    "budget",
    "fixed_sum",
    "increasing",
    "min_gap",
    "optimise_design",
    "per_cost",
    "search_exchange",
    "search_grid",
    "search_random",
    "search_spsa",
]
