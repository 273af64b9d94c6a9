"""What was read at one design is looked at again at every candidate: masks, supports, links, shapes."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints

from pyro_voed import (
    Experiment,
    Fresh,
    Pool,
    eig_flow,
    eig_marginal,
    eig_nmc,
    optimise_design,
    sample_joint,
    search_grid,
)
from pyro_voed.inference.outcomes import check_outcome, pack_outcome
from tests.closed_forms import check_bounds


def normal(name, loc=0.0, scale=1.0):
    return pyro.sample(name, dist.Normal(loc, scale))


def measured_by_design():
    n = pyro.param("n", torch.tensor(6.0), constraint=constraints.interval(0.0, 6.0))
    theta = normal("theta")
    with pyro.plate("readings", 6), poutine.mask(mask=torch.arange(6) < n):
        return pyro.sample("y", dist.Normal(theta, 2.0))


def measured_eig(n):
    return 0.5 * torch.log1p(torch.as_tensor(n) / 4.0)


N = torch.tensor([2.0, 6.0])


def test_a_mask_that_depends_on_the_design_is_that_of_each_candidate():
    exact = measured_eig(N)
    found = eig_nmc(measured_by_design, "y", designs={"n": N}, seed=0)
    # Two comparisons, each beyond four standard errors with probability 6e-5.
    assert ((found.eig - exact).abs() < 4 * found.standard_error + 0.003).all()
    brief = Fresh(num_steps=200)
    check_bounds(eig_flow(measured_by_design, "y", designs={"n": N}, training=brief, seed=0), exact, gap=0.1)
    sample = sample_joint(found.experiment, 7, {"n": N})
    assert torch.equal(sample.y[:, 0, 6:], (torch.arange(6) < 2).float().expand(7, 6))
    assert (sample.y[:, 0, 2:6] == sample.y[0, 0, 2:6]).all(), "what was not measured tells nothing"
    with pytest.raises(NotImplementedError, match="one design a time"):
        eig_marginal(measured_by_design, "y", designs={"n": N})


def test_one_candidate_alone_is_packed_as_it_is_measured():
    found = eig_nmc(measured_by_design, "y", designs={"n": torch.tensor(2.0)}, seed=0)
    assert found.experiment.y_dim == 2
    assert abs(found.eig - measured_eig(2.0)) < 4 * found.standard_error + 0.003


def windowed():
    t = pyro.param("t", torch.tensor([3.0, 4.0]), constraint=constraints.interval(0.0, 10.0))
    theta = normal("theta")
    with pyro.plate("readings", 2), poutine.mask(mask=t < 6.0):
        return pyro.sample("y", dist.Normal(theta * t, 1.0))


def test_a_search_does_not_leave_the_window_in_which_something_is_measured():
    with pytest.raises(NotImplementedError, match=r"'y'.*search_spsa"):
        optimise_design(windowed, "y", seed=0)
    candidates = {"t": torch.tensor([[5.9, 5.9], [9.9, 9.9], [3.0, 9.0]])}
    found = search_grid(lambda designs: eig_nmc(windowed, "y", designs=designs), candidates, seed=0)
    assert torch.equal(found.designs["t"], candidates["t"][0])
    assert (found.candidates.eig[1]) == 0.0
    assert abs(found.eig - 0.5 * math.log1p(2 * 5.9**2)) < 4 * found.standard_error + 0.01


def binomial():
    n = pyro.param("n", torch.tensor(2.0), constraint=constraints.positive)
    theta = pyro.sample("theta", dist.Beta(1.0, 1.0))
    return pyro.sample("y", dist.Binomial(n.round(), theta))


def binomial_eig(n):
    """With a uniform prior each count is equally probable."""
    theta = (torch.arange(4_000).double() + 0.5) / 4_000
    log_mass = dist.Binomial(n, theta.unsqueeze(-1)).log_prob(torch.arange(n + 1).double())
    return math.log(n + 1) + (log_mass.exp() * log_mass).sum(-1).mean().item()


def test_values_of_an_outcome_are_those_of_every_candidate():
    found = eig_marginal(binomial, "y", designs={"n": torch.tensor([2.0, 10.0])}, seed=0)
    exact = torch.tensor([binomial_eig(2), binomial_eig(10)])
    assert ((found.eig - exact).abs() < 4 * found.standard_error + 1e-3).all()


one_after_the_other = pytest.mark.filterwarnings("ignore:the model does not take one design an experiment")


def linked_elsewhere():
    """At w = 0 b is drawn given theta alone, and nothing flows from a to it."""
    w = pyro.param("w", torch.tensor(0.0))
    theta = normal("theta")
    a = normal("a", theta)
    weight = float(w.detach())
    normal("b", weight * a if weight else torch.zeros_like(theta))


@one_after_the_other
@pytest.mark.filterwarnings("ignore:.*designs are indistinguishable")
def test_links_between_outcomes_are_those_of_every_candidate():
    """Given a, b tells nothing more of theta."""
    found = eig_nmc(linked_elsewhere, ["a", "b"], "theta", designs={"w": torch.tensor([0.0, 1.0])}, seed=0)
    assert found.experiment.linked_outcomes
    assert ((found.eig - 0.5 * math.log(2.0)).abs() < 4 * found.standard_error + 0.003).all()
    assert not Experiment(linked_elsewhere, ["a", "b"], "theta").linked_outcomes


@one_after_the_other
@pytest.mark.filterwarnings("ignore:.*designs are indistinguishable")
def test_outcomes_of_a_pool_are_drawn_anew_only_where_no_candidate_forbids_it():
    brief = {"training": Pool(2_000, max_epochs=1), "num_samples": 100}
    found = eig_flow(linked_elsewhere, ["a", "b"], "theta", designs={"w": torch.tensor([[0.0], [1.0]])}, **brief)
    assert not found.experiment.redrawable
    assert Experiment(linked_elsewhere, ["a", "b"], "theta").redrawable


@one_after_the_other
def test_a_plate_whose_size_is_a_design_is_one_clear_error():
    def model():
        n = pyro.param("n", torch.tensor(4.0))
        theta = normal("theta")
        with pyro.plate("readings", int(n.detach())):
            return pyro.sample("y", dist.Normal(theta, 1.0))

    with pytest.raises(ValueError, match=r"site 'y' has shape \(4,\).* n = \[6\].*mask"):
        eig_nmc(model, "y", designs={"n": torch.tensor([4.0, 6.0])})


# --- what must not depend on chance ---------------------------------------------------------------------------------


def missing_at_random():
    """Five in a hundred, behind the back of torch."""
    theta, e = normal("theta"), normal("e")
    return pyro.sample("y", dist.Normal(theta, 1.0).mask(torch.as_tensor(e.detach().numpy() < 1.645)))


@pytest.mark.parametrize("estimator", [eig_nmc, eig_flow])
@pytest.mark.parametrize("seed", range(3))
def test_a_mask_that_depends_on_chance_is_refused_whatever_the_probes_saw(estimator, seed):
    with pytest.raises(ValueError, match="mask of outcome 'y' changes"):
        estimator(missing_at_random, "y", "theta", seed=seed)


def seldom_another_site():
    theta = normal("theta")
    if float(theta) > 2.0:
        normal("extra")
    return normal("y", theta)


@pytest.mark.parametrize("estimator", [eig_nmc, eig_flow])
def test_a_site_that_is_missing_in_a_few_runs_is_named(estimator):
    with pytest.raises(ValueError, match=r"\['extra'\] come and go"):
        estimator(Experiment(seldom_another_site, "y", "theta", vectorize=False, seed=0))


def test_an_outcome_in_hand_is_packed_as_it_was_measured_at_its_design():
    experiment = eig_nmc(measured_by_design, "y", designs={"n": N}, num_outer_samples=100, seed=0).experiment
    values = torch.tensor([1.0, 2.0, *(4 * [torch.nan])])
    packed = pack_outcome(experiment, check_outcome(experiment, values), {"n": torch.tensor(2.0)})
    assert torch.equal(packed[:2], values[:2])
    assert torch.equal(packed[6:], (torch.arange(6) < 2).float())
    with pytest.raises(ValueError, match="4 of 6 values measured at this design are not finite"):
        pack_outcome(experiment, check_outcome(experiment, values), {"n": torch.tensor(6.0)})
