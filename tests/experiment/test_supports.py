"""Laws of targets on every kind of support: their coordinates are right, and posteriors stay on the support."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints, transforms
from torch.distributions import CorrCholeskyTransform

from pyro_voed import Experiment, Fresh, eig_flow, sample_joint
from pyro_voed.experiment.packing import unpack_targets
from pyro_voed.experiment.supports import CorrelationFactorTransform, LowerFactorTransform, bijection
from pyro_voed.inference import flow_posterior, nuts_posterior
from tests.experiment.cases import Z_MAX, both_ways

FREE = {
    # Elements of a value of some shape in which its density is stated.
    "all": lambda shape: torch.ones(shape, dtype=torch.bool),
    "all but the last": lambda shape: torch.arange(shape[-1]) < shape[-1] - 1,
    "below the diagonal": lambda shape: torch.ones(shape, dtype=torch.bool).tril(-1),
    "with the diagonal": lambda shape: torch.ones(shape, dtype=torch.bool).tril(),
}


def correlation_matrix():
    # What `dist.LKJ` is made of; that class itself cannot be put in a plate.
    to_matrix = transforms.CorrMatrixCholeskyTransform().inv
    return dist.TransformedDistribution(dist.LKJCholesky(3, 2.0), [to_matrix])


@dataclass(frozen=True)
class Case:
    """A target: its distribution, its degrees of freedom, the elements its density is stated in, plate size."""

    make: Callable
    dim: int
    free: str = "all"
    plate: int | None = None

    def model(self):
        with nullcontext() if self.plate is None else pyro.plate("members", self.plate):
            distribution = self.make()
            value = pyro.sample("target", distribution)
            # Squares of rows, weighted, so that every element of the value matters.
            for _ in range(distribution.event_dim):
                value = (value * torch.linspace(0.5, 1.5, value.shape[-1])).sum(-1)
            return pyro.sample("y", dist.Normal(value, 0.5))

    @property
    def total_dim(self):
        return self.dim * (self.plate or 1)


def ordered(size, *after):
    base = dist.Normal(-0.5, 0.5).expand([size]).to_event(1)
    return dist.TransformedDistribution(base, [transforms.OrderedTransform(), *after])


def gamma_mixture():
    components = dist.Gamma(torch.tensor([2.0, 9.0]), torch.tensor([2.0, 3.0]))
    return dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), components)


def wishart(size, freedom=9.0):
    return dist.Wishart(torch.tensor(freedom), torch.eye(size) / freedom)


CASES = {
    "real": Case(lambda: dist.StudentT(5.0), 1),
    "uniform": Case(lambda: dist.Uniform(-1.0, 3.0), 1),
    "uniform vector": Case(lambda: dist.Uniform(torch.zeros(2), torch.tensor([1.0, 5.0])).to_event(1), 2),
    "beta": Case(lambda: dist.Beta(2.0, 3.0), 1),
    "gamma": Case(lambda: dist.Gamma(2.0, 3.0), 1),
    "log-normal": Case(lambda: dist.LogNormal(0.0, 0.5), 1),
    "half-Cauchy": Case(lambda: dist.HalfCauchy(1.0), 1),
    "mixture": Case(gamma_mixture, 1),
    "positive in a plate": Case(lambda: dist.Gamma(2.0, 1.0).expand([4]), 1, plate=4),
    "circle": Case(lambda: dist.VonMises(0.0, 4.0), 1),
    "simplex": Case(lambda: dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0, 1.5])), 3, "all but the last"),
    "ordered": Case(lambda: ordered(3), 3),
    "positive ordered": Case(lambda: ordered(3, transforms.ExpTransform()), 3),
    "correlation factor of two": Case(lambda: dist.LKJCholesky(2, 1.0), 1, "below the diagonal"),
    "correlation factor": Case(lambda: dist.LKJCholesky(4, 1.0), 6, "below the diagonal"),
    "correlation factor, strong": Case(lambda: dist.LKJCholesky(3, 0.3), 3, "below the diagonal"),
    "correlation matrix": Case(correlation_matrix, 3, "below the diagonal"),
    "lower factor": Case(
        lambda: dist.TransformedDistribution(wishart(2), [transforms.CholeskyTransform()]), 3, "with the diagonal"
    ),
    "positive definite": Case(lambda: wishart(3), 6, "with the diagonal"),
    "simplex in a plate": Case(lambda: dist.Dirichlet(torch.ones(3)).expand([2]), 2, "all but the last", plate=2),
    "correlation factor in a plate": Case(lambda: dist.LKJCholesky(4).expand([3]), 6, "below the diagonal", plate=3),
    "positive definite in a plate": Case(lambda: wishart(2).expand([3]), 3, "with the diagonal", plate=3),
}
# Exponentials of ordered values overflow far out, products of factors become singular there, and the density of a
# circle is defined on one turn only.
SMALL = [
    name
    for name, case in CASES.items()
    if case.total_dim <= 3 and name not in ("circle", "positive ordered", "correlation matrix")
]


every_support = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@both_ways
@every_support
def test_there_are_as_many_coordinates_as_degrees_of_freedom_and_they_say_what_the_values_say(case, vectorize):
    experiment, num = Experiment(case.model, "y", vectorize=vectorize), 200 if vectorize else 20
    sample = sample_joint(experiment, num)
    assert experiment.theta_dim == case.total_dim
    assert torch.isfinite(sample.theta).all()
    assert torch.isfinite(sample.log_prior).all()
    value = sample.values["target"]
    error = (unpack_targets(experiment, sample.theta)["target"] - value).abs().reshape(num, -1)
    size = 1.0 + value.abs().reshape(num, -1).amax(-1)
    assert (error.amax(-1) / size).max() < 20 * torch.finfo(torch.float32).eps


@every_support
def test_the_log_prior_is_that_of_the_values_times_the_jacobian(case):
    experiment = Experiment(case.model, "y")
    sample = sample_joint(experiment, 5)
    (site,) = experiment.targets
    event = site.shape[1:] if case.plate else site.shape
    free = FREE[case.free](event).flatten()

    def free_elements(theta):
        value = site.transform(theta.reshape(site.transform.inverse_shape(site.shape)))
        return value.reshape(case.plate or 1, -1)[:, free].flatten()

    for row in range(5):
        jacobian = torch.autograd.functional.jacobian(free_elements, sample.theta[row].double())
        expected = case.make().log_prob(sample.values["target"][row]).sum() + torch.linalg.slogdet(jacobian)[1]
        torch.testing.assert_close(sample.log_prior[row].double(), expected.double(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SMALL)
def test_draws_follow_the_density_of_the_coordinates_which_integrates_to_one(name, double_precision):
    experiment, points, weights = weighted_points(CASES[name])
    assert torch.isfinite(weights).all()
    assert abs(weights.mean() - 1.0) < Z_MAX * weights.std() / math.sqrt(len(weights)) + 2e-3
    theta = sample_joint(experiment, 50_000).theta
    for moment in (torch.tanh, lambda x: torch.tanh(x).square(), lambda x: torch.tanh(x / 3).prod(-1, keepdim=True)):
        drawn, weighted = moment(theta), weights[:, None] * moment(points)
        error = (drawn.var(0) / len(drawn) + weighted.var(0) / len(weighted)).sqrt()
        assert ((drawn.mean(0) - weighted.mean(0)).abs() < Z_MAX * error + 2e-3).all()


def weighted_points(case):
    """Points in the coordinates' space and weights that make averages integrals against the stated density."""
    experiment = Experiment(case.model, "y")
    (site,) = experiment.targets
    theta = sample_joint(experiment, 2_000).theta
    # Beyond the box lies less than 0.002 of any of these densities.
    proposal = dist.Cauchy(theta.median(0).values, theta.std(0).clamp(max=1.0) / 2).to_event(1)
    points = proposal.sample((100_000,))
    inside = (points.abs() < 12.0).all(-1)
    x = points[inside].reshape(-1, *site.transform.inverse_shape(site.shape))
    value = site.transform(x)
    with pyro.validation_enabled(False):
        log_density = case.make().log_prob(value) + site.transform.log_abs_det_jacobian(x, value)
    weights = torch.zeros(100_000)
    weights[inside] = (log_density.reshape(-1) - proposal.log_prob(points[inside])).exp()
    return experiment, points, weights


# One outcome is drawn at random, so it may be extreme.
@pytest.mark.filterwarnings("ignore:outcome y.*lies outside the range:UserWarning")
@every_support
def test_posterior_draws_stay_on_the_support(case):
    result = eig_flow(case.model, "y", training=Fresh(num_steps=30, batch_size=64), num_samples=200, seed=0)
    assert math.isfinite(result.eig)
    sample = sample_joint(result.experiment, 1)
    posterior = flow_posterior(result, sample.values["y"][0], 300, seed=0)
    draws = posterior.values["target"][0]
    assert draws.shape == (300, *result.experiment.targets[0].shape)
    assert case.make().support.check(draws).all()


@pytest.mark.parametrize("name", ["correlation factor", "positive definite", "simplex in a plate"])
def test_reference_posteriors_take_the_same_supports(name):
    case = CASES[name]
    y = case.model().detach()
    with pytest.warns(UserWarning, match="NUTS did not mix"):
        posterior = nuts_posterior(case.model, y, "y", num_samples=10, num_warmup=10, num_chains=1, seed=0)
    assert case.make().support.check(posterior.values["target"][0]).all()


def test_a_distribution_that_cannot_be_expanded_is_run_one_by_one():
    def model():
        pyro.sample("y", dist.Normal(pyro.sample("matrix", dist.LKJ(3, 2.0))[..., 0, 1], 0.5))

    with pytest.raises(ValueError, match=r"vectorize=False"):
        Experiment(model, "y")
    experiment = Experiment(model, "y", vectorize=False)
    sample = sample_joint(experiment, 20)
    assert sample.theta.shape == (20, 3)
    torch.testing.assert_close(unpack_targets(experiment, sample.theta)["matrix"], sample.values["matrix"])


ANGLES = {
    "one": lambda: dist.VonMises(3.0, 1.0),
    "in an event": lambda: dist.VonMises(torch.tensor([3.0, 0.0]), 1.0).to_event(1),
    "two dependent": lambda: dist.SineBivariateVonMises(*(torch.tensor(x) for x in (3.0, 0.0, 2.0, 3.0, 1.0))),
    "skewed": lambda: dist.SineSkewed(dist.VonMises(torch.tensor([3.0]), 1.0).to_event(1), torch.tensor([0.3])),
    "a mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.VonMises(torch.tensor([3.0, 0.0]), 4.0)
    ),
}


@pytest.mark.parametrize("name", ANGLES)
def test_an_angle_is_confined_to_one_turn(name):
    # torch and Pyro state the real line as the support of angles, of which only one turn is ever drawn.
    def model():
        prior = ANGLES[name]()
        angle = pyro.sample("target", prior)
        pyro.sample("y", dist.Normal(angle.sin(), 1.0).to_event(prior.event_dim))

    experiment = Experiment(model, "y")
    sample = sample_joint(experiment, 200)
    far = unpack_targets(experiment, 30.0 * sample.theta)["target"]
    assert (far.abs() <= math.pi + 1e-6).all()
    torch.testing.assert_close(unpack_targets(experiment, sample.theta)["target"], sample.values["target"])
    assert "3.14" in experiment.targets[0].support


# --- the bijections themselves --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 5, 12])
def test_correlation_factors_are_torchs_in_double_precision(size):
    x = 0.7 * torch.randn(50, size * (size - 1) // 2, dtype=torch.double)
    ours, theirs = CorrelationFactorTransform(), CorrCholeskyTransform()
    factor = ours(x)
    torch.testing.assert_close(factor, theirs(x))
    torch.testing.assert_close(ours.inv(factor), x)
    torch.testing.assert_close(ours.log_abs_det_jacobian(x, factor), theirs.log_abs_det_jacobian(x, factor))


@pytest.mark.parametrize("size", [2, 5, 12])
@pytest.mark.parametrize("concentration", [0.1, 1.0, 10.0])
def test_coordinates_of_strong_correlations_are_accurate_in_single_precision(size, concentration):
    to_factor = CorrelationFactorTransform()
    factor = dist.LKJCholesky(size, concentration).sample((5_000,))
    x, exact = to_factor.inv(factor), to_factor.inv(factor.double())
    torch.testing.assert_close(x.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(to_factor(x), factor, rtol=0, atol=1e-6)
    log_det = to_factor.log_abs_det_jacobian(x, factor).double()
    torch.testing.assert_close(log_det, to_factor.log_abs_det_jacobian(exact, factor.double()), rtol=1e-5, atol=1e-5)


TRIANGULAR = pytest.mark.parametrize(
    "transform", [CorrelationFactorTransform(), LowerFactorTransform()], ids=["unit", "any"]
)


@TRIANGULAR
def test_gradients_are_those_of_finite_differences(transform):
    x = torch.randn(2, 6, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(transform, x)
    assert torch.autograd.gradcheck(lambda x: transform.log_abs_det_jacobian(x, transform(x)), x)
    assert torch.autograd.gradcheck(transform.inv, transform(x).detach().requires_grad_())


@TRIANGULAR
def test_shapes_are_foretold(transform):
    value = transform(torch.randn(2, 5, 10))
    assert transform.forward_shape((2, 5, 10)) == value.shape
    assert transform.inverse_shape(value.shape) == (2, 5, 10)
    with pytest.raises(ValueError, match="8 coordinates fill no triangle"):
        transform.forward_shape((8,))


def test_registered_bijections_are_used_as_they_are():
    assert bijection(constraints.positive) == transforms.biject_to(constraints.positive)
    with pytest.raises(NotImplementedError):
        bijection(constraints.sphere)
