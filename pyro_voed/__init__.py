"""Bayesian optimal experimental design for Pyro programs, with normalising-flow posteriors.

The modules in the order in which data flow through them:

* `resolve`, `probes`, `sites`, `programs`: from a model and labels to a checked experiment;
* `simulate`: draws of targets and outcomes, packed, with their log densities;
* `summaries`: learned statistics of outcomes; `densities`: conditional flows; `training`: the one loop that fits them;
* `estimators`: expected information gain, one chapter an estimator;
* `design`: search for the best design, by gradients or without;
* `budgets`, `comparison`: estimators side by side at equal budgets;
* `inference`: posteriors of one outcome, by the trained flow, NUTS, SMC or ABC;
* `diagnostics`: can a posterior be trusted?
* `results`, `plots`: what comes back, and pictures of it;
* `problems`: ready models with known answers.
"""

from pyro_voed.compare.comparison import compare_estimators
from pyro_voed.design import optimise_design, search_grid, search_random, search_spsa
from pyro_voed.estimators import (
    AmortisedEIG,
    Objective,
    adaptive_contrastive,
    amortise_eig,
    barber_agakov,
    certify,
    critic_objective,
    eig_ace,
    eig_ba,
    eig_critic,
    eig_flow,
    eig_laplace,
    eig_lbkld,
    eig_marginal,
    eig_marginal_likelihood,
    eig_nmc,
    eig_pce,
    eig_vnmc,
    info_nce,
    laplace_proposal,
    marginal_saddle,
    max_regret,
    nwj,
    prior_contrastive,
)
from pyro_voed.experiment.resolve import resolve
from pyro_voed.experiment.simulate import JointSample, sample_joint
from pyro_voed.experiment.sites import Experiment
from pyro_voed.inference import abc_posterior, flow_guide, flow_posterior, nuts_posterior, smc_posterior
from pyro_voed.results import Certificate, DesignResult, EIGResult, FitHistory, PosteriorSample

__version__ = "0.1.0"

__all__ = [
    "AmortisedEIG",
    "Certificate",
    "DesignResult",
    "EIGResult",
    "Experiment",
    "FitHistory",
    "JointSample",
    "Objective",
    "PosteriorSample",
    "abc_posterior",
    "adaptive_contrastive",
    "amortise_eig",
    "barber_agakov",
    "certify",
    "compare_estimators",
    "critic_objective",
    "eig_ace",
    "eig_ba",
    "eig_critic",
    "eig_flow",
    "eig_laplace",
    "eig_lbkld",
    "eig_marginal",
    "eig_marginal_likelihood",
    "eig_nmc",
    "eig_pce",
    "eig_vnmc",
    "flow_guide",
    "flow_posterior",
    "info_nce",
    "laplace_proposal",
    "marginal_saddle",
    "max_regret",
    "nuts_posterior",
    "nwj",
    "optimise_design",
    "prior_contrastive",
    "resolve",
    "sample_joint",
    "search_grid",
    "search_random",
    "search_spsa",
    "smc_posterior",
]
