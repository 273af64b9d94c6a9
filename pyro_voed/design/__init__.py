"""Search for the design with the largest expected information gain."""

from pyro_voed.design.optimise import optimise_design

__all__ = ["optimise_design"]
