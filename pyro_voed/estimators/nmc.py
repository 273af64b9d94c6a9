r"""Nested Monte Carlo: an upper-biased, consistent estimate from the outcome's density.

With outer draws :math:`(\theta_i, y_i)` and inner draws :math:`\theta_{ij}` from the prior,

.. math::
    \mathrm{EIG}(\xi) \approx \frac1N \sum_i \Big[\log p(y_i \mid \theta_i, \xi)
    - \log \frac1M \sum_j p(y_i \mid \theta_{ij}, \xi)\Big].

By Jensen's inequality its expectation lies above the exact value at any finite M, whether the inner draws are

* *independent*: M new ones for each outer draw, `N (M + 1)` simulations; or
* *re-used*: the other outer draws, the own one left out, M = N - 1 and only `N` simulations. Terms then share
  their inner draws; to first order these fluctuations cancel (the mean of p(y | theta') / p(y) over y is 1 for
  every theta'), so the standard error of independent terms holds.

With nuisance sites p(y | theta) is itself an average, over `num_nuisance_samples` runs (`nested`), which is far above
where few of these explain an outcome: the nats left open tell. *With a proposal*
q(theta | y) the inner draws come from it and are weighed by p(theta) / q(theta | y): from above as before, and exact
where q is the posterior. It is what `eig_vnmc` computes with a flow that it trains (`importance`).

References:
    Ryan (2003), "Estimating expected information gains for experimental designs with application to the random
    fatigue-limit model"; Huan and Marzouk (2013), "Simulation-based optimal Bayesian experimental design for nonlinear
    systems"; with a proposal Beck, Dia, Espath, Long and Tempone (2018), "Fast Bayesian experimental design:
    Laplace-based importance sampling for the expected information gain".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from pyro_voed.checks import Labels
from pyro_voed.estimators.estimate import Terms, estimate
from pyro_voed.estimators.nested import checked_sizes, nested_estimate
from pyro_voed.estimators.weights import proposal_terms
from pyro_voed.experiment import needs
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.pairs import PAIR_MEMORY
from pyro_voed.results import EIGResult

PROPOSAL_DRAWS = 100


@needs.needing(needs.inner_draws)
def eig_nmc(
    model: Callable[..., Any] | Experiment,
    observation_labels: Labels = None,
    target_labels: Labels = None,
    *,
    designs: Mapping[str, Any] | None = None,
    proposal: Any = None,
    num_outer_samples: int = 2_000,
    num_inner_samples: int | None = None,
    num_nuisance_samples: int = 100,
    max_bytes: int = PAIR_MEMORY,
    seed: int | None = None,
) -> EIGResult:
    """Estimate the expected information gain by nested Monte Carlo.

    Args:
        model: A Pyro program of one experiment whose outcome sites have densities.
        proposal: What the inner draws come from, instead of the prior, once mixed with a tenth of that:
            `laplace_proposal()`, the density of an earlier result (`eig_flow`, `eig_ba`, ...), or a Pyro guide that is
            called as `guide(observations, *model_args, **model_kwargs)` and samples the targets. Used as it is.
        num_outer_samples: Outer draws N.
        num_inner_samples: Independent inner draws M for each outer draw, `N (M + 1)` simulations in all; None re-uses
            the outer draws, leaving the own one out, for `N` simulations. With a proposal, its draws; default 100.
        num_nuisance_samples: Runs averaged over for each density of the targets, where there are nuisance sites.
        max_bytes: Memory for one chunk of pairs.
        observation_labels, target_labels, designs, seed: As in `eig_flow`.

    Returns:
        An estimate in nats whose expectation lies above the exact value, with its standard error and the nats that its
        inner draws leave open (`weights.open_nats`; a warning where these are many); with a proposal, instead, the
        tail index of its terms.

    Raises:
        NotImplementedError: If the outcome has no density, or a target is deterministic; with a proposal, also if there
            are nuisance sites.
        ArithmeticError: If no inner draw gives an outcome any density, so that a term is infinite.

    Example:
        >>> from pyro_voed.problems.linear_gaussian import linear_gaussian
        >>> result = eig_nmc(linear_gaussian(), "y", "theta", num_outer_samples=1000, seed=0)
        >>> result.bound, bool(1.0 < result.eig < 1.4)  # exact: 1.199
        ('upper', True)
    """
    inner = checked_sizes(num_outer_samples, num_inner_samples, num_nuisance_samples, max_bytes)

    def terms(experiment: Experiment, candidates: dict[str, Tensor]) -> Terms:
        if proposal is not None:
            num_inner = num_inner_samples or PROPOSAL_DRAWS
            return proposal_terms(experiment, candidates, proposal, num_outer_samples, num_inner, upper=True)
        return nested_estimate(experiment, candidates, num_outer_samples, inner, upper=True, estimator="eig_nmc")

    needed = [needs.inner_draws] if proposal is None else [_weighing, *needs.needs_of(proposal)]
    question = (model, observation_labels, target_labels, designs, seed)
    return estimate(question, terms, name="eig_nmc", bound="upper", needs=needed)


def _weighing(experiment: Experiment, name: str) -> None:
    """Need what a proposal needs, whose errors must not send the user back here."""
    for need in (needs.likelihood_anywhere, needs.whole_outcomes):
        need(experiment, f"{name} with a proposal")
