"""Bayesian optimal experimental design for Pyro programs, with normalising-flow posteriors.

The folders in the order in which data flow through them:

* `experiment`: a Pyro program read, probed and checked once; simulated, packed and scored;
* `summaries`: learned statistics of outcomes; `densities`: conditional flows; `training`: the one loop that fits them;
* `bounds`: terms of bounds, as pure functions of tensors;
* `estimators`: expected information gain, one chapter an estimator, all on one driver; `certificates`: both sides;
* `design`: search for the best design, by gradients or without;
* `inference`: posteriors of one outcome by the trained flow, and references by NUTS, SMC and ABC;
* `diagnostics`: can a posterior be trusted? `compare`: estimators side by side at equal budgets;
* `censored`: a distribution of readings with limits, for models;
* `results`, `saving`, `plots`: what comes back, files of it, and pictures;
* `problems`: ready models with known answers.
"""

from pyro_voed.censored import Censored
from pyro_voed.certificates import certify, max_regret
from pyro_voed.compare.comparison import compare_estimators
from pyro_voed.design import (
    allocation,
    budget,
    fixed_sum,
    increasing,
    min_gap,
    optimise_design,
    per_cost,
    search_exchange,
    search_grid,
    search_random,
    search_spsa,
)
from pyro_voed.estimators import (
    AmortisedEIG,
    Objective,
    adaptive_contrastive,
    amortise_eig,
    barber_agakov,
    critic_objective,
    eig_ace,
    eig_ba,
    eig_critic,
    eig_exact,
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
    nwj,
    prior_contrastive,
)
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.packing import JointSample
from pyro_voed.experiment.sampling import sample_joint
from pyro_voed.inference import abc_posterior, flow_guide, flow_posterior, nuts_posterior, smc_posterior
from pyro_voed.posterior_sample import PosteriorSample
from pyro_voed.results import Certificate, DesignResult, EIGResult, FitHistory, Learned
from pyro_voed.saving import load, save
from pyro_voed.training import Fresh, Pool

__version__ = "0.1.0"

__all__ = [
    "AmortisedEIG",
    "Censored",
    "Certificate",
    "DesignResult",
    "EIGResult",
    "Experiment",
    "FitHistory",
    "Fresh",
    "JointSample",
    "Learned",
    "Objective",
    "Pool",
    "PosteriorSample",
    "abc_posterior",
    "adaptive_contrastive",
    "allocation",
    "amortise_eig",
    "barber_agakov",
    "budget",
    "certify",
    "compare_estimators",
    "critic_objective",
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
    "fixed_sum",
    "flow_guide",
    "flow_posterior",
    "increasing",
    "info_nce",
    "laplace_proposal",
    "load",
    "marginal_saddle",
    "max_regret",
    "min_gap",
    "nuts_posterior",
    "nwj",
    "optimise_design",
    "per_cost",
    "prior_contrastive",
    "sample_joint",
    "save",
    "search_exchange",
    "search_grid",
    "search_random",
    "search_spsa",
    "smc_posterior",
]
