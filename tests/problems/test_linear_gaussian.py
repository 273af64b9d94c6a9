import math

import pytest
import torch
from pyro import poutine
from pyro.distributions import MultivariateNormal, Normal

from pyro_voed.problems import linear_gaussian as lg

DESIGNS = {
    "default": (lg.DEFAULT_DESIGN, lg.DEFAULT_PRIOR_SCALES, 1.0),
    "correlated": (((1.0, 0.5), (0.3, -2.0), (1.0, 1.0), (0.0, 0.2)), (0.7, 2.0), 0.5),
    "fewer observations than parameters": (((1.0, -1.0, 0.4),), (1.0, 0.5, 2.0), 1.5),
    "uninformative": (((0.0, 0.0),), (1.0, 1.0), 1.0),
}


@pytest.fixture(params=DESIGNS)
def case(request):
    design, prior_scales, noise_scale = DESIGNS[request.param]
    return torch.tensor(design).double(), {"prior_scales": prior_scales, "noise_scale": noise_scale}


def test_bayes_rule_links_model_and_posterior(case):
    # p(theta, y) of the program = p(theta | y) of the posterior x p(y) of the Gaussian marginal, at any theta and y.
    design, scales = case
    trace = poutine.trace(lg.linear_gaussian(design, **scales)).get_trace()
    theta, y = trace.nodes["theta"]["value"], trace.nodes["y"]["value"]
    prior_covariance = torch.diag(torch.tensor(scales["prior_scales"]).double() ** 2)
    noise_covariance = scales["noise_scale"] ** 2 * torch.eye(len(y)).double()
    marginal = MultivariateNormal(torch.zeros_like(y), design @ prior_covariance @ design.T + noise_covariance)
    mean, covariance = lg.exact_posterior(y.detach(), design, **scales)
    expected = MultivariateNormal(mean, covariance).log_prob(theta) + marginal.log_prob(y)
    torch.testing.assert_close(trace.log_prob_sum(), expected)


def test_eig_is_the_entropy_lost_from_prior_to_posterior(case):
    design, scales = case
    _, covariance = lg.exact_posterior(torch.zeros(len(design)).double(), design, **scales)
    lost = torch.tensor(scales["prior_scales"]).double().log().sum() - 0.5 * torch.logdet(covariance)
    torch.testing.assert_close(lg.exact_eig(design, **scales), lost)


def test_default_eig():
    assert lg.DEFAULT_EIG == pytest.approx(1.1989476, abs=5e-8)
    assert lg.exact_eig(torch.tensor(lg.DEFAULT_DESIGN)).item() == pytest.approx(lg.DEFAULT_EIG, abs=1e-12)


@pytest.mark.parametrize("n", range(11))
def test_ab_test_eig_is_that_of_two_group_means(n):
    # The groups are independent: a mean of precision 1 / scale^2 is observed n times with unit noise.
    one, two = lg.AB_TEST_PRIOR_SCALES
    by_groups = 0.5 * math.log(1 + n * one**2) + 0.5 * math.log(1 + (10 - n) * two**2)
    assert lg.AB_TEST_EIG[n] == pytest.approx(by_groups, abs=1e-8)
    assert lg.exact_eig(lg.ab_test_design(n), prior_scales=lg.AB_TEST_PRIOR_SCALES).item() == pytest.approx(by_groups)


def test_dependent_nuisance_eig_follows_from_the_program():
    # Marginalising u leaves (theta, y) Gaussian; the program's density must be the product of that and p(u | theta, y).
    a = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [2.0, 1.0, 1.0]]).double()  # (u, theta, y) from unit noises
    joint = MultivariateNormal(torch.zeros(3).double(), a @ a.T)
    model = lg.dependent_nuisance()
    for _ in range(5):
        trace = poutine.trace(model).get_trace()
        values = torch.stack([trace.nodes[name]["value"] for name in ("u", "theta", "y")]).double()
        torch.testing.assert_close(trace.log_prob_sum().double(), joint.log_prob(values), rtol=1e-5, atol=1e-5)
    covariance = joint.covariance_matrix[1:, 1:]
    eig = 0.5 * (covariance[0, 0].log() + covariance[1, 1].log() - torch.logdet(covariance))
    assert eig.item() == pytest.approx(lg.DEPENDENT_NUISANCE_EIG)
    assert lg.DEPENDENT_NUISANCE_EIG == pytest.approx(0.693147, abs=5e-7)


def test_prior_scales_reach_the_site():
    prior = poutine.trace(lg.linear_gaussian(prior_scales=(2.0, 3.0))).get_trace().nodes["theta"]["fn"].base_dist
    assert isinstance(prior, Normal)
    torch.testing.assert_close(prior.scale, torch.tensor([2.0, 3.0]))
