import math

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine

from pyro_voed.problems import michaelis_menten as mm

PUBLISHED = {
    "start": (mm.START_DESIGNS, mm.START_EIG, mm.START_STANDARD_ERROR),
    "tutorial": (mm.TUTORIAL_DESIGNS, mm.TUTORIAL_EIG, mm.TUTORIAL_STANDARD_ERROR),
    "best": (mm.BEST_DESIGNS, mm.BEST_EIG, mm.BEST_STANDARD_ERROR),
}


def assert_matches_published(name, **sizes):
    designs, expected, expected_error = PUBLISHED[name]
    eig, error = mm.exact_eig(torch.tensor(designs), **sizes)
    # Both errors come from few scramblings, hence the wide factor: Student's t with 7 degrees of freedom at 5 leaves
    # 2 in 1,000.
    assert abs(eig.item() - expected) < 5 * math.hypot(error.item(), expected_error)
    return error.item()


@pytest.mark.parametrize("name", PUBLISHED)
def test_exact_eig_of_named_designs(name):
    assert_matches_published(name, grid_size=91, num_outcomes=512, num_repeats=8)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_exact_eig_of_named_designs_at_full_accuracy(name):
    assert assert_matches_published(name) < 0.001


@pytest.mark.parametrize("concentration", [0.1, 0.275, 0.9])
def test_exact_eig_of_one_measurement_agrees_with_another_quadrature(concentration):
    # Independent route: Gauss-Hermite nodes for theta and the entropy of the outcome summed over a grid of outcomes.
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(60))
    t1 = 110 + 18 * nodes[:, None]
    t2 = 110 + 18 * nodes[None, :]
    x = 400 * concentration
    means = (t1 / (1 + (t2 / x) ** 4)).flatten()
    log_weights = (weights[:, None] * weights[None, :] / weights.sum() ** 2).flatten().log()
    y = torch.linspace(-100, 320, 4201, dtype=torch.double)
    log_density = torch.logsumexp(log_weights + torch.distributions.Normal(means, 5.0).log_prob(y[:, None]), -1)
    entropy = -torch.trapezoid(log_density.exp() * log_density, y)
    expected = entropy - 0.5 * math.log(2 * math.pi * math.e * 25)

    eig, error = mm.exact_eig(torch.tensor([concentration]), grid_size=121, num_outcomes=1024, num_repeats=8)
    # The quasi-random error can be tiny here; the other quadrature is good to 1e-6.
    assert abs(eig - expected).item() < 5 * error.item() + 1e-6


def test_exact_eig_does_not_depend_on_the_grid():
    # Same outcomes, so what differs is the quadrature alone.
    designs = torch.tensor([mm.START_DESIGNS, mm.BEST_DESIGNS])
    coarse, _ = mm.exact_eig(designs, grid_size=101, num_outcomes=64, num_repeats=2)
    fine, _ = mm.exact_eig(designs, grid_size=201, num_outcomes=64, num_repeats=2)
    torch.testing.assert_close(coarse, fine, rtol=0, atol=1e-6)


def test_mean_rate_is_finite_with_gradients_at_extreme_designs_and_parameters():
    # theta = -0.11 is six prior standard deviations away and makes the half-rate concentration about zero.
    theta = torch.tensor([[0.5, 0.5], [-0.11, -0.11], [1.1, 1.1], [0.5, -0.12]])
    xi = torch.tensor([1e-7, 1e-4, 0.5, 1 - 1e-6]).requires_grad_()
    rate = mm.mean_rate(theta, xi)
    rate.sum().backward()
    assert rate.isfinite().all()
    assert xi.grad.isfinite().all()


def test_initial_design_reaches_the_store():
    designs = torch.tensor(mm.START_DESIGNS)
    trace = poutine.trace(mm.michaelis_menten(designs)).get_trace()
    torch.testing.assert_close(pyro.param("xi").detach(), designs)
    prior = trace.nodes["theta"]["fn"].base_dist
    torch.testing.assert_close(prior.mean, torch.full((2,), 0.5))
    torch.testing.assert_close(prior.stddev, torch.full((2,), 0.1))
