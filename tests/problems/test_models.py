"""Laws every ready model obeys: the library reads it as meant, batches give what single runs give, nothing is left."""

import math
from functools import partial

import pyro
import pytest
import torch
from pyro import poutine

from pyro_voed import Experiment
from pyro_voed.problems import aphids, covariance, electrocoating, finite, implicit_toy, linear_gaussian, nonlinear
from pyro_voed.problems import michaelis_menten as mm
from pyro_voed.problems import regression as rg
from pyro_voed.problems import twelve_variances as tv
from pyro_voed.problems.electrocoating_solver import Film, deposit, make_bath, respond
from pyro_voed.problems.regression_coupled import coupled_eig

COATING = partial(electrocoating.electrocoating, num_times=4, num_steps=40)
LEAPS = partial(aphids.aphids, (2.0, 4.0), simulator=partial(aphids.leaping_counts, step=0.5))
MODELS = {
    # Factory, targets where they must be named, sizes of targets and outcome, designs.
    "linear_gaussian": (linear_gaussian.linear_gaussian, None, (2, 3), ("xi",)),
    "dependent_nuisance": (linear_gaussian.dependent_nuisance, "theta", (1, 1), ()),
    "finite": (finite.finite, None, (1, 1), ("xi",)),
    "implicit_toy": (implicit_toy.implicit_toy, "theta", (1, 1), ("xi",)),
    "implicit_pair": (implicit_toy.implicit_pair, "theta", (2, 2), ("xi",)),
    "michaelis_menten": (mm.michaelis_menten, None, (2, 7), ("xi",)),
    "regression": (rg.regression, None, (21, 20), ("xi",)),
    "nonlinear": (nonlinear.nonlinear, None, (3, 1), ("d",)),
    "nonlinear_one": (nonlinear.nonlinear_one, None, (1, 1), ("d",)),
    "electrocoating": (COATING, None, (3, 4), ("current",)),
    "aphids": (aphids.aphids, "theta", (2, 1), ("xi",)),
    "aphids by leaps": (LEAPS, "theta", (2, 2), ("xi",)),
    "twelve_variances": (tv.twelve_variances, None, (12, 120), ()),
    "covariance": (covariance.covariance, None, (12 + 12 + 66, 263 * 12), ()),
}
WITHOUT_PLATES = [name for name in MODELS if name not in ("twelve_variances", "covariance")]
NO_DENSITY = ("aphids", "aphids by leaps")
NUM_RUNS = 11
"""Odd and unlike any event size, so that a batch dimension cannot pass for one."""


@pytest.mark.parametrize("name", MODELS)
def test_the_library_reads_it_as_meant_and_runs_it_together(name):
    make, targets, sizes, labels = MODELS[name]
    experiment = Experiment(make(), "y", targets)
    assert (experiment.theta_dim, experiment.y_dim) == sizes
    assert experiment.design_labels == labels
    assert experiment.runs_together
    assert experiment.is_explicit is not (name.startswith("implicit") or name in NO_DENSITY)
    assert experiment.unchecked == (("y",) if name in NO_DENSITY else ())
    assert experiment.has_log_prior is (name != "dependent_nuisance")
    designs = {site.name: torch.stack([site.value, 0.9 * site.value]) for site in experiment.designs}
    assert experiment.laid_out(designs).takes_design_rows or not designs
    assert list(pyro.get_param_store().keys()) == []


@pytest.mark.parametrize("name", [name for name in WITHOUT_PLATES if name not in NO_DENSITY])
def test_batched_runs_agree_with_single_runs(name):
    model = MODELS[name][0]()
    single = poutine.trace(model).get_trace()
    designs = {name: single.nodes[name]["value"].detach() for name in single.param_nodes}
    rows = {name: value * torch.empty(NUM_RUNS, *value.shape).uniform_(0.5, 1.0) for name, value in designs.items()}
    with poutine.substitute(data=rows), pyro.plate("runs", NUM_RUNS, dim=-1):
        batch = poutine.trace(model).get_trace()
    batch.compute_log_prob()
    # The solver of electrocoating inverts other matrices for a batch than for one, in single precision.
    close = {"rtol": 1e-3, "atol": 1e-2} if name == "electrocoating" else {}
    for run in range(NUM_RUNS):
        latents = {name: batch.nodes[name]["value"][run] for name in batch.stochastic_nodes if name != "runs"}
        with poutine.substitute(data={name: value[run] for name, value in rows.items()}):
            single = poutine.trace(poutine.condition(model, data=latents)).get_trace()
        single.compute_log_prob()
        for site in single.stochastic_nodes + single.observation_nodes:
            torch.testing.assert_close(batch.nodes[site]["value"][run], single.nodes[site]["value"])
            torch.testing.assert_close(batch.nodes[site]["log_prob"][run], single.nodes[site]["log_prob"], **close)


@pytest.mark.parametrize("name", WITHOUT_PLATES)
def test_the_design_is_the_only_parameter_and_has_a_gradient_where_the_outcome_does(name):
    make, _, _, labels = MODELS[name]
    outcome = make()()
    assert tuple(pyro.get_param_store().keys()) == labels
    if not (labels and outcome.requires_grad):
        assert name in ("finite", "nonlinear", "dependent_nuisance", *NO_DENSITY)
        return
    outcome.sum().backward()
    slope = pyro.param(labels[0]).unconstrained().grad
    assert slope.isfinite().all()
    assert (slope != 0).any()


@pytest.mark.parametrize(
    ("make", "initial"),
    [(linear_gaussian.linear_gaussian, linear_gaussian.DEFAULT_DESIGN), (mm.michaelis_menten, mm.START_DESIGNS)],
)
def test_an_initial_design_is_copied_into_the_parameter(make, initial):
    given = torch.tensor(initial)
    make(given)()
    torch.testing.assert_close(pyro.param("xi").detach(), torch.tensor(initial))
    with torch.no_grad():
        pyro.param("xi").unconstrained().add_(1.0)
    assert torch.equal(given, torch.tensor(initial))


UNIT = torch.tensor([[0.0, 0.2, 0.4], [0.6, 0.8, 1.0]])
MATRICES = torch.randn(2, 3, 4, 2, generator=torch.Generator().manual_seed(0)).double()
CONCENTRATIONS = torch.tensor([[mm.START_DESIGNS] * 3, [mm.BEST_DESIGNS] * 3])
EXACT = {
    "finite": (finite.exact_eig, UNIT),
    "implicit_toy": (implicit_toy.exact_eig, UNIT),
    "nonlinear": (nonlinear.exact_eig, UNIT),
    "nonlinear_one": (nonlinear.exact_eig_one, UNIT),
    "linear_gaussian": (linear_gaussian.exact_eig, MATRICES),
    "scales": (partial(linear_gaussian.exact_eig, prior_scales=(0.7, 2.0), noise_scale=0.5), MATRICES),
    "michaelis_menten": (
        lambda designs: mm.exact_eig(designs, grid_size=61, num_outcomes=32, num_repeats=2)[0],
        CONCENTRATIONS,
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_answers_take_batches_and_no_random_numbers(name):
    exact, designs = EXACT[name]
    before = torch.get_rng_state()
    values = exact(designs)
    assert values.shape == (2, 3)
    torch.testing.assert_close(values[1, 2], exact(designs[1, 2]))
    rg.exact_eig(torch.eye(2), num_outcomes=16, num_repeats=2)
    assert torch.equal(torch.get_rng_state(), before)


def calls(functions, arguments, words):
    """Each function with each arguments, and what the error says."""
    return [(partial(function, *given), words) for function in functions for given in arguments]


ONES, COLUMN, NAN, INF = torch.ones(2), torch.ones(2, 1), math.nan, math.inf
SMALL_BATH = partial(make_bath, 0.2, 0.3, depth=0.05, conductivity=0.1, num_cells=8, num_columns=8)
FILM = Film(*torch.ones(3).double(), resistivity=4e6, resistivity_current=20.0, onset_width=0.05)
COUNTS, ONE_DESIGN = (aphids.exact_counts, aphids.leaping_counts), (nonlinear.nonlinear, nonlinear.nonlinear_one)
OF_ROWS = (tv.twelve_variances, tv.exact_eig, tv.exact_correlation)
REFUSED = [
    *calls([linear_gaussian.linear_gaussian], [[torch.ones(3, 4)]], "one column for each of the 2 prior scales"),
    *calls([linear_gaussian.ab_test_design], [[11]], "got 11"),
    *calls([partial(mm.exact_eig, num_repeats=1)], [[torch.tensor(mm.START_DESIGNS)]], "num_repeats of at least 2"),
    *calls([partial(rg.exact_eig, num_repeats=1)], [[torch.eye(2)]], "num_repeats of at least 2"),
    *calls([rg.exact_eig], [[torch.full((2, 2), 0.5)]], "at most one entry that is not zero"),
    *calls([rg.regression], [[torch.ones(0, 3)]], r"at least one row and column, got shape \(0, 3\)"),
    *calls([coupled_eig], [[torch.ones(2, 2)], [torch.eye(3)[:2]]], "square regular matrix"),
    *calls(ONE_DESIGN, [[0.0], [1.0], [-0.2], [NAN]], r"expected a number in \(0, 1\)"),
    *calls(
        [nonlinear.exact_eig, nonlinear.exact_eig_one],
        [[torch.tensor([0.5, 1.5])]],
        r"numbers in \[0, 1\], got values from 0.5 to 1.5",
    ),
    *calls(OF_ROWS, [[0]], "num_rows must be at least 1, got 0"),
    *calls([tv.twelve_variances], [[10, 0]], "num_variables must be at least 1, got 0"),
    *calls([tv.exact_posterior_mean], [[torch.tensor([[1.0, x]] * 5)] for x in (0.0, NAN, INF)], "not all zeros"),
    *calls([covariance.covariance], [[1, 5], [3, 0]], "at least 2 variables and 1 row"),
    *calls(
        [aphids.aphids], [[()], [(3.0, 51.0)], [(-1.0,)]], r"times: expected one or more numbers of days in \[0, 50"
    ),
    *calls([partial(COUNTS[1], ONES, ONES, COLUMN)], [[0.0], [-1.0], [NAN], [INF]], "step: expected"),
    *calls(COUNTS, [[torch.tensor([0.2, -0.1]), ONES, COLUMN]], "birth_rate: .* got -0.1"),
    *calls(COUNTS, [[ONES, torch.tensor([NAN, 0.0]), COLUMN]], "death_rate: .* got nan"),
    *calls(COUNTS, [[ONES, ONES, torch.tensor([[1.0], [-2.0]])]], "times: .* got -2"),
    *calls(COUNTS, [[ONES, ONES, torch.tensor([[1.0], [INF]])]], "times: .* got inf"),
    *calls([COATING], [[5.0], [200.0], [NAN]], "initial_current: expected a number of mA inside"),
    (partial(COATING, num_times=0), "num_times: expected a positive number, got 0"),
    (partial(COATING, num_steps=0), "num_steps: expected a positive number, got 0"),
    (partial(COATING, voltage_limit=0.0), "voltage_limit: expected a positive number, got 0"),
    (partial(make_bath, 0.0, 0.3, depth=0.1, conductivity=0.1), "length: expected a positive number, got 0"),
    (
        lambda: deposit(SMALL_BATH(), FILM, *ONES.double(), steps_per_interval=0),
        "steps_per_interval: expected a positive",
    ),
    (partial(SMALL_BATH, anode_cover=0.3), r"anode_cover: expected a whole number of 8 cells, got 2\.4"),
    (lambda: respond(SMALL_BATH(), torch.ones(1).double()), "film_resistance: expected 8 cells"),
    *calls([electrocoating.TruncatedNormal], [torch.tensor([0.0, 1.0, 2.0, 1.0])], "low: expected bounds below high"),
]


@pytest.mark.parametrize(("call", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_impossible_numbers_are_refused_by_name(call, words):
    with pytest.raises((ValueError, NotImplementedError), match=words):
        call()
