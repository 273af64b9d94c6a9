"""Densities start at the linear-Gaussian posterior of their pilot, or of their part of a pool."""

import pytest
import torch

from pyro_voed import Fresh, Pool, eig_flow
from pyro_voed.problems.linear_gaussian import DEFAULT_DESIGN, exact_eig, linear_gaussian

DESIGNS = torch.stack([torch.tensor(DEFAULT_DESIGN), torch.eye(3, 2)])
ENSEMBLE = {"ensemble": True, "designs": {"xi": DESIGNS}}


def untrained(num_simulations, rate=1e-12):
    """One pass over a pool at rates that change nothing."""
    return Pool(num_simulations, learning_rate=rate, max_epochs=1)


@pytest.mark.parametrize(
    ("training", "options"),
    [
        (Fresh(num_steps=0), {}),
        (untrained(1_000), {}),
        (untrained(1_000, (1e-12, 1e-13)), {}),
        (untrained(2_000), ENSEMBLE),
    ],
    ids=["fresh", "pool", "two rates", "ensemble"],
)
def test_the_untrained_bound_is_that_of_the_linear_gaussian(training, options):
    # Nothing is to be learnt beyond it here: nine numbers from 1,000 draws cost about 9 / 2,000 nats.
    result = eig_flow(linear_gaussian(), "y", training=training, num_samples=20_000, seed=0, progress=False, **options)
    exact = exact_eig(DESIGNS if options else torch.tensor(DEFAULT_DESIGN))
    assert ((result.eig - exact).abs() < 0.02 + 4 * result.standard_error).all()


@pytest.mark.filterwarnings("ignore:the learned posterior hardly knows")
@pytest.mark.parametrize("options", [{}, ENSEMBLE], ids=["one", "ensemble"])
def test_behind_a_summary_that_has_yet_to_learn_a_pool_starts_at_the_standard_normal(options):
    summary = torch.nn.Linear(3, 2)
    settings = {"summary": summary, "training": untrained(400), "num_samples": 100, "seed": 0, "progress": False}
    density = eig_flow(linear_gaussian(), "y", **settings, **options).density
    flow = density.member(0) if options else density
    assert flow.density.gaussian.linear.weight.abs().max() < 1e-6
