r"""The marginal upper bound: expected information gain by a learned outcome density.

For any density q of the outcome,

.. math::
    \mathrm{EIG}(\xi) = \mathbb{E}\Big[\log \frac{p(y \mid \theta, \xi)}{p(y \mid \xi)}\Big]
    \;\le\; \mathbb{E}_{p(\theta, y \mid \xi)}\big[\log p(y \mid \theta, \xi) - \log q(y \mid \xi)\big],

off by the Kullback-Leibler divergence from p(y) to q. It needs the outcome's density given the targets. Its design
gradient at the best density is that of the tightest bound too, by the envelope theorem (Eq. 16: `marginal_saddle`).

*Discrete outcomes.* Where the outcomes seen are few, q is a mass function: the average of p(y | theta') over draws of
its own, which is exact in the limit and an upper bound before; where the model enumerates its outcomes they are summed
over rather than drawn. Where they are many, uniform noise makes them continuous: with
:math:`q(y) = \int_0^1 q(y + u) du`, Jensen's inequality gives
:math:`-\mathbb{E}_u \log q(y + u) \ge -\log q(y)`, so the side is kept.

References:
    Foster, Jankowiak, Bingham, Horsfall, Teh, Rainforth and Goodman (2019), "Variational Bayesian optimal experimental
    design", Eq. 6. Dong et al. (2025), Eqs. 13 to 17. Theis, van den Oord and Bethge (2016), "A note on the evaluation
    of generative models" (dequantisation).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from pyro_voed.bounds.outcome_density import marginal_terms
from pyro_voed.checks import Labels, check_count
from pyro_voed.estimators.estimate import Terms, estimate
from pyro_voed.estimators.fit import Fit, default_num_samples, fit_of
from pyro_voed.estimators.guide import GuideDensity
from pyro_voed.estimators.mass_function import mass_function_terms
from pyro_voed.estimators.outcome_density import build_outcome_density, dequantiser
from pyro_voed.experiment import needs
from pyro_voed.experiment.designs import design_batch_shape
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.packing import JointSample
from pyro_voed.results import EIGResult, FitHistory, Learned
from pyro_voed.training.settings import Training, check_training

RATE = 2e-3


@needs.needing(needs.likelihood)
def eig_marginal(
    model: Callable[..., Any] | Experiment,
    observation_labels: Labels = None,
    target_labels: Labels = None,
    *,
    designs: Mapping[str, Any] | None = None,
    density: Any = None,
    guide: Callable[..., Any] | None = None,
    dequantise: bool = False,
    training: Training | None = None,
    num_samples: int | None = None,
    seed: int | None = None,
    progress: bool | None = None,
) -> EIGResult:
    """Estimate the expected information gain from above with a learned outcome density.

    Args:
        model: A Pyro program of one experiment whose outcome sites have densities; targets must be all its latents.
        density: A factory `(y_dim, context_dim) -> density`, a density, or the density of an earlier result.
            Default: a spline coupling flow. The context is the design where there are several, else empty.
        guide: Instead of a density: a Pyro guide that samples the outcome sites, with parameters of its own, called
            with the model's arguments. Its parameters are fitted in a copy; the store is left alone.
        dequantise: Spread discrete outcomes by uniform noise even where they are few.
        observation_labels, target_labels, designs, training, num_samples, seed, progress: As in `eig_flow`.

    Returns:
        The upper bound in nats with its standard error; the history holds the bound too, which falls.

    Raises:
        NotImplementedError: If the outcome has no density, or there are nuisance sites.
        ValueError: If both a guide and a density are given, or labels, designs or sizes are wrong.

    Example:
        >>> from pyro_voed.problems.linear_gaussian import linear_gaussian
        >>> from pyro_voed.training import Fresh
        >>> result = eig_marginal(linear_gaussian(), "y", "theta", training=Fresh(num_steps=200), seed=0)
        >>> result.bound, bool(1.15 < result.eig < 1.5)  # exact: 1.199
        ('upper', True)
    """
    check_training(training)
    if num_samples is not None:
        check_count(num_samples, "num_samples", 2)
    if guide is not None and density is not None:
        raise ValueError("give a guide or a density for the outcome, not both.")

    def terms(experiment: Experiment, candidates: dict[str, Tensor]) -> Terms:
        discrete = [site.is_discrete for site in experiment.observations]
        if all(discrete) and density is None and guide is None and not dequantise:
            size = num_samples or default_num_samples(experiment, design_batch_shape(experiment, candidates))
            values = mass_function_terms(experiment, candidates, size)
            if values is not None:
                return Terms(values)
        fit = fit_of(
            experiment, candidates, training, name="eig_marginal", rate=RATE, likelihood=True, progress=progress
        )
        by_guide = guide is not None or isinstance(density, GuideDensity)
        if any(discrete) and not by_guide:
            fit = replace(fit, prepare=dequantiser(experiment))
        return _learned_terms(fit, density, guide, num_samples)

    question = (model, observation_labels, target_labels, designs, seed)
    return estimate(question, terms, name="eig_marginal", bound="upper", needs=[needs.likelihood, needs.whole_outcomes])


def _learned_terms(fit: Fit, density: Any, guide: Callable[..., Any] | None, num_samples: int | None) -> Terms:
    """Learn the density of the outcome and return the terms on fresh simulations."""
    pool = fit.pool()
    pilot = fit.pilot(pool)

    def build() -> Any:
        if guide is not None:
            return GuideDensity(guide, fit.experiment, fit.designs)
        if isinstance(density, GuideDensity):
            return copy.deepcopy(density)
        return build_outcome_density(density, pilot, fit.experiment, None)

    trained, history, rate = fit.train_best(build, _objective, pool)
    found = fit.evaluate(lambda sample: -_objective(sample, trained), num_samples)
    learned = Learned(trained, history=_falling(history), outcome_range=found.outcome_range, learning_rate=rate)
    return Terms(found.terms, learned)


def _objective(sample: JointSample, density: Any) -> Tensor:
    """Terms to ascend: the marginal terms with their sign changed."""
    if sample.log_likelihood is None:
        raise ValueError("the sample has no log likelihood: draw it with sample_joint(..., likelihood=True).")
    if isinstance(density, GuideDensity):
        return -marginal_terms(sample.log_likelihood, density.log_prob(sample))
    return -marginal_terms(sample.log_likelihood, density.log_prob(sample.y, sample.design_context()))


def _falling(history: FitHistory | None) -> FitHistory | None:
    """Return the record with the sign of the bound, which is the negative of what was ascended."""
    if history is None:
        return None
    return replace(
        history, bound=-history.bound, validation=None if history.validation is None else -history.validation
    )
