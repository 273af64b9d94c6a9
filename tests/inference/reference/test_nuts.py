"""What is NUTS's own: the compiled density, chains that do not mix, divergences. Exact answers: `test_reference`."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_voed.inference import nuts_posterior
from pyro_voed.inference.reference.conditioned import conditioned
from pyro_voed.inference.reference.latents import latents_of
from pyro_voed.inference.reference.nuts import _potential
from pyro_voed.problems.michaelis_menten import mean_rate, michaelis_menten
from tests.inference.cases import COUNTS, counting


def test_the_compiled_density_is_the_density():
    case = conditioned(counting, COUNTS, ["counts", "votes"], None, None, scored_by="NUTS", vectorize=False)
    latents = latents_of(case)
    plain, compiled = (_potential(latents, example) for example in (None, torch.zeros(5)))
    for _ in range(5):
        point = torch.randn(5, requires_grad=True)
        values = [potential({"u": point}) for potential in (plain, compiled)]
        assert torch.allclose(*values)
        assert torch.allclose(*(torch.autograd.grad(value, point)[0] for value in values), atol=1e-5)


def test_a_posterior_of_michaelis_and_menten_lies_where_the_truth_is():
    theta = torch.tensor([0.55, 0.45])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="NUTS did not mix")
        draws = nuts_posterior(
            michaelis_menten(), mean_rate(theta, torch.full((7,), 0.5)), "y", num_samples=40, num_warmup=30, seed=0
        ).flat("theta")
    # The prior pulls the mean; the outcome holds no noise, so it stays well inside the posterior.
    assert ((draws.mean(0) - theta) / draws.std(0)).abs().max() < 1.5


def test_bad_mixing_is_never_silent():
    def two_islands():
        theta = pyro.sample("theta", dist.Normal(0.0, 5.0))
        pyro.sample("y", dist.Normal(theta.abs(), 0.1))

    options = {"num_samples": 60, "num_warmup": 60, "num_chains": 6, "jit_compile": True, "seed": 0}
    with pytest.warns(UserWarning, match="'theta' has R-hat"):
        posterior = nuts_posterior(two_islands, torch.tensor(8.0), "y", **options)
    assert posterior.r_hat["theta"] > 1.5


def test_divergences_are_counted_and_reported():
    def funnel():
        scale = pyro.sample("scale", dist.Normal(0.0, 3.0))
        pyro.sample("x", dist.Normal(0.0, torch.exp(scale)).expand([5]).to_event(1))
        pyro.sample("y", dist.Normal(scale, 5.0))

    options = {
        "num_samples": 12,
        "num_warmup": 12,
        "num_chains": 1,
        "target_accept_prob": 0.4,
        "jit_compile": True,
        "seed": 0,
    }
    with pytest.warns(UserWarning, match="transitions of sites .* diverged"):
        posterior = nuts_posterior(funnel, torch.tensor(-3.0), "y", **options)
    assert posterior.num_divergences == int(posterior.inference_data.sample_stats.diverging.sum())


def test_a_cholesky_factor_of_correlations_raises_no_alarm():
    def model():
        factor = pyro.sample("factor", dist.LKJCholesky(2, 4.0))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=factor))

    options = {"num_samples": 200, "num_warmup": 100, "jit_compile": True, "seed": 0}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="NUTS did not mix")
        posterior = nuts_posterior(model, torch.tensor([1.0, 0.2]), "y", **options)
    assert posterior.values["factor"].shape == (2, 200, 2, 2)
