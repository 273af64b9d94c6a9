"""Laws of the score controls: of expectation zero, only where that is certain, and worth their name."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_voed.certificates.score_controls import score_controls
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.sampling import sample_joint
from pyro_voed.monte_carlo import controlled_terms
from pyro_voed.problems import linear_gaussian, michaelis_menten, nonlinear, regression

FAMILIES = {
    "normal": lambda: dist.Normal(2.0, 3.0),
    "Laplace": lambda: dist.Laplace(-1.0, 0.5),
    "Student": lambda: dist.StudentT(5.0),
    "Cauchy": lambda: dist.Cauchy(1.0, 2.0),
    "exponential": lambda: dist.Exponential(0.3),
    "gamma": lambda: dist.Gamma(0.7, 2.0),
    "inverse gamma": lambda: dist.InverseGamma(3.0, 1.0),
    "log-normal": lambda: dist.LogNormal(0.5, 1.5),
    "half-normal": lambda: dist.HalfNormal(2.0),
    "half-Cauchy": lambda: dist.HalfCauchy(2.0),
    "beta": lambda: dist.Beta(0.8, 3.0),
    "uniform": lambda: dist.Uniform(-2.0, 5.0),
    "several": lambda: dist.Gamma(torch.tensor([1.0, 4.0]), 1.0).to_event(1),
    "correlated": lambda: dist.MultivariateNormal(torch.ones(2), torch.tensor([[2.0, 1.0], [1.0, 1.5]])),
}
PROBLEMS = {
    "regression": (regression.regression, 42),
    "linear_gaussian": (linear_gaussian.linear_gaussian, 4),
    "michaelis_menten": (michaelis_menten.michaelis_menten, 4),
    "nonlinear": (nonlinear.nonlinear, 6),
}


def model_of(prior):
    def model():
        fn = prior()
        theta = pyro.sample("theta", fn)
        pyro.sample("y", dist.Normal(theta, 1.0).to_event(len(fn.event_shape)))

    return model


def controls_of(model, num_samples=20_000):
    experiment = Experiment(model, "y")
    sample = sample_joint(experiment, num_samples)
    return sample, score_controls(experiment, experiment.design_values)(sample.theta)


def assert_means_zero(controls):
    # At most 42 columns at 5 standard errors: 2 in 100,000.
    error = controls.double().std(0) / controls.shape[0] ** 0.5
    assert (controls.double().mean(0).abs() < 5 * error).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_expectations_are_zero_for_each_family(name):
    sample, controls = controls_of(lambda: model_of(FAMILIES[name])())
    assert controls.shape == (20_000, 2 * sample.theta.shape[-1])
    assert (controls.std(0) > 0).all()
    assert_means_zero(controls)


@pytest.mark.parametrize("name", PROBLEMS)
def test_expectations_are_zero_for_each_problem(name):
    factory, num_controls = PROBLEMS[name]
    _, controls = controls_of(factory())
    assert controls.shape[-1] == num_controls
    assert_means_zero(controls)


def test_a_target_that_depends_on_another_gives_no_control():
    def model():
        first = pyro.sample("first", dist.Normal(0.0, 1.0))
        # Its density, as a function of the first, jumps: there integration by parts would lose a term.
        second = pyro.sample("second", dist.Normal(torch.where(first > 0, 3.0, -3.0), 1.0))
        pyro.sample("y", dist.Normal(first + second, 1.0))

    sample, controls = controls_of(model)
    assert controls.shape[-1] == 2
    torch.testing.assert_close(controls[:, 0], -sample.theta[:, 0])
    assert_means_zero(controls)


def test_families_of_unknown_smoothness_give_no_control():
    class Own(dist.Normal):
        """What derives from a family may have another density."""

    sample, controls = controls_of(model_of(lambda: Own(0.0, 1.0)), 10)
    assert controls.shape == (10, 0)
    assert controls.dtype == sample.theta.dtype


def test_runs_one_by_one_give_the_same():
    model = model_of(FAMILIES["several"])
    theta = torch.randn(5, 2)
    together, single = (score_controls(Experiment(model, "y", vectorize=flag), {})(theta) for flag in (True, False))
    torch.testing.assert_close(together, single)


def test_the_logarithm_of_an_unknown_scale_is_explained():
    sample, controls = controls_of(regression.regression())
    log_sigma = sample.theta[:, -1]
    assert controlled_terms(log_sigma, controls).var() < 0.05 * log_sigma.var()
