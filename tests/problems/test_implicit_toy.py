import math

import pyro
import pytest
import torch
from pyro import poutine

from pyro_voed.problems import implicit_toy


@pytest.mark.parametrize("design", [0.0, 0.375, 1.0, 2.0])
def test_exact_eig_is_that_of_the_outcome_as_observed(design):
    # Independent route: quadrature of log p(y | theta) / p(y) in the coordinates of y itself, change of variables
    # included, with p(y) summed over a grid of theta instead of taken from the Gaussian algebra.
    theta = torch.linspace(-8, 8, 401, dtype=torch.double)
    prior = torch.softmax(-0.5 * theta**2, 0)
    z = torch.linspace(-14, 14, 2801, dtype=torch.double)
    y = torch.sinh(z)
    of_z = torch.distributions.Normal(design * theta[:, None], implicit_toy.NOISE_SCALE).log_prob(y.asinh())
    likelihood = of_z - 0.5 * torch.log1p(y**2)
    log_ratio = likelihood - torch.logsumexp(prior.log()[:, None] + likelihood, 0)
    inner = torch.trapezoid(likelihood.exp() * log_ratio * z.cosh(), z)  # dy = cosh(z) dz
    assert implicit_toy.exact_eig(torch.tensor(design)).item() == pytest.approx((prior * inner).sum().item(), abs=1e-9)


def test_default_eig():
    exact = implicit_toy.exact_eig(torch.tensor(implicit_toy.DEFAULT_DESIGN)).item()
    assert exact == pytest.approx(implicit_toy.DEFAULT_EIG)
    assert exact == pytest.approx(0.5 * math.log(5.0))


def test_outcome_is_a_deterministic_site_without_density():
    for model in (implicit_toy.implicit_toy(), implicit_toy.implicit_pair()):
        trace = poutine.trace(model).get_trace()
        assert trace.nodes["y"]["infer"]["_deterministic"]
        assert trace.nodes["y"]["fn"].event_dim == trace.nodes["y"]["value"].ndim


def test_pair_of_outcomes_can_be_unmixed():
    # The EIG of the pair is the sum of two toys because this inverse exists.
    trace = poutine.trace(implicit_toy.implicit_pair((0.5, 1.5))).get_trace()
    theta, noise, y = (trace.nodes[name]["value"] for name in ("theta", "e", "y"))
    unmixed = torch.diff(y.asinh(), prepend=torch.zeros(1))
    torch.testing.assert_close(unmixed, pyro.param("xi") * theta + noise)
