"""Terms of bounds as pure functions of tensors, one file a bound: what the tests test is what runs."""

from pyro_voed.bounds.barber_agakov import ba_terms
from pyro_voed.bounds.critic import CriticTerms, donsker_varadhan_terms, info_nce_terms, nwj_terms, tuba_terms
from pyro_voed.bounds.importance import ace_terms, vnmc_terms
from pyro_voed.bounds.laplace import laplace_terms
from pyro_voed.bounds.lbkld import lbkld_terms
from pyro_voed.bounds.nested import nmc_terms, pce_terms
from pyro_voed.bounds.outcome_density import marginal_likelihood_terms, marginal_terms

__all__ = [
    "CriticTerms",
    "ace_terms",
    "ba_terms",
    "donsker_varadhan_terms",
    "info_nce_terms",
    "laplace_terms",
    "lbkld_terms",
    "marginal_likelihood_terms",
    "marginal_terms",
    "nmc_terms",
    "nwj_terms",
    "pce_terms",
    "tuba_terms",
    "vnmc_terms",
]
