"""Experiments run together are those run alone, with one design for all or one for each, or are refused."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample
from torch import nn

from pyro_voed import Experiment, sample_joint


def normal(name, loc=0.0, scale=1.0):
    return pyro.sample(name, dist.Normal(loc, scale))


def normals(name, loc, scale=1.0, dim=1):
    return pyro.sample(name, dist.Normal(loc, scale).to_event(dim))


def vector_theta(size=2):
    return normals("theta", torch.ones(size), 0.3)


# --- models that mix experiments ------------------------------------------------------------------------------------


def normalised_over_everything():
    theta = vector_theta()
    return normals("y", theta / theta.sum())


def softmax_over_the_first():
    return normals("y", torch.softmax(vector_theta(), 0))


def mean_inside_a_plate():
    with pyro.plate("groups", 4):
        return normal("y", normal("theta").mean())


def mean_over_a_plate():
    with pyro.plate("groups", 4):
        theta = normal("theta")
    return normal("y", theta.mean())


def stacked_latents():
    return normals("y", torch.stack([normal("a"), normal("b")]))


def matrix_product():
    return normals("y", torch.arange(8.0).reshape(4, 2) @ vector_theta())


def python_if():
    theta = normal("theta")
    return normal("y", theta if theta > 0 else -theta)


def index_from_the_left():
    return normals("y", vector_theta()[0] * torch.ones(2))


def index_of_a_square():
    return normals("y", normals("theta", torch.zeros(3, 3), dim=2)[0])


def item_of_a_latent():
    return normal("y", float(normal("theta").sum()))


def mixing_deterministic():
    theta = normal("theta")
    centred = pyro.deterministic("centred", theta - theta.mean())
    return normal("y", theta + 0.0 * centred)


def linear_layer_of_samples():
    net = PyroModule[nn.Linear](2, 1)
    net.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
    net.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))
    return lambda: normals("y", net(torch.ones(3, 2)).squeeze(-1))


MIXING = {
    "normalised over everything": (normalised_over_everything, "'y'"),
    "softmax over the first": (softmax_over_the_first, "'y'"),
    "mean inside a plate": (mean_inside_a_plate, "'y'"),
    "mean over a plate": (mean_over_a_plate, "'y'"),
    "stacked latents": (stacked_latents, "vectorisation failed"),
    "matrix product": (matrix_product, "vectorisation failed"),
    "python if": (python_if, "vectorisation failed"),
    "index from the left": (index_from_the_left, "'y'"),
    "index of a square": (index_of_a_square, "vectorisation"),
    "item of a latent": (item_of_a_latent, "'y'"),
    "mixing deterministic": (mixing_deterministic, "'centred'"),
    "linear layer of samples": (linear_layer_of_samples(), "vectorisation failed"),
}


@pytest.mark.parametrize("name", MIXING)
def test_wrong_vectorisation_is_detected_and_single_runs_work(name):
    model, words = MIXING[name]
    with pytest.raises(ValueError, match="vectoris") as caught:
        Experiment(model, "y")
    assert words in str(caught.value)
    assert "vectorize=False" in str(caught.value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of these do not use all of theta
        experiment = Experiment(model, "y", vectorize=False)
    assert not experiment.runs_together
    sample = sample_joint(experiment, 3)
    assert sample.theta.shape == (3, experiment.theta_dim)
    assert torch.isfinite(sample.theta).all()
    assert torch.isfinite(sample.log_prior).all()


@pytest.mark.parametrize("size", [3, 5])
def test_a_wrong_model_is_detected_also_when_its_size_is_that_of_a_probe(size):
    with pytest.raises(ValueError, match="vectoris"):
        Experiment(lambda: normals("y", torch.softmax(vector_theta(size), 0)), "y")


# --- models that do not ---------------------------------------------------------------------------------------------


def linear_net():
    net = nn.Linear(2, 3).requires_grad_(False)
    return lambda: normals("y", net(normals("theta", torch.zeros(2))))


def inner_plate():
    with pyro.plate("groups", 3):
        return normal("y", normal("theta"))


def nested_plates():
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.1))
    with pyro.plate("columns", 4, dim=-1):
        column = normal("column")
        with pyro.plate("rows", 2, dim=-2):
            cell = normal("cell", column, scale).unsqueeze(-1)
            normals("y", cell.expand(*cell.shape[:-1], 5))


def sequential_plate():
    theta = normal("theta")
    for i in pyro.plate("steps", 3):
        normal(f"y_{i}", theta * (i + 1))


def undeclared_batch():
    return normal("y", normal("theta", torch.zeros(3)), torch.tensor([0.5, 1.0, 2.0]))


def several_of_any_shape():
    scalar = pyro.sample("scalar", dist.Gamma(2.0, 1.0))
    vector = normals("vector", torch.zeros(2))
    matrix = normals("matrix", torch.zeros(2, 3), dim=2)
    simplex = pyro.sample("simplex", dist.Dirichlet(torch.ones(3)))
    normal("y", scalar + vector.sum(-1) + matrix.sum((-2, -1)) + simplex[..., 0])
    pyro.sample("count", dist.Poisson(scalar.unsqueeze(-1) * simplex).to_event(1))
    pyro.sample("square", dist.LogNormal(matrix, 1.0).to_event(2))


VECTORISES = {
    # name: (model, outcomes, theta_dim, y_dim)
    "linear layer": (linear_net(), "y", 2, 3),
    "inner plate": (inner_plate, "y", 3, 3),
    "nested plates": (nested_plates, "y", 1 + 4 + 8, 40),
    "sequential plate": (sequential_plate, ["y_0", "y_1", "y_2"], 1, 3),
    "undeclared batch": (undeclared_batch, "y", 3, 3),
    "several of any shape": (several_of_any_shape, ["y", "count", "square"], 1 + 2 + 6 + 2, 1 + 3 + 6),
}


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("name", VECTORISES)
def test_shapes_of_every_kind_of_model(name, vectorize):
    model, outcomes, theta_dim, y_dim = VECTORISES[name]
    experiment = Experiment(model, outcomes, vectorize=vectorize)
    assert experiment.runs_together is vectorize
    assert (experiment.theta_dim, experiment.y_dim) == (theta_dim, y_dim)
    sample = sample_joint(experiment, 7, likelihood=True)
    assert sample.theta.shape == (7, theta_dim)
    assert sample.y.shape == (7, y_dim)
    assert sample.log_prior.shape == sample.log_likelihood.shape == (7,)
    for site in (*experiment.targets, *experiment.observations):
        assert sample.values[site.name].shape == (7, *site.shape)
        # Rows are draws of their own: no value is shared between experiments.
        flat = sample.values[site.name].reshape(7, -1).double()
        assert site.is_discrete or (flat @ torch.randn(flat.shape[1]).double()).unique().numel() == 7


# --- one design an experiment ---------------------------------------------------------------------------------------


class Laboratory:
    """Half of the designs are numbers, half one value for each element of a plate; some numbers come stacked."""

    def __init__(self, num_designs, num_stacked=0):
        self.numbers = [f"number_{i}" for i in range((num_designs - num_stacked) // 2)]
        self.vectors = [f"vector_{i}" for i in range((num_designs - num_stacked) // 2)]
        self.stacked = [f"stacked_{i}" for i in range(num_stacked)]
        self.runs = 0

    def __call__(self):
        self.runs += 1
        theta = normal("theta")
        number = sum(pyro.param(name, torch.tensor(1.0)) for name in self.numbers)
        if self.stacked:
            number = number + torch.stack([pyro.param(name, torch.tensor(1.0)) for name in self.stacked], -1).sum(-1)
        vector = sum(pyro.param(name, torch.ones(4)) for name in self.vectors)
        with pyro.plate("sensors", 4):
            return normal("y", number * theta + vector, 1e-3)

    def designs(self, num):
        designs = {name: torch.rand(num) for name in (*self.numbers, *self.stacked)}
        return designs | {name: torch.rand(num, 4) for name in self.vectors}


@pytest.mark.parametrize(("num_designs", "num_stacked"), [(6, 0), (8, 0), (10, 0), (8, 2), (10, 4)])
def test_layouts_of_designs_are_found_in_a_number_of_runs_linear_in_the_designs(num_designs, num_stacked):
    model = Laboratory(num_designs, num_stacked)
    experiment, designs, before = Experiment(model, "y"), model.designs(5), model.runs
    experiment = experiment.laid_out(designs)
    assert experiment.takes_design_rows
    # A trial is one run of three rows and three of one; all but the last of two layouts may fail on the way.
    assert model.runs - before <= 4 * ((num_designs + 2) * 2 + 1)
    sample = sample_joint(experiment, 7, designs)
    number = sum(designs[name] for name in (*model.numbers, *model.stacked))
    mean = number[:, None] * sample.theta + sum(designs[name] for name in model.vectors)
    assert (sample.y - mean).abs().max() < 0.01


def test_designs_of_one_kind_are_laid_out_at_once():
    model = Laboratory(4)
    model.vectors = model.numbers[:1]  # a number for each element alike
    experiment, before = Experiment(model, "y"), model.runs
    assert experiment.laid_out({name: torch.rand(5) for name in model.numbers}).takes_design_rows
    assert model.runs - before <= 4 * 2


def test_a_model_that_takes_no_design_rows_is_warned_of():
    def model():
        xi = pyro.param("xi", torch.ones(3))
        return normals("y", normal("theta").unsqueeze(-1) * xi / xi.sum())

    with pytest.warns(UserWarning, match="one design an experiment"):
        assert not Experiment(model, "y").laid_out({"xi": torch.rand(5, 3)}).takes_design_rows
