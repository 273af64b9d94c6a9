r"""Two sides from one proposal: ACE below, VNMC above.

The outcome's density is an average of weights :math:`w_l = p(\theta_l)\, p(y \mid \theta_l) / q(\theta_l \mid y)` over
draws of a proposal q. With :math:`\theta_0` the draw that made y and
:math:`\theta_1, ..., \theta_L \sim q(\cdot \mid y)`,

.. math::
    \mathrm{EIG} \ge \mathbb{E}\Big[\log p(y \mid \theta_0) - \log \frac{1}{L + 1} \sum_{l=0}^{L} w_l\Big]
    \quad (\text{ACE}), \qquad
    \mathrm{EIG} \le \mathbb{E}\Big[\log p(y \mid \theta_0) - \log \frac1L \sum_{l=1}^{L} w_l\Big]
    \quad (\text{VNMC}).

Both are exact for any L when q is the posterior, and close as L grows for any q, at a few draws where nested Monte
Carlo, whose proposal is the prior, needs thousands. The proposal is mixed with the prior,
:math:`q_\alpha = (1 - \alpha) q + \alpha p`, which bounds the weights by :math:`p(y \mid \theta) / \alpha`; it does not
cure heavy tails of the terms themselves. What may serve as q is in `proposals`: besides a flow that is trained here,
Laplace's Gaussian (`laplace_proposal`) and the guide that `eig_ba` fitted, which are used as they are.

References:
    Foster, Jankowiak, O'Meara, Teh and Rainforth (2020), "A unified stochastic gradient approach to designing
    Bayesian-optimal experiments", Eq. 11 (ACE); Foster et al. (2019), "Variational Bayesian optimal experimental
    design", Eq. 9 (VNMC); Hesterberg (1995), "Weighted average importance sampling and defensive mixture
    distributions".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from pyro_voed.bounds.importance import ace_terms
from pyro_voed.checks import Labels, check_count
from pyro_voed.estimators.estimate import Terms, estimate
from pyro_voed.estimators.fit import fit_of
from pyro_voed.estimators.guide import GuideDensity
from pyro_voed.estimators.objective import Objective
from pyro_voed.estimators.posterior import RATE, fit_posterior
from pyro_voed.estimators.summarising import Summary
from pyro_voed.estimators.weights import proposal_terms
from pyro_voed.experiment import needs
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.packing import JointSample
from pyro_voed.experiment.weighting import Proposal
from pyro_voed.results import EIGResult
from pyro_voed.training.settings import Training, check_training


@dataclass(frozen=True)
class AdaptiveContrastiveTerms:
    """ACE terms with gradients to design and proposal, which gives `num_inner_samples` draws for each outcome."""

    num_inner_samples: int = 8

    def __call__(self, sample: JointSample, density: Any) -> Tensor:
        """Return the terms."""
        if sample.log_joint is None or sample.log_prior is None or sample.log_likelihood is None:
            raise ValueError("the sample scores no other targets: search with optimise_design, which asks for that.")
        context = sample.context()
        theta = density.condition(context).rsample((self.num_inner_samples,)).transpose(0, 1)
        log_prior, log_likelihood = sample.log_joint(theta)
        inner = log_prior + log_likelihood - density.log_prob(theta, context.unsqueeze(1))
        own = sample.log_prior + sample.log_likelihood - density.log_prob(sample.theta, context)
        return ace_terms(sample.log_likelihood, own, inner)


adaptive_contrastive = Objective(
    AdaptiveContrastiveTerms(),
    bound="lower",
    needs=(needs.stated_prior, needs.likelihood_anywhere),
    of_targets=True,
    likelihood=True,
    log_joint=True,
)
"""Adaptive contrastive estimation as an objective for design search: trains the proposal on its own bound."""


@needs.needing(needs.likelihood_anywhere)
def eig_ace(
    model: Callable[..., Any] | Experiment,
    observation_labels: Labels = None,
    target_labels: Labels = None,
    *,
    designs: Mapping[str, Any] | None = None,
    density: Any = None,
    summary: Summary = None,
    num_inner_samples: int = 32,
    training: Training | None = None,
    num_samples: int = 5_000,
    seed: int | None = None,
    progress: bool | None = None,
) -> EIGResult:
    """Estimate the expected information gain from below by importance sampling from a learned posterior.

    Args:
        model: A Pyro program of one experiment whose outcome sites have densities; targets must be all its latents.
        density: The proposal, trained as by `eig_flow`: a factory, a density or that of an earlier result. Or one
            used as it is: `laplace_proposal()`, or the guide density of an `eig_ba` result.
        num_inner_samples: Proposal draws L for each outer draw.
        num_samples: Outer draws at each design.
        observation_labels, target_labels, designs, summary, training, seed, progress: As in `eig_flow`.

    Returns:
        The lower bound in nats with its standard error, the tail index of its terms and the trained proposal.

    Raises:
        NotImplementedError: If the outcome has no density, there are nuisance sites, or a replaced prior cannot score
            targets that it did not draw.

    Example:
        >>> from pyro_voed.problems.linear_gaussian import linear_gaussian
        >>> from pyro_voed.training import Fresh
        >>> result = eig_ace(linear_gaussian(), "y", "theta", training=Fresh(num_steps=200), num_samples=1000, seed=0)
        >>> result.bound, bool(1.05 < result.eig < 1.35)  # exact: 1.199
        ('lower', True)
    """
    terms = _terms("eig_ace", density, summary, training, num_inner_samples, num_samples, progress, upper=False)
    needed = [needs.likelihood_anywhere, *needs.needs_of(density)]
    question = (model, observation_labels, target_labels, designs, seed)
    return estimate(question, terms, name="eig_ace", bound="lower", needs=needed)


@needs.needing(needs.likelihood_anywhere)
def eig_vnmc(
    model: Callable[..., Any] | Experiment,
    observation_labels: Labels = None,
    target_labels: Labels = None,
    *,
    designs: Mapping[str, Any] | None = None,
    density: Any = None,
    summary: Summary = None,
    num_inner_samples: int = 32,
    training: Training | None = None,
    num_samples: int = 5_000,
    seed: int | None = None,
    progress: bool | None = None,
) -> EIGResult:
    """Estimate the expected information gain from above by importance sampling from a learned posterior.

    Arguments, result and errors are those of `eig_ace`, the bound is an upper one.

    Example:
        >>> from pyro_voed.problems.linear_gaussian import linear_gaussian
        >>> from pyro_voed.training import Fresh
        >>> result = eig_vnmc(linear_gaussian(), "y", "theta", training=Fresh(num_steps=200), num_samples=1000, seed=0)
        >>> result.bound, bool(1.05 < result.eig < 1.35)  # exact: 1.199
        ('upper', True)
    """
    terms = _terms("eig_vnmc", density, summary, training, num_inner_samples, num_samples, progress, upper=True)
    needed = [needs.likelihood_anywhere, *needs.needs_of(density)]
    question = (model, observation_labels, target_labels, designs, seed)
    return estimate(question, terms, name="eig_vnmc", bound="upper", needs=needed)


def _terms(
    name: str,
    density: Any,
    summary: Summary,
    training: Training | None,
    num_inner: int,
    num_samples: int,
    progress: bool | None,
    *,
    upper: bool,
) -> Callable[[Experiment, dict[str, Tensor]], Terms]:
    check_training(training)
    check_count(num_inner, "num_inner_samples")
    check_count(num_samples, "num_samples", 2)

    def terms(experiment: Experiment, designs: dict[str, Tensor]) -> Terms:
        if isinstance(density, Proposal | GuideDensity):
            return proposal_terms(experiment, designs, density, num_samples, num_inner, upper=upper)
        fit = fit_of(experiment, designs, training, name=name, rate=RATE, progress=progress)
        posterior = fit_posterior(fit, density, summary)
        found = proposal_terms(experiment, designs, posterior.density, num_samples, num_inner, upper=upper)
        return replace(found, learned=posterior.learned())

    return terms
