"""Estimators of the expected information gain: one family, one chapter each."""

from pyro_voed.estimators.flow import ba_terms, barber_agakov, eig_flow
from pyro_voed.estimators.marginal import eig_marginal, marginal_terms
from pyro_voed.estimators.nmc import eig_nmc, nmc_terms

__all__ = ["ba_terms", "barber_agakov", "eig_flow", "eig_marginal", "eig_nmc", "marginal_terms", "nmc_terms"]
