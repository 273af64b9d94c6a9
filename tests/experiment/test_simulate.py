"""Laws of simulation: run together or alone, at one design or at many, in chunks or at once, it is the same thing."""

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints

from pyro_voed import resolve, sample_joint
from pyro_voed.experiment.programs import run_rows, sample_nodes
from pyro_voed.experiment.scoring import pairwise_log_likelihood
from pyro_voed.experiment.simulate import non_finite_sites, pack_designs, pack_run, unpack_designs, unpack_targets
from pyro_voed.problems import implicit_toy, linear_gaussian, michaelis_menten

Z_MAX = 5.0
"""Largest standardised error that passes: an exact method exceeds it with probability 6e-7 in each comparison."""


def scalar_design():
    xi = pyro.param("xi", torch.tensor(0.7), constraint=constraints.interval(0.0, 2.0))
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    return pyro.sample("y", dist.Normal(xi * theta, 0.5))


def event_design():
    xi = pyro.param("xi", torch.tensor([0.2, 0.5, 0.8]), constraint=constraints.unit_interval)
    theta = pyro.sample("theta", dist.LogNormal(torch.zeros(2), 0.3).to_event(1))
    mean = theta[..., :1] * xi / (xi + theta[..., 1:])
    return pyro.sample("y", dist.LogNormal(mean, 0.2).to_event(1))


def plate_design():
    xi = pyro.param("xi", torch.tensor([0.2, 0.5, 0.8]))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("points", 3):
        intercept = pyro.sample("intercept", dist.Normal(0.0, 1.0))
        return pyro.sample("y", dist.Normal(intercept + slope * xi, 0.5))


def scalar_design_beside_a_plate():
    xi = pyro.param("xi", torch.tensor(0.7))
    with pyro.plate("points", 3):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        return pyro.sample("y", dist.Normal(xi * theta, 0.5))


def several_kinds_of_design():
    share = pyro.param("share", torch.tensor(0.5), constraint=constraints.interval(0.0, 2.0))
    dose = pyro.param("dose", torch.tensor(0.7), constraint=constraints.positive)
    shift = pyro.param("shift", torch.zeros(2))
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(share * dose * theta + shift.sum(-1), 0.5))


def several_designs():
    dose = pyro.param("dose", torch.tensor(0.7), constraint=constraints.positive)
    times = pyro.param("times", torch.tensor([1.0, 2.0]))
    theta = pyro.sample("theta", dist.Gamma(3.0, 2.0))
    pyro.sample("y", dist.Normal(dose.unsqueeze(-1) * torch.exp(-theta.unsqueeze(-1) * times), 0.1).to_event(1))
    pyro.sample("count", dist.Poisson(dose * theta))


def matrix_design():
    return linear_gaussian.linear_gaussian()()


def with_nuisance():
    return implicit_toy.implicit_pair()()


def bounded_chain():
    xi = pyro.param("xi", torch.tensor(0.7))
    a = pyro.sample("a", dist.Uniform(1.0, 3.0))
    b = pyro.sample("b", dist.Uniform(torch.zeros_like(a), a))
    return pyro.sample("y", dist.Normal(xi * (a + b), 0.5))


MODELS = {
    "scalar design": (scalar_design, "y", "theta"),
    "event design": (event_design, "y", "theta"),
    "design in a plate": (plate_design, "y", None),
    "scalar design beside a plate": (scalar_design_beside_a_plate, "y", None),
    "several designs": (several_designs, ["y", "count"], None),
    "matrix design": (matrix_design, "y", None),
    "nuisance, deterministic outcome": (with_nuisance, "y", "theta"),
    "dependent bounds": (bounded_chain, "y", None),
    "michaelis_menten": (michaelis_menten.michaelis_menten(), "y", None),
}


@pytest.fixture(params=MODELS)
def case(request):
    return MODELS[request.param]


def candidates(experiment, *batch):
    """Designs of a batch, inside their constraints and all different."""
    return {
        site.name: site.transform(
            site.transform.inv(site.value) + 0.5 * torch.randn(*batch, *site.value.shape)
        ).detach()
        for site in experiment.designs
    }


def assert_same_distribution(first, second):
    """Means and second moments agree within their joint standard errors."""
    for power in (1, 2):
        a, b = first.double() ** power, second.double() ** power
        error = (a.var(0) / a.shape[0] + b.var(0) / b.shape[0]).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() <= Z_MAX * error + 1e-9).all()


# --- together and alone ---------------------------------------------------------------------------------------------


def test_vectorised_and_sequential_simulation_agree_in_distribution(case):
    together, alone = (resolve(*case, vectorize=vectorize) for vectorize in (True, False))
    first, second = sample_joint(together, 4_000), sample_joint(alone, 400)
    assert_same_distribution(first.theta, second.theta)
    assert_same_distribution(torch.tanh(first.y), torch.tanh(second.y))
    if first.log_prior is not None:
        assert_same_distribution(first.log_prior[:, None], second.log_prior[:, None])


def test_vectorised_and_sequential_simulation_agree_draw_by_draw(case):
    together, alone = (resolve(*case, vectorize=vectorize) for vectorize in (True, False))
    run = run_rows(together.program, 7, together.shapes, designs=together.design_values)
    values = {
        name: run.value(name)
        for name, node in sample_nodes(run.traces[0]).items()
        if not node["infer"].get("_deterministic")
    }
    again = run_rows(alone.program, 7, alone.shapes, designs=alone.design_values, row_values=values)
    likelihood = together.is_explicit
    first = pack_run(together, run, torch.Size([7]), likelihood)
    second = pack_run(alone, again, torch.Size([7]), likelihood)
    for name in ("theta", "y", "log_prior", "log_likelihood", "log_det", "outcome_log_det"):
        one, other = getattr(first, name), getattr(second, name)
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_equal_seeds_give_equal_draws(case):
    experiment = resolve(*case)
    draws = []
    for _ in range(2):
        pyro.set_rng_seed(3)
        draws.append(sample_joint(experiment, 10))
    assert torch.equal(draws[0].theta, draws[1].theta)
    assert torch.equal(draws[0].y, draws[1].y)


# --- a batch of designs and its members -----------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(4,), (2, 3)], ids=str)
def test_a_batch_of_designs_agrees_with_its_members_draw_by_draw(case, batch):
    plain = resolve(*case)
    designs = candidates(plain, *batch)
    experiment = resolve(*case, designs=designs)
    assert experiment.program.design_singletons is not None, "these models all take a design an experiment"
    num = 5
    likelihood = experiment.is_explicit
    batched = sample_joint(experiment, num, designs, likelihood=likelihood)
    assert batched.theta.shape[:-1] == batched.y.shape[:-1] == (num, *batch)
    random = [site.name for site in (*experiment.targets, *experiment.observations) if not site.is_deterministic]
    if experiment.nuisance:
        return  # nuisance draws are not kept, so rows cannot be replayed
    for member in torch.cartesian_prod(*map(torch.arange, batch)).reshape(-1, len(batch)).tolist():
        index = tuple(member)
        own = {name: value[index] for name, value in designs.items()}
        values = {name: batched.values[name][(slice(None), *index)] for name in random}
        run = run_rows(plain.program, num, plain.shapes, designs=own, row_values=values)
        alone = pack_run(plain, run, torch.Size([num]), likelihood)
        for name in ("theta", "y", "log_prior", "log_likelihood"):
            expected, got = getattr(alone, name), getattr(batched, name)
            if expected is not None:
                torch.testing.assert_close(got[(slice(None), *index)], expected, rtol=1e-4, atol=1e-4)


def test_a_batch_of_designs_agrees_with_its_members_in_distribution(case):
    plain = resolve(*case)
    designs = candidates(plain, 3)
    experiment = resolve(*case, designs=designs)
    batched = sample_joint(experiment, 4_000, designs)
    looped = sample_joint(plain, 4_000, designs)
    for member in range(3):
        alone = sample_joint(plain, 4_000, {name: value[member] for name, value in designs.items()})
        for other in (batched, looped):
            assert_same_distribution(other.theta[:, member], alone.theta)
            assert_same_distribution(torch.tanh(other.y[:, member]), torch.tanh(alone.y))


def test_candidates_for_one_of_several_designs_leave_the_others_at_their_values():
    designs = {"dose": torch.tensor([0.1, 5.0])}
    experiment = resolve(several_designs, ["y", "count"], designs=designs)
    sample = sample_joint(experiment, 2_000, designs)
    assert sample.y.shape == (2_000, 2, 3)
    theta = sample.values["theta"]
    expected = designs["dose"][:, None] * torch.exp(-theta.unsqueeze(-1) * torch.tensor([1.0, 2.0]))
    residual = (sample.values["y"] - expected) / 0.1
    assert_same_distribution(residual.flatten(0, 1), torch.randn(4_000, 2))


def test_an_unbatched_design_is_shared_by_the_batch_of_another():
    designs = {"dose": torch.tensor([0.1, 5.0]), "times": torch.tensor([3.0, 4.0])}
    experiment = resolve(several_designs, ["y", "count"], designs=designs)
    sample = sample_joint(experiment, 2_000, designs)
    expected = designs["dose"][:, None] * torch.exp(-sample.values["theta"].unsqueeze(-1) * designs["times"])
    assert_same_distribution(((sample.values["y"] - expected) / 0.1).flatten(0, 1), torch.randn(4_000, 2))


def test_a_model_that_takes_only_one_design_is_looped_over_with_a_warning():
    def model():
        xi = pyro.param("xi", torch.tensor(0.7))
        if xi > 1.0:  # no batch of designs gets through
            xi = xi * 2
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        return pyro.sample("y", dist.Normal(xi * theta, 0.5))

    designs = {"xi": torch.tensor([0.5, 2.0])}
    with pytest.warns(UserWarning, match="one after the other"):
        experiment = resolve(model, "y", designs=designs)
    residual = sample_joint(experiment, 1_000, designs)
    residual = (residual.y[..., 0] - residual.theta[..., 0] * torch.tensor([0.5, 4.0])) / 0.5
    assert_same_distribution(residual.reshape(-1, 1), torch.randn(2_000, 1))


def test_a_design_batch_of_the_size_of_a_plate_is_not_mistaken_for_it():
    designs = {"xi": torch.tensor([0.1, 1.0, 10.0])}
    experiment = resolve(scalar_design_beside_a_plate, "y", designs=designs)
    sample = sample_joint(experiment, 3, designs)
    many = sample_joint(experiment, 2_000, designs)
    assert sample.y.shape == (3, 3, 3)
    spread = many.y.std(0)
    expected = (0.25 + designs["xi"] ** 2).sqrt()[:, None].expand(3, 3)
    # The relative standard error of a Gaussian standard deviation is 1 / sqrt(2 n).
    assert ((spread / expected - 1).abs() <= Z_MAX / math.sqrt(4_000)).all()


WRONG_DESIGNS = {
    "unknown": ({"x": torch.tensor([0.5])}, ["x", "xi"]),
    "wrong shape": ({"xi": torch.zeros(4, 2) + 0.5}, ["xi", "(*batch, 3)", "(4, 2)"]),
    "too few dimensions": ({"xi": torch.tensor(0.5)}, ["xi", "(*batch, 3)"]),
    "outside": ({"xi": torch.tensor([0.5, 0.5, 1.5])}, ["xi", "constraint"]),
    "one of the batch outside": ({"xi": torch.tensor([[0.5, 0.5, 0.5], [0.5, -0.5, 0.5]])}, ["xi", "constraint"]),
    "not a number": ({"xi": torch.tensor([0.5, math.nan, 0.5])}, ["xi", "constraint"]),
}


@pytest.mark.parametrize(
    "where",
    [
        "resolve",
        "sample_joint",
    ],
)
@pytest.mark.parametrize("name", WRONG_DESIGNS)
def test_wrong_designs_are_refused(name, where):
    designs, words = WRONG_DESIGNS[name]
    experiment = resolve(event_design, "y")
    calls = {
        "resolve": lambda: resolve(event_design, "y", designs=designs),
        "sample_joint": lambda: sample_joint(experiment, 3, designs),
    }
    with pytest.raises(ValueError, match="designs") as caught:
        calls[where]()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_unequal_design_batches_are_refused():
    with pytest.raises(ValueError, match="one batch shape"):
        sample_joint(resolve(several_designs, ["y", "count"]), 3, {"dose": torch.ones(2), "times": torch.ones(3, 2)})


@pytest.mark.parametrize("values", [[0.2, 0.5, 0.8], [[0.2, 0.5, 0.8], [0.3, 0.3, 0.3]]], ids=["one", "two"])
def test_designs_may_be_lists(values):
    assert resolve(event_design, "y", designs={"xi": values}).design_labels == ("xi",)


# --- chunks ---------------------------------------------------------------------------------------------------------


def test_chunks_give_the_right_number_of_equally_distributed_draws(case):
    experiment = resolve(*case)
    limit = 50 * 8 * experiment.bytes_per_row  # chunks of fifty
    before = experiment.program.num_calls
    chunked = sample_joint(experiment, 2_001, likelihood=experiment.is_explicit, max_bytes=limit)
    assert experiment.program.num_calls - before == 2_001
    assert chunked.theta.shape[0] == chunked.y.shape[0] == 2_001
    assert torch.unique(chunked.theta, dim=0).shape[0] == 2_001, "chunks repeat draws"
    whole = sample_joint(experiment, 2_001)
    assert_same_distribution(chunked.theta, whole.theta)
    assert_same_distribution(torch.tanh(chunked.y), torch.tanh(whole.y))


def test_chunks_of_a_design_batch_keep_its_shape():
    experiment = resolve(event_design, "y")
    designs = candidates(experiment, 2, 3)
    experiment = resolve(event_design, "y", designs=designs)
    sample = sample_joint(experiment, 11, designs, max_bytes=1)
    assert sample.y.shape == (11, 2, 3, 3)
    # Each of the three values in an interval comes as its place and as its angle.
    assert sample.designs.shape == (2, 3, 6)


def test_densities_see_designs_finite_at_the_ends_of_an_interval_and_get_them_back():
    experiment = resolve(several_kinds_of_design, "y")
    designs = {
        "share": torch.tensor([0.0, 0.3, 2.0]),
        "dose": torch.tensor([0.5, 1.0, 4.0]),
        "shift": torch.zeros(3, 2),
    }
    packed = pack_designs(experiment, designs)
    assert packed.shape == (3, 2 + 1 + 2)
    assert torch.isfinite(packed).all()
    for name, value in unpack_designs(experiment, packed).items():
        torch.testing.assert_close(value, designs[name])


def test_the_number_of_simulator_calls_is_what_it_was():
    class Counted:
        calls = 0

        def __call__(self):
            Counted.calls += 1
            return scalar_design()

    experiment = resolve(Counted(), "y", vectorize=False)
    before, counted = experiment.program.num_calls, Counted.calls
    sample_joint(experiment, 13)
    assert experiment.program.num_calls - before == Counted.calls - counted == 13
    sample_joint(experiment, 4, {"xi": torch.tensor([0.1, 0.2, 0.3])})
    assert experiment.program.num_calls - before == Counted.calls - counted == 13 + 12


def test_the_calls_of_resolve_are_counted_too():
    class Counted:
        calls = 0

        def __call__(self):
            Counted.calls += 1
            return scalar_design()

    experiment = resolve(Counted(), "y", vectorize=False)
    assert experiment.program.num_calls == Counted.calls


# --- packing and densities ------------------------------------------------------------------------------------------


def cholesky():
    factor = pyro.sample("factor", dist.LKJCholesky(3, 2.0))
    return pyro.sample("y", dist.Normal(factor[..., 1:, 0], 1.0).to_event(1))


def simplex():
    p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    return pyro.sample("y", dist.Normal(p, 1.0).to_event(1))


def free_part(name, value):
    """Enough elements of a constrained value to be its coordinates."""
    if name == "factor":
        return value[torch.tril_indices(3, 3, -1).unbind()]
    return value[..., :-1] if name == "p" else value.flatten()


PACKED = {
    "positive": (event_design, "y"),
    "dependent bounds": (bounded_chain, "y"),
    "simplex": (simplex, "y"),
    "LKJ Cholesky": (cholesky, "y"),
}


@pytest.mark.parametrize("name", PACKED)
def test_log_dets_are_those_of_autodiff(name):
    torch.set_default_dtype(torch.float64)
    try:
        experiment = resolve(*PACKED[name])
        sample = sample_joint(experiment, 3)

        def values(theta):
            found = unpack_targets(experiment, theta.unsqueeze(0))
            return torch.cat([free_part(site, value[0]) for site, value in found.items()])

        for row in range(3):
            jacobian = torch.autograd.functional.jacobian(values, sample.theta[row])
            torch.testing.assert_close(sample.log_det[row], torch.linalg.slogdet(jacobian).logabsdet)
    finally:
        torch.set_default_dtype(torch.float32)


def test_log_prior_is_the_density_of_the_packed_targets():
    # Packed LogNormal(0, 0.3) is Normal(0, 0.3), coordinate by coordinate.
    sample = sample_joint(resolve(event_design, "y"), 20)
    torch.testing.assert_close(sample.log_prior, dist.Normal(0.0, 0.3).log_prob(sample.theta).sum(-1))


def test_log_prior_of_dependent_bounds_integrates_to_one():
    # Importance sampling with a wide known density in place of a grid: E_r[p / r] = 1.
    torch.set_default_dtype(torch.float64)
    try:
        experiment = resolve(bounded_chain, "y")
        proposal = dist.Normal(torch.zeros(2), 3.0).to_event(1)
        theta = proposal.sample((20_000,))
        values = unpack_targets(experiment, theta)
        run = run_rows(
            experiment.program, 20_000, experiment.shapes, designs=experiment.design_values, row_values=values
        )
        packed = pack_run(experiment, run, torch.Size([20_000]), False)
        torch.testing.assert_close(packed.theta, theta, rtol=1e-4, atol=1e-4)
        ratio = (packed.log_prior - proposal.log_prob(theta)).exp()
        assert abs(ratio.mean() - 1) <= Z_MAX * ratio.std() / math.sqrt(20_000)
    finally:
        torch.set_default_dtype(torch.float32)


def test_log_likelihood_of_a_positive_outcome_integrates_to_one_in_packed_coordinates():
    def model():
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        return pyro.sample("y", dist.Gamma(2.0, theta.exp()))

    experiment = resolve(model, "y")
    grid = torch.linspace(-12.0, 12.0, 4_001)
    theta = torch.tensor(0.7)
    values = {"theta": theta.expand(len(grid)), "y": grid.exp()}
    run = run_rows(experiment.program, len(grid), experiment.shapes, row_values=values)
    sample = pack_run(experiment, run, torch.Size([len(grid)]), True)
    torch.testing.assert_close(sample.y[:, 0], grid, rtol=1e-4, atol=1e-4)
    integral = torch.trapezoid(sample.log_likelihood.exp(), grid)
    assert integral.item() == pytest.approx(1.0, abs=1e-4)


def test_pairs_are_scored_like_runs():
    for model, outcomes in ((plate_design, "y"), (several_designs, ["y", "count"]), (event_design, "y")):
        for vectorize in (True, False):
            experiment = resolve(model, outcomes, vectorize=vectorize)
            inner = run_rows(experiment.program, 5, experiment.shapes, designs=experiment.design_values)
            outer = run_rows(experiment.program, 4, experiment.shapes, designs=experiment.design_values)
            observed = {site.name: outer.value(site.name) for site in experiment.observations}
            pairs = pairwise_log_likelihood(experiment, observed, inner)
            for j in range(5):
                latents = {site.name: inner.value(site.name)[j].expand(4, *site.shape) for site in experiment.targets}
                run = run_rows(
                    experiment.program,
                    4,
                    experiment.shapes,
                    designs=experiment.design_values,
                    row_values={**latents, **observed},
                )
                expected = sum(run.log_prob(name) for name in observed)
                torch.testing.assert_close(pairs[:, j], expected, rtol=1e-4, atol=1e-4)


def test_rows_of_a_sample_are_picked():
    sample = sample_joint(resolve(several_designs, ["y", "count"]), 9, likelihood=True)
    part = sample[torch.tensor([7, 2])]
    assert part.num_samples == 2
    torch.testing.assert_close(part.theta, sample.theta[[7, 2]])
    torch.testing.assert_close(part.log_likelihood, sample.log_likelihood[[7, 2]])
    torch.testing.assert_close(part.values["count"], sample.values["count"][[7, 2]])


def test_values_that_are_not_finite_are_told_by_site_and_count():
    def model():
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        mean = pyro.deterministic("mean", torch.where(theta > 0, theta.log(), torch.nan))
        return pyro.deterministic("y", mean + pyro.sample("e", dist.Normal(0.0, 1.0)))

    broken_values = non_finite_sites(sample_joint(resolve(model, "y", "theta"), 100))
    assert re.search(r"'y'.* of 100", broken_values)


# --- gradients, dtypes, residue -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
def test_gradients_flow_to_designs(batch):
    experiment = resolve(event_design, "y")
    designs = candidates(experiment, *batch)
    experiment = resolve(event_design, "y", designs=designs if batch else None)
    designs["xi"].requires_grad_()
    sample = sample_joint(experiment, 6, designs, likelihood=True)
    # log y = mean(theta, xi) + noise, so dy/dxi is that of the mean; the log-likelihood given its own noise stays put.
    theta = sample.values["theta"]
    mean = theta[..., :1] * designs["xi"] / (designs["xi"] + theta[..., 1:])
    (expected,) = torch.autograd.grad(mean.sum(), designs["xi"], retain_graph=True)
    (got,) = torch.autograd.grad(sample.y.sum(), designs["xi"], retain_graph=True)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_gradients_cross_no_members_of_a_batch():
    experiment = resolve(event_design, "y")
    designs = candidates(experiment, 3)
    experiment = resolve(event_design, "y", designs=designs)
    designs["xi"].requires_grad_()
    sample = sample_joint(experiment, 6, designs)
    (gradient,) = torch.autograd.grad(sample.y[:, 1].sum(), designs["xi"])
    assert (gradient[[0, 2]] == 0).all()
    assert (gradient[1] != 0).all()


def test_double_precision_stays_double():
    torch.set_default_dtype(torch.float64)
    try:
        experiment = resolve(event_design, "y")
        sample = sample_joint(experiment, 4, likelihood=True)
    finally:
        torch.set_default_dtype(torch.float32)
    for name in ("theta", "y", "log_prior", "log_likelihood"):
        assert getattr(sample, name).dtype == torch.float64


def event_design_double():
    xi = pyro.param("xi", torch.tensor([0.2, 0.5], dtype=torch.float64), constraint=constraints.unit_interval)
    theta = pyro.sample("theta", dist.LogNormal(xi.new_zeros(2), 0.3).to_event(1))
    return pyro.sample("y", dist.LogNormal(theta * xi, 0.2).to_event(1))


def test_a_double_model_under_a_single_default_is_double():
    sample = sample_joint(resolve(event_design_double, "y"), 4, likelihood=True)
    for name in ("theta", "y", "log_prior", "log_likelihood"):
        assert getattr(sample, name).dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32


def test_the_store_is_untouched(case):
    model, outcomes, targets = case
    model()
    store = pyro.get_param_store()
    leaves = {name: (store._params[name], store._params[name].detach().clone()) for name in store}
    experiment = resolve(model, outcomes, targets)
    sample_joint(experiment, 5)
    designs = candidates(experiment, 2)
    sample_joint(experiment, 5, designs)
    assert set(store.keys()) == set(leaves)
    for name, (leaf, value) in leaves.items():
        assert store._params[name] is leaf
        assert torch.equal(leaf.detach(), value)
        assert leaf.grad is None


def test_substituted_designs_do_not_enter_an_empty_store():
    experiment = resolve(event_design, "y")
    sample_joint(experiment, 5, candidates(experiment, 2))
    assert list(pyro.get_param_store().keys()) == []


def test_a_numpy_black_box_runs_one_by_one():
    def model():
        xi = pyro.param("xi", torch.tensor(0.5))
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        simulated = torch.as_tensor(math.sin(theta.item()) + xi.item(), dtype=torch.float32)
        return pyro.deterministic("y", simulated + pyro.sample("e", dist.Normal(0.0, 0.1)))

    experiment = resolve(model, "y", "theta", vectorize=False)
    sample = sample_joint(experiment, 200)
    assert_same_distribution((sample.y - torch.sin(sample.theta) - 0.5) / 0.1, torch.randn(2_000, 1))


def test_history_of_a_program_is_not_traced_by_the_caller():
    with poutine.trace() as recorder:
        resolve(scalar_design, "y")
    assert list(recorder.trace.nodes) == []
