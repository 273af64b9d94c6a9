"""Terms of three bounds at the same outer draws, as certificates make them."""

from pyro_voed.bounds import ace_terms, ba_terms, vnmc_terms
from pyro_voed.experiment.weighting import weighted_terms


def three_terms(experiment, proposal, num_outer, num_inner, **options):
    """Return ACE, VNMC and Barber-Agakov terms of a proposal at the experiment's own design."""

    def terms(weights):
        return (
            ace_terms(weights.log_likelihood, weights.own, weights.inner),
            vnmc_terms(weights.log_likelihood, weights.inner),
            ba_terms(weights.log_q, weights.log_prior),
        )

    return weighted_terms(experiment, experiment.design_values, proposal, num_outer, num_inner, terms, **options)
