r"""Prior contrastive estimation: nested Monte Carlo's lower bound.

Counting the draw that made the outcome among the contrasts turns the bias of nested Monte Carlo around:

.. math::
    \mathrm{EIG}(\xi) \ge \mathbb{E}\Big[\log p(y \mid \theta_0, \xi)
    - \log \frac{1}{L + 1} \sum_{l=0}^{L} p(y \mid \theta_l, \xi)\Big],
    \qquad \theta_1, ..., \theta_L \sim p(\theta).

No term exceeds log(L + 1), and so neither does the estimate: at large information it saturates there. Contrasts are new
ones for each outer draw or, for `N` simulations in all, the other outer draws.

References:
    Foster, Jankowiak, O'Meara, Teh and Rainforth (2020), "A unified stochastic gradient approach to designing
    Bayesian-optimal experiments", Eq. 8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_voed.checks import Labels, check_count
from pyro_voed.estimators.nested import PAIR_MEMORY, InnerDraws, nested_estimate
from pyro_voed.estimators.objective import Objective, build_nothing, rescale_nothing
from pyro_voed.experiment.caller_state import isolated
from pyro_voed.experiment.resolve import resolve
from pyro_voed.experiment.simulate import JointSample, candidate_designs
from pyro_voed.monte_carlo import log_mean_exp
from pyro_voed.results import EIGResult


def pce_terms(log_likelihood: Tensor, contrast_log_likelihood: Tensor) -> Tensor:
    """Return prior contrastive estimation terms, nats.

    Args:
        log_likelihood: log p(y_i given theta_i), `(num_outer,)`.
        contrast_log_likelihood: log p(y_i given theta_il), `(num_outer, num_contrasts)`, the own draw not among them.

    Example:
        >>> pce_terms(torch.tensor([0.0]), torch.tensor([[-torch.inf]]))
        tensor([0.6931])
    """
    counted = torch.cat([log_likelihood.unsqueeze(-1), contrast_log_likelihood], -1)
    return log_likelihood - log_mean_exp(counted, dim=-1)


def _contrastive_terms(sample: JointSample, density: None) -> Tensor:
    """Every other draw of the batch serves as a contrast."""
    assert sample.log_joint is not None  # asked for by the objective
    num = sample.num_samples
    _, log_likelihood = sample.log_joint(sample.theta.expand(num, *sample.theta.shape))
    return log_likelihood.diagonal() - log_mean_exp(log_likelihood, dim=-1)


prior_contrastive = Objective(
    _contrastive_terms,
    bound="lower",
    needs_log_joint=True,
    needs_log_prior=False,
    build=build_nothing,
    rescale=rescale_nothing,
    evaluation_size=256,
)
"""Prior contrastive estimation as an objective for design search: it learns nothing, and saturates at the logarithm of
the batch size."""


def eig_pce(
    model: Callable[..., Any],
    observation_labels: Labels = None,
    target_labels: Labels = None,
    *,
    design_labels: Labels = None,
    designs: Mapping[str, Any] | None = None,
    model_args: Sequence[Any] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    prior: Callable[..., Any] | None = None,
    num_outer_samples: int = 2_000,
    num_inner_samples: int | None = None,
    num_nuisance_samples: int = 100,
    max_bytes: int = PAIR_MEMORY,
    vectorize: bool = True,
    seed: int | None = None,
) -> EIGResult:
    """Estimate the expected information gain from below by prior contrastive estimation.

    Args:
        model: A Pyro program of one experiment whose outcome sites have densities.
        observation_labels: Outcome sites; default: the sites given with `obs=`.
        target_labels: Sites to learn about, discrete ones included; default: all other latent sites.
        design_labels: Design sites.
        designs: Candidate designs, `(*design_batch, *shape)` each, estimated one after the other.
        model_args: Positional arguments of the model.
        model_kwargs: Keyword arguments of the model.
        prior: A Pyro guide over the latent sites that replaces the model's prior.
        num_outer_samples: Outer draws N.
        num_inner_samples: Contrasts L for each outer draw, `N (L + 1)` simulations in all; None takes the other outer
            draws, for `N` simulations.
        num_nuisance_samples: Runs averaged over for each density of the targets, where there are nuisance sites.
        max_bytes: Memory for one chunk of pairs.
        vectorize: Run experiments together; False runs any model one by one.
        seed: Seed; None draws one from the global generator.

    Returns:
        The lower bound in nats with its standard error. It cannot exceed `log(num_inner_samples + 1)`.

    Raises:
        NotImplementedError: If the outcome has no density, or a target is deterministic.
        ArithmeticError: If a term is not finite.

    References:
        Foster et al. (2020), Eq. 8.

    Example:
        >>> from pyro_voed.problems.linear_gaussian import linear_gaussian
        >>> result = eig_pce(linear_gaussian(), "y", "theta", num_outer_samples=1000, seed=0)
        >>> result.bound, bool(1.0 < result.eig < 1.4)  # exact: 1.199
        ('lower', True)
    """
    check_count(num_outer_samples, "num_outer_samples", 2)
    if num_inner_samples is not None:
        check_count(num_inner_samples, "num_inner_samples")
    check_count(num_nuisance_samples, "num_nuisance_samples")
    with isolated(seed):
        experiment = resolve(
            model,
            observation_labels,
            target_labels,
            design_labels=design_labels,
            designs=designs,
            model_args=model_args,
            model_kwargs=model_kwargs,
            prior=prior,
            vectorize=vectorize,
        )
        inner = InnerDraws(num_inner_samples, num_nuisance_samples, max_bytes)
        result = nested_estimate(
            experiment,
            candidate_designs(experiment, designs),
            num_outer_samples,
            inner,
            estimator="eig_pce",
            bound="lower",
        )
        return replace(result, num_simulations=experiment.program.num_calls)
