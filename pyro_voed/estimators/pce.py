r"""Prior contrastive estimation: nested Monte Carlo's lower bound.

Counting the draw that made the outcome among the contrasts turns the bias of nested Monte Carlo around:

.. math::
    \mathrm{EIG}(\xi) \ge \mathbb{E}\Big[\log p(y \mid \theta_0, \xi)
    - \log \frac{1}{L + 1} \sum_{l=0}^{L} p(y \mid \theta_l, \xi)\Big],
    \qquad \theta_1, ..., \theta_L \sim p(\theta).

No term exceeds log(L + 1), and so neither does the estimate: at large information it saturates there. Contrasts are new
ones for each outer draw or, for `N` simulations in all, the other outer draws.

With nuisance sites p(y | theta) is an average over fresh draws of these, and any such estimate will do as the critic of
a contrastive bound (`bounds.nested.contrast_terms`): it stays below with one nuisance draw as with a thousand. The
contrasts are then other outer draws.

References:
    Foster, Jankowiak, O'Meara, Teh and Rainforth (2020), "A unified stochastic gradient approach to designing
    Bayesian-optimal experiments", Eq. 8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_voed.bounds.nested import pce_terms
from pyro_voed.checks import Labels
from pyro_voed.estimators.estimate import Terms, estimate
from pyro_voed.estimators.nested import checked_sizes, nested_estimate
from pyro_voed.estimators.objective import Objective, build_nothing
from pyro_voed.experiment import needs
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.packing import JointSample
from pyro_voed.experiment.pairs import PAIR_MEMORY
from pyro_voed.results import EIGResult


def _contrastive_terms(sample: JointSample, density: None) -> Tensor:
    """Every other draw of the batch serves as a contrast."""
    assert sample.pairs is not None  # asked for by the objective
    pairs = sample.pairs()
    own = pairs.diagonal()
    others = pairs.masked_fill(torch.eye(len(own), dtype=torch.bool, device=own.device), -torch.inf)
    return pce_terms(own, others.logsumexp(-1), len(own) - 1, own)


prior_contrastive = Objective(
    _contrastive_terms, bound="lower", needs=(needs.likelihood,), pairs=True, build=build_nothing, evaluation_size=256
)
"""Prior contrastive estimation as an objective for design search: it learns nothing, and saturates at the logarithm of
the batch size."""


@needs.needing(needs.inner_draws)
def eig_pce(
    model: Callable[..., Any] | Experiment,
    observation_labels: Labels = None,
    target_labels: Labels = None,
    *,
    designs: Mapping[str, Any] | None = None,
    num_outer_samples: int = 2_000,
    num_inner_samples: int | None = None,
    num_nuisance_samples: int = 100,
    max_bytes: int = PAIR_MEMORY,
    seed: int | None = None,
) -> EIGResult:
    """Estimate the expected information gain from below by prior contrastive estimation.

    Args:
        num_outer_samples: Outer draws N.
        num_inner_samples: Contrasts L for each outer draw, `N (L + 1)` simulations in all; None takes the other outer
            draws, for `N` simulations. With nuisance sites they always are other outer draws, at most half of them, by
            default as many as make 3e7 densities.
        model, num_nuisance_samples, max_bytes: As in `eig_nmc`.
        observation_labels, target_labels, designs, seed: As in `eig_flow`.

    Returns:
        The lower bound in nats with its standard error. It cannot exceed `log(num_inner_samples + 1)`.

    Raises:
        NotImplementedError: If the outcome has no density, or a target is deterministic.

    Example:
        >>> from pyro_voed.problems.linear_gaussian import linear_gaussian
        >>> result = eig_pce(linear_gaussian(), "y", "theta", num_outer_samples=1000, seed=0)
        >>> result.bound, bool(1.0 < result.eig < 1.4)  # exact: 1.199
        ('lower', True)
    """
    inner = checked_sizes(num_outer_samples, num_inner_samples, num_nuisance_samples, max_bytes)

    def terms(experiment: Experiment, candidates: dict[str, Tensor]) -> Terms:
        return nested_estimate(experiment, candidates, num_outer_samples, inner, upper=False, estimator="eig_pce")

    question = (model, observation_labels, target_labels, designs, seed)
    return estimate(question, terms, name="eig_pce", bound="lower", needs=[needs.inner_draws])
