"""Estimators of the expected information gain: one family, one chapter each."""

from pyro_voed.bounds.critic import donsker_varadhan, info_nce, nwj, tuba
from pyro_voed.estimators.amortised import AmortisedEIG, amortise_eig
from pyro_voed.estimators.ba import eig_ba
from pyro_voed.estimators.critic import critic_objective, eig_critic
from pyro_voed.estimators.exact import eig_exact
from pyro_voed.estimators.flow import eig_flow
from pyro_voed.estimators.importance import adaptive_contrastive, eig_ace, eig_vnmc
from pyro_voed.estimators.laplace import eig_laplace
from pyro_voed.estimators.lbkld import eig_lbkld
from pyro_voed.estimators.marginal import eig_marginal
from pyro_voed.estimators.marginal_likelihood import eig_marginal_likelihood
from pyro_voed.estimators.nmc import eig_nmc
from pyro_voed.estimators.objective import Objective
from pyro_voed.estimators.outcome_density import marginal_saddle
from pyro_voed.estimators.pce import eig_pce, prior_contrastive
from pyro_voed.estimators.posterior import barber_agakov
from pyro_voed.estimators.proposals import LaplaceProposal, laplace_proposal

__all__ = [
    "AmortisedEIG",
    "LaplaceProposal",
    "Objective",
    "adaptive_contrastive",
    "amortise_eig",
    "barber_agakov",
    "critic_objective",
    "donsker_varadhan",
    "eig_ace",
    "eig_ba",
    "eig_critic",
    "eig_exact",
    "eig_flow",
    "eig_laplace",
    "eig_lbkld",
    "eig_marginal",
    "eig_marginal_likelihood",
    "eig_nmc",
    "eig_pce",
    "eig_vnmc",
    "info_nce",
    "laplace_proposal",
    "marginal_saddle",
    "nwj",
    "prior_contrastive",
    "tuba",
]
