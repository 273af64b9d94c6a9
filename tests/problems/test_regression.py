import math

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from scipy.special import exp1
from scipy.stats import laplace, norm

import pyro_voed
from pyro_voed import Fresh, certify, eig_flow, eig_nmc, eig_pce
from pyro_voed.problems import regression as rg

# An earlier figure of the identity, by another program: analytic marginal over w, quadrature over sigma, plain draws.
EARLIER_EIG, EARLIER_STANDARD_ERROR = 22.99, 0.025

SINGLE = {
    "one": [[1.0]],
    "scaled": [[0.5, 0.0], [0.0, -2.0]],
    "permutation": [[0.0, -1.0], [1.0, 0.0]],
    "replicated": [[1.0, 0.0], [-1.0, 0.0], [0.3, 0.0]],
    "one row of none": [[1.0, 0.0], [0.0, 0.0]],
}


def by_brute_force(y, design, tau):
    """Integrate prior times likelihood over a grid of each coefficient in turn, which only its own rows see."""
    w = np.linspace(-40, 40, 800_001)
    density = 1.0
    for j in range(design.shape[1]):
        rows = [i for i in range(design.shape[0]) if design[i, j] != 0]
        likelihood = np.prod([norm.pdf(y[i], design[i, j] * w, tau) for i in rows], axis=0)
        density *= np.trapezoid(laplace.pdf(w) * likelihood, w)
    empty = [i for i in range(design.shape[0]) if not design[i].any()]
    return density * np.prod([norm.pdf(y[i], 0.0, tau) for i in empty])


@pytest.mark.parametrize("tau", [0.02, 0.7, 6.0])
@pytest.mark.parametrize("name", SINGLE)
def test_density_is_the_integral_over_the_coefficients(name, tau):
    design, generator = torch.tensor(SINGLE[name]).double(), torch.Generator().manual_seed(0)
    # From the model itself: far from it, where nothing is drawn, brute force underflows.
    w = torch.randn(design.shape[1], generator=generator).double()
    y = design @ w + tau * torch.randn(design.shape[0], generator=generator).double()
    expected = math.log(by_brute_force(y.numpy(), design.numpy(), tau))
    # Grid steps of 1e-4 and the kink of the prior leave a relative 1e-5 at most.
    assert rg.log_density(y, design, torch.tensor(tau).double()).item() == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("tau", [0.05, 1.0, 4.0])
def test_density_integrates_to_one(tau):
    size = 40 + 10 * tau
    axis = torch.linspace(-size, size, 1_201).double()
    y = torch.cartesian_prod(axis, axis)
    for name in ("scaled", "permutation"):
        # The kink of width tau, a single step of the grid where it is narrowest, costs the rule the most.
        density = rg.log_density(y, torch.tensor(SINGLE[name]).double(), torch.tensor(tau).double()).exp()
        assert density.sum().item() * (axis[1] - axis[0]).item() ** 2 == pytest.approx(1.0, abs=1e-3)


def test_convolution_is_finite_and_right_at_its_ends():
    m = torch.tensor([0.0, 1e-9, 0.3, 5.0, 300.0]).double()
    for t in (1e-7, 1e-3, 1.0, 50.0, 1e3):
        log_f = rg.log_convolution(m, torch.tensor(t).double())
        assert log_f.isfinite().all()
        torch.testing.assert_close(log_f, rg.log_convolution(-m, torch.tensor(t).double()))
    # Without noise a Laplace; under much of it a Gaussian of the variances' sum, up to the Laplace's own kurtosis.
    torch.testing.assert_close(rg.log_convolution(m[1:], torch.tensor(1e-12).double()), -m[1:] - math.log(2.0))
    wide = torch.distributions.Normal(0.0, math.sqrt(1e6 + 2.0)).log_prob(m)
    torch.testing.assert_close(rg.log_convolution(m, torch.tensor(1e3).double()), wide, rtol=0, atol=1e-6)


def test_exact_eig_of_one_measurement_agrees_with_another_quadrature():
    # Independent route: the entropy of the single outcome less that of its noise, no chain rule, no random points.
    sigma = np.exp(np.linspace(-18, 4.5, 1_200))
    weights = np.gradient(np.log(sigma)) * sigma * np.exp(-sigma)
    y = np.concatenate([[0.0], np.exp(np.linspace(-16, 5.5, 3_000))])
    tau = torch.tensor(sigma).unsqueeze(-1) + 1e-6
    given = rg.log_density(torch.tensor(y).unsqueeze(-1), torch.ones(1, 1).double(), tau).exp().numpy()
    density = weights @ given / weights.sum()
    entropy = -2 * np.trapezoid(density * np.log(density), y)
    log_tau = math.log(1e-6) + math.exp(1e-6) * exp1(1e-6)
    expected = entropy - 0.5 * math.log(2 * math.pi * math.e) - log_tau
    eig, error = rg.exact_eig(torch.ones(1, 1), num_outcomes=2048)
    # Student's t with 7 degrees of freedom beyond 5: 2 in 1,000; the other quadrature is good to 1e-4.
    assert abs(eig.item() - expected) < 5 * error.item() + 1e-4


@pytest.mark.filterwarnings("ignore:target w")  # the second coefficient of "replicated" is not measured
@pytest.mark.parametrize("name", ["one", "permutation", "replicated"])
def test_bounds_of_both_sides_hold_the_exact_value(name):
    # Six comparisons at 4 standard errors fail by chance 2 times in 10,000.
    initial = torch.tensor(SINGLE[name])
    sizes = {"num_outer_samples": 4_000, "num_inner_samples": 2_000, "seed": 0}
    below, above = eig_pce(rg.regression(initial), "y", **sizes), eig_nmc(rg.regression(initial), "y", **sizes)
    eig, error = rg.exact_eig(initial)
    assert below.eig - 4 * below.standard_error < eig + 4 * error
    assert eig - 4 * error < above.eig + 4 * above.standard_error
    # And they are near: a wrong scale of the problem would still leave them on their sides.
    assert above.eig - below.eig < 0.3 + 4 * torch.hypot(above.standard_error, below.standard_error)


def check_identity(**sizes):
    # Student's t with 7 degrees of freedom beyond 5: 2 in 1,000.
    eig, error = rg.exact_eig(rg.IDENTITY, **sizes)
    assert abs(eig.item() - rg.IDENTITY_EIG) < 5 * math.hypot(error.item(), rg.IDENTITY_STANDARD_ERROR)
    return error


def test_eig_at_the_identity():
    check_identity(num_outcomes=512)
    assert abs(rg.IDENTITY_EIG - EARLIER_EIG) < 3 * EARLIER_STANDARD_ERROR


@pytest.mark.slow
def test_eig_at_the_identity_at_full_accuracy():
    # Other scramblings than those behind the constant.
    assert check_identity(num_outcomes=8192, num_repeats=16, seed=1_000) < 0.004


def test_quadrature_has_converged(monkeypatch):
    # Same outcomes, so what differs is the quadrature alone.
    sizes = {"num_outcomes": 32, "num_repeats": 2}
    before = rg.exact_eig(rg.IDENTITY, **sizes)[0]
    for name, value in (("_SIGMA_STEP", 0.3), ("_LOG_SIGMA", (-23.0, 5.5)), ("_MESSAGE_STEP", 0.02), ("_REACH", 60.0)):
        monkeypatch.setattr(rg, name, value)
        torch.testing.assert_close(rg.exact_eig(rg.IDENTITY, **sizes)[0], before, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_default_flow_certifies_the_identity():
    # Two minutes of one core. The interval is asked for at the confidence of 4 standard errors.
    result = certify(eig_flow(rg.regression(), "y", seed=0), width=1.0, confidence=1 - 6.3e-5, seed=0)
    low, high = result.interval.tolist()
    assert result.certificate.certified
    assert low <= rg.IDENTITY_EIG <= high
    assert high - low <= 1.0


def test_signs_and_order_carry_no_information_and_repetition_does():
    base = torch.eye(3).double()
    permuted = base[[2, 0, 1]] * torch.tensor([[1.0], [-1.0], [1.0]])
    tau = torch.tensor([0.1, 1.0]).double()
    torch.testing.assert_close(rg._information(base, tau), rg._information(permuted, tau))
    (one, _), (other, error) = rg.exact_eig(base), rg.exact_eig(permuted)
    assert abs(one - other) < 6 * error
    assert rg.exact_eig(torch.cat([base, base]))[0] > one


def test_density_of_the_program():
    xi = rg.unit_rows({"xi": torch.randn(4, 3)})["xi"]
    trace = poutine.trace(rg.regression(xi)).get_trace()
    trace.compute_log_prob()
    w, sigma, y = (trace.nodes[name]["value"].detach().double().numpy() for name in ("w", "sigma", "y"))
    expected = norm.logpdf(y, xi.double().numpy() @ w, sigma + 1e-6).sum()
    assert trace.nodes["y"]["log_prob"].item() == pytest.approx(expected, rel=1e-3, abs=1e-2)
    assert trace.nodes["w"]["log_prob"].item() == pytest.approx(laplace.logpdf(w).sum(), rel=1e-5)
    assert trace.nodes["sigma"]["log_prob"].item() == pytest.approx(-sigma, rel=1e-5)


def test_rows_stay_at_unit_norm_through_a_search():
    start = rg.unit_rows({"xi": torch.randn(3, 2)})["xi"]
    sizes = {"training": Fresh(num_steps=20), "num_samples": 100, "seed": 0}
    result = pyro_voed.optimise_design(rg.regression(start), "y", constraints=rg.unit_rows, **sizes)
    torch.testing.assert_close(result.designs["xi"].abs().sum(-1), torch.ones(3))
    torch.testing.assert_close(pyro.param("xi").abs().sum(-1), torch.ones(3))
    assert not torch.equal(result.designs["xi"], start)
