"""The suite itself: models and twins are of the same experiment, exact values are what is stated, two methods agree."""

import math

import numpy as np
import pyro
import pytest
from pyro import poutine

from tests.scripts import run_script
from tests.suite.catalogue import MODELS, TWINS
from tests.suite.exact import EXACT
from tests.suite.second import SECOND

CHEAP = (
    "calibration_line", "badly_scaled", "low_noise_plane", "cubic", "precision_of_a_line", "normal_inverse_gamma",
    "two_thermometers", "thirty_nats", "tiny_information", "placebo", "matrix_coefficients", "hundred_readings",
    "logistic_dose", "lognormal_decay", "exponential_of_noise", "gross_errors", "missing_marker", "cubed",
    "gamma_poisson", "zero_inflated", "capture_recapture", "dirichlet_multinomial", "diagnosis", "component_mean",
    "uniform_noise", "clipped_detector", "funnel", "random_effects", "group_effects", "exponential_censored",
    "machine_failures", "gp_mean_amplitude", "local_level", "softmax_choice", "ordinal",
)  # fmt: skip
"""Exact values that take a second or less."""

SAME = 1e-4
"""Models run in single precision."""


def test_every_model_has_a_twin_an_exact_value_and_a_second_method():
    assert set(MODELS) == set(TWINS) == set(EXACT) == set(SECOND)
    assert all(name == entry.name and math.isfinite(entry.exact) for name, entry in MODELS.items())
    assert all(entry.error <= max(0.003, 0.003 * entry.exact) for entry in MODELS.values())


def values_of(trace):
    """All sampled and computed sites in double precision, each as a number or flat."""
    nodes = [node for node in trace.nodes.values() if node["type"] == "sample" and node["name"] in trace.nodes]
    sites = {node["name"]: node["value"].detach().double().numpy() for node in nodes if not _is_plate(node)}
    return {name: value.ravel() if value.ndim else value[()] for name, value in sites.items()}


def _is_plate(node):
    return type(node["fn"]).__name__ == "_Subsample"


@pytest.mark.parametrize("name", MODELS)
def test_the_model_and_its_twin_are_the_same_experiment(name):
    """Log densities of all sampled sites agree at draws of the model, and so do computed outcomes."""
    entry, twin = MODELS[name], TWINS[name]
    for seed in range(3):
        pyro.set_rng_seed(seed)
        trace = poutine.trace(entry.model).get_trace()
        values = values_of(trace)
        y = np.concatenate([np.ravel(values[label]) for label in entry.observation_labels])
        stated = trace.log_prob_sum().item()
        assert stated == pytest.approx(joint_of(twin, values, y), rel=SAME, abs=20 * SAME)
        if twin.computed is not None:
            assert np.ravel(twin.computed(values)) == pytest.approx(y, rel=SAME, abs=SAME)


def joint_of(twin, values, y):
    if twin.log_joint is not None:
        return float(np.sum(twin.log_joint(values)))
    latents = {site: np.asarray(values[site])[None] for site in twin.prior}
    columns = [column for site in twin.prior for column in np.atleast_1d(values[site])]
    prior = sum(_log_density(own, value) for (_, own), value in zip(twin.columns, columns, strict=True))
    return prior + float(twin.log_likelihood(latents, y[None, None, :])[0, 0])


def _log_density(distribution, value):
    return distribution.logpmf(value) if hasattr(distribution.dist, "pmf") else distribution.logpdf(value)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, twin in TWINS.items() if twin.log_joint is not None])
def test_a_twin_that_integrates_sites_out_draws_what_the_model_draws(name):
    """Means of bounded statistics of outcomes: what exact values average over, and densities are of.

    Of a thousand comparisons at five standard errors one fails by chance with probability 6e-4.
    """
    entry, twin = MODELS[name], TWINS[name]
    pyro.set_rng_seed(0)
    rows = [values_of(poutine.trace(entry.model).get_trace()) for _ in range(2_000)]
    simulated = np.array([np.concatenate([np.ravel(row[label]) for label in entry.observation_labels]) for row in rows])
    drawn = twin.simulate(np.random.default_rng(0).random((50_000, twin.uniform_dim)))[1]
    place, spread = np.median(drawn, axis=0), np.quantile(drawn, 0.8, axis=0) - np.quantile(drawn, 0.2, axis=0) + 1e-3
    sides = [bounded_statistics(np.tanh((y - place) / spread)) for y in (simulated, drawn)]
    difference = sides[0].mean(axis=0) - sides[1].mean(axis=0)
    error = np.sqrt(sum(side.var(axis=0) / len(side) for side in sides))
    assert (np.abs(difference) <= 5 * error + 1e-9).all()


def bounded_statistics(y):
    """Each outcome, its square, and its product with the next."""
    return np.concatenate([y, y**2, y[:, 1:] * y[:, :-1]], axis=1)


@pytest.mark.parametrize("name", CHEAP)
def test_exact_values_are_what_is_stated(name):
    value, error = EXACT[name]()
    assert value == pytest.approx(MODELS[name].exact, abs=max(1e-6, 3 * error))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_two_methods_agree(name):
    """Of sixty comparisons at four standard errors, each from twenty blocks, one fails by chance with probability 0.05.

    The streams are fixed, so what has passed passes again.
    """
    value, error = SECOND[name]()
    both = np.hypot(error, MODELS[name].error)
    assert abs(value - MODELS[name].exact) < 4 * both + 1e-9


@pytest.mark.slow
def test_the_benchmark_runs():
    """Every model asked for has its line, a refused one with the type of the error."""
    names = ("tiny_information", "diagnosis", "group_effects")
    finished = run_script("benchmarks/suite.py", "--quick", "--seeds", "0", "--only", *names)
    assert all(f"\n{name} " in finished.stdout for name in names)
    assert "median" in finished.stdout.splitlines()[-1]
