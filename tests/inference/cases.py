"""Models with closed-form posteriors, and how far off a Monte Carlo answer may be.

Thresholds are 4.5 standard errors: a right answer is off by more 7 times in a million comparisons. The folder makes
about sixty, so a fresh set of seeds fails fewer than 5 times in 10,000; the seeds are fixed besides.
"""

import pyro
import pyro.distributions as dist
import torch

from pyro_voed.problems.linear_gaussian import DEFAULT_DESIGN, DEFAULT_PRIOR_SCALES

THRESHOLD = 4.5
DESIGN = torch.tensor(DEFAULT_DESIGN)
OUTCOME = torch.tensor([1.0, 2.0, 1.5])

COUNTS = {"counts": torch.tensor([1.0, 4.0, 2.0]), "votes": torch.tensor([2.0, 3.0, 7.0])}
RATE_PRIOR, SHARE_PRIOR = (3.0, 1.0), torch.tensor([2.0, 3.0, 4.0])


def linear_gaussian_log_evidence(y, design=DESIGN):
    covariance = design @ torch.diag(torch.tensor(DEFAULT_PRIOR_SCALES) ** 2) @ design.mT + torch.eye(len(y))
    return dist.MultivariateNormal(torch.zeros(len(y)), covariance).log_prob(y)


def counting():
    """Positive rates in a plate, shares on a simplex; conjugate, with discrete outcomes."""
    with pyro.plate("places", 3):
        rate = pyro.sample("rate", dist.Gamma(*RATE_PRIOR))
        pyro.sample("counts", dist.Poisson(rate))
    share = pyro.sample("share", dist.Dirichlet(SHARE_PRIOR))
    pyro.sample("votes", dist.Multinomial(12, share))


def counting_posterior():
    rate = dist.Gamma(RATE_PRIOR[0] + COUNTS["counts"], RATE_PRIOR[1] + 1.0)
    share = dist.Dirichlet(SHARE_PRIOR + COUNTS["votes"])
    return {"rate": (rate.mean, rate.variance), "share": (share.mean, share.variance)}


def counting_log_evidence():
    counts = dist.GammaPoisson(*RATE_PRIOR).log_prob(COUNTS["counts"]).sum()
    return counts + dist.DirichletMultinomial(SHARE_PRIOR, total_count=12).log_prob(COUNTS["votes"])


def check_moments(draws, mean, variance, effective):
    """Compare means and variances of draws `(num_draws, *shape)` with exact ones."""
    off = (draws.mean(0) - mean).abs() / (variance / effective).sqrt()
    assert off.max() < THRESHOLD, f"means are {off} standard errors off"
    # Squares mix no better than the values, and skewed posteriors have up to twice a Gaussian's error of the variance.
    off = (draws.var(0) - variance).abs() / (2 * variance * (2 / effective.clamp(max=len(draws))).sqrt())
    assert off.max() < THRESHOLD, f"variances are {off} standard errors off"


def check_site(posterior, site, mean, variance):
    """Compare one site of a posterior sample with its exact mean and variance, by the effective size it states."""
    mean, variance = torch.as_tensor(mean), torch.as_tensor(variance)
    check_moments(posterior.flat(site).double(), mean, variance, posterior.effective_sample_size[site])
