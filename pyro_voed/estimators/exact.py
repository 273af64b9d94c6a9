r"""Sums in place of samples, where latents and outcomes have finitely many values.

With all states :math:`(\theta, \eta)` of targets and nuisance sites, and all outcomes y, in one table of
:math:`p(y, \theta) = \sum_\eta p(\eta, \theta)\, p(y \mid \theta, \eta, \xi)`, the expected information gain is a sum:

.. math::
    \mathrm{EIG}(\xi) = \sum_{\theta, y} p(y, \theta \mid \xi)
    \log \frac{p(y, \theta \mid \xi)}{p(\theta)\, p(y \mid \xi)}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.checks import Labels
from pyro_voed.estimators.estimate import Terms, estimate
from pyro_voed.experiment import needs
from pyro_voed.experiment.designs import at_each_design, design_batch_shape
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.pairs import pairwise_log_density
from pyro_voed.experiment.programs import base_distribution, run_rows
from pyro_voed.experiment.sites import Site
from pyro_voed.results import EIGResult

MOST_ENTRIES = 20_000_000
"""Most states times outcomes in one table."""

LEFT_OUT = 1e-4
"""Most probability that may lie outside the values listed, which rounding alone does not reach."""


@needs.needing(needs.inner_draws)
def eig_exact(
    model: Callable[..., Any] | Experiment,
    observation_labels: Labels = None,
    target_labels: Labels = None,
    *,
    designs: Mapping[str, Any] | None = None,
    seed: int | None = None,
) -> EIGResult:
    """Compute the expected information gain exactly, where latents and outcomes have finitely many values.

    Args:
        model: A Pyro program of one experiment all of whose sample sites have finitely many values, such as Bernoulli,
            Categorical or Binomial sites; nuisance sites are summed over.
        seed: For the checks of the model, which run it; the result depends on none.
        observation_labels, target_labels, designs: As in `eig_flow`.

    Returns:
        The exact value in nats (`bound` is "exact"), its standard error zero.

    Raises:
        NotImplementedError: If a site has infinitely many values, an outcome depends on another or is masked, or states
            times outcomes are more than 20 million.
        ArithmeticError: If the values listed do not hold all of the probability.

    Example:
        >>> from pyro_voed.problems.finite import exact_eig, finite
        >>> result = eig_exact(finite(), "y", designs={"xi": torch.tensor([0.0, 0.5, 1.0])})
        >>> result.eig, result.bound  # exact: 0.2231, 0.1258, 0.1950
        (tensor([0.2231, 0.1258, 0.1950]), 'exact')
    """

    def terms(experiment: Experiment, candidates: dict[str, Tensor]) -> Terms:
        latents = [*experiment.targets, *experiment.nuisance]
        outcomes, states = _values(experiment.observations), _values(latents)
        num_targets = math.prod(_num_values(experiment.targets))
        one = lambda own: _information(experiment, own, states, outcomes, num_targets)  # noqa: E731
        batch = design_batch_shape(experiment, candidates)
        values = torch.stack(at_each_design(experiment, candidates, one)).reshape(1, *batch)
        return Terms(values, standard_error=torch.zeros_like(values[0]))

    question = (model, observation_labels, target_labels, designs, seed)
    return estimate(question, terms, name="eig_exact", bound="exact", needs=[needs.inner_draws, finitely_many])


def finitely_many(experiment: Experiment, name: str) -> None:
    """Need sites with few enough values to list."""
    sites = [*experiment.targets, *experiment.nuisance, *experiment.observations]
    endless = [site.name for site in sites if site.support_values is None or site.measured is not None]
    if endless or experiment.linked_outcomes:
        why = f"{endless} have other values, or are masked" if endless else "outcomes depend on each other"
        raise NotImplementedError(
            f"{name} lists all values of all sites, and {why}. Use eig_nmc, eig_pce or eig_marginal."
        )
    entries = math.prod(_num_values(sites))
    if entries > MOST_ENTRIES:
        raise NotImplementedError(
            f"{name}: states times outcomes are {entries:.3g}, more than {MOST_ENTRIES:,}. Use eig_nmc, eig_pce or "
            "eig_marginal."
        )


def _num_values(sites: Sequence[Site]) -> list[int]:
    return [len(site.support_values) ** site.shape.numel() for site in sites if site.support_values is not None]


def _values(sites: Sequence[Site]) -> dict[str, Tensor]:
    """Return all combinations of the sites' values, the last site varying fastest, `(num, *shape)` each."""
    supports = [site.support_values for site in sites for _ in range(site.shape.numel())]
    table = torch.cartesian_prod(*(support.double() for support in supports if support is not None))
    pieces = table.reshape(-1, len(supports)).split([site.shape.numel() for site in sites], -1)
    return {site.name: piece.reshape(-1, *site.shape).to(site.dtype) for site, piece in zip(sites, pieces, strict=True)}


def _information(
    experiment: Experiment,
    designs: Mapping[str, Tensor],
    states: Mapping[str, Tensor],
    outcomes: Mapping[str, Tensor],
    num_targets: int,
) -> Float[Tensor, ""]:
    num_states = len(next(iter(states.values())))
    run = run_rows(experiment.program, num_states, experiment.shapes, designs=designs, row_values=states)
    for name in states:
        _share_logits(base_distribution(run.traces[0].nodes[name]["fn"]))
    log_prior = torch.stack([run.log_prob(name, on_support=True) for name in states]).sum(0).double()
    log_joint = log_prior + pairwise_log_density(experiment.observations, outcomes, run).double()
    log_joint = log_joint.unflatten(1, (num_targets, -1)).logsumexp(-1)  # (num_outcomes, num_targets)
    held = float(log_joint.exp().sum())
    if abs(held - 1.0) > LEFT_OUT:
        raise ArithmeticError(
            f"eig_exact: the values listed hold a probability of {held:.6f}. Values that depend on other sites or on "
            "designs are not listed; use eig_nmc or eig_marginal."
        )
    log_prior = log_prior.unflatten(0, (num_targets, -1)).logsumexp(-1)
    ratio = log_joint - log_prior - log_joint.logsumexp(-1, keepdim=True)
    # What has probability 0 contributes nothing: p log p -> 0.
    terms = torch.where(log_joint == -torch.inf, torch.zeros_like(ratio), log_joint.exp() * ratio)
    return terms.sum().to(experiment.dtype)


def _share_logits(fn: Any) -> None:
    """Take the logarithms of a categorical's probabilities once, not for every row that shares them."""
    if not isinstance(fn, torch.distributions.Categorical) or "logits" in vars(fn):
        return
    shared = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in fn.probs.stride()[:-1])
    fn.logits = torch.distributions.Categorical(probs=fn.probs[shared], validate_args=False).logits.expand_as(fn.probs)
