r"""The flow lower bound: expected information gain by a learned posterior.

For any conditional density q, Barber and Agakov's bound

.. math::
    \mathrm{EIG}(\xi) = \mathbb{E}_{p(\theta, y \mid \xi)}\Big[\log \frac{p(\theta \mid y, \xi)}{p(\theta)}\Big]
    \;\ge\; \mathbb{E}_{p(\theta, y \mid \xi)}\big[\log q(\theta \mid y, \xi) - \log p(\theta)\big]

is off by the expected Kullback-Leibler divergence from the posterior to q. With q a conditional normalising flow it
can be made tight (vOED-NFs). It needs simulations only, no outcome density. Of the targets it needs the prior density,
or their entropy. The density of targets that are drawn given nuisance sites is an average over draws of these, the own
one counted, which errs upwards and keeps the bound (`experiment.held`). Where nothing is stated a density of the
targets is learned too, whose divergence from the prior is added, upwards, and no side is left (`learned_prior`).

References:
    Barber and Agakov (2003), "The IM algorithm: a variational approach to information maximization".
    Dong, Jacobsen, Khalloufi, Akram, Liu, Duraisamy and Huan (2025), "Variational Bayesian optimal experimental design
    with normalizing flows", Eq. 12.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from pyro_voed.certificates.certificate import certified
from pyro_voed.checks import Labels, check_count
from pyro_voed.estimators.estimate import Terms, estimate
from pyro_voed.estimators.fit import fit_of
from pyro_voed.estimators.learned_prior import with_learned_prior
from pyro_voed.estimators.nuisance import fit_nuisance
from pyro_voed.estimators.posterior import RATE, fit_posterior
from pyro_voed.estimators.summarising import Summary
from pyro_voed.experiment import needs
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.results import EIGResult
from pyro_voed.training.settings import Fresh, Training, check_training


def eig_flow(
    model: Callable[..., Any] | Experiment,
    observation_labels: Labels = None,
    target_labels: Labels = None,
    *,
    designs: Mapping[str, Any] | None = None,
    density: Any = None,
    summary: Summary = None,
    training: Training | None = None,
    num_samples: int | None = None,
    ensemble: bool = False,
    learn_prior: bool = False,
    references: Sequence[Callable[..., EIGResult]] = (),
    certify: bool = False,
    seed: int | None = None,
    progress: bool | None = None,
) -> EIGResult:
    """Estimate the expected information gain from below with a conditional normalising flow.

    Args:
        model: A Pyro program of one experiment, or an `Experiment`, which takes what is rarer: the model's arguments, a
            replaced prior, the entropy of targets without a stated density.
        observation_labels: Outcome sites; default: the sites given with `obs=`.
        target_labels: Sites to learn about; default: all other latent sites.
        designs: Candidate designs, `(*design_batch, *shape)` for each label, evaluated with one density that takes
            the design as context; the parameter store is neither read nor changed for them. Default: the one design
            in the store, else the model's initial one.
        density: A factory `(theta_dim, context_dim) -> density`, or a density; the density of an earlier result is
            trained further (or used as it is, with `Fresh(num_steps=0)`). Default: a spline coupling flow.
        summary: A module from standardised packed outcomes `(num, y_dim)` to learned statistics `(num, summary_dim)`,
            such as those of `pyro_voed.summaries`, or a mapping from outcome sites to such modules. Default: picked
            from the outcome's plates and shape, a set network for exchangeable rows; `torch.nn.Identity()` for none.
        training: `Fresh(...)` trains on fresh simulations every step, `Pool(num_simulations, ...)` on a fixed pool.
            Default: `Fresh()`, or `Pool()` of 10,000 where experiments are run one by one.
        num_samples: Fresh experiments at each design behind the reported number; default 20,000 shared among the
            designs (at least 2,000 each), 2,000 where experiments are run one by one.
        ensemble: Over a batch of designs, train one density for each design, all stacked, rather than one that takes
            the design as context.
        learn_prior: For targets whose density the model does not state, learn it first, from as many simulations again
            (or the same pool). Its divergence from the prior is added to the estimate, which then has no side (`bound`
            is "neither"). Without effect where the model states the density.
        references: Estimators to put beside the bound, such as `eig_nmc` or `eig_marginal`: each is called with the
            experiment and the designs, and its result is in the field `references`.
        certify: Also give a certified two-sided interval (field `certificate`), 0.05 nats wide at 95 % where the budget
            allows; needs an outcome density. Other widths: the function `certify`. With nuisance sites a density of
            these is learned for it too.
        seed: Seed; None draws one from the global generator. Equal seeds give equal results.
        progress: Show progress bars; None shows them on a terminal only.

    Returns:
        The lower bound in nats with its standard error, of the shape of the design batch; with a learned prior density
        an estimate that may err to either side.

    Raises:
        ValueError: If labels, designs or sizes are wrong, or the model's information gain is undefined.
        NotImplementedError: If a target is discrete without finitely many values, or the density of the targets is
            neither stated nor learned, nor their entropy given; if a reference or the certificate needs what the model
            does not have. All of this before anything is simulated in bulk.
        TrainingStopped: If an error ends training, such as a term that is not finite (then it is an `ArithmeticError`
            too). It carries the density as last trained (`error.density`), with which training can go on.

    Example:
        >>> from pyro_voed.problems.linear_gaussian import linear_gaussian
        >>> result = eig_flow(linear_gaussian(), "y", "theta", training=Fresh(num_steps=200), seed=0)
        >>> result.bound, bool(0.9 < result.eig < 1.25)  # exact: 1.199
        ('lower', True)
    """
    check_training(training)
    if num_samples is not None:
        check_count(num_samples, "num_samples", 2)
    if learn_prior and isinstance(training, Fresh) and training.num_steps == 0:
        raise ValueError("learn_prior: with num_steps=0 there is no density of the targets to use as it is.")
    needed = [needs.learnable_targets, *(() if learn_prior else (needs.stated_prior,))]
    needed += needs.on_behalf("certify", [needs.certifiable] if certify else ())
    for other in references:
        own = getattr(getattr(other, "func", other), "__name__", "a reference")
        needed += needs.on_behalf(own, needs.needs_of(other))

    def terms(experiment: Experiment, candidates: dict[str, Tensor]) -> Terms:
        fit = fit_of(experiment, candidates, training, name="eig_flow", rate=RATE, ensemble=ensemble, progress=progress)
        pool = fit.pool()
        known = experiment.has_log_prior or experiment.averages_prior or experiment.prior_entropy is not None
        learns = learn_prior and not known
        if learns:
            fit = with_learned_prior(fit, pool)
        posterior = fit_posterior(fit, density, summary, ensemble=ensemble, pool=pool)
        found = posterior.evaluate(num_samples)
        of_nuisance = fit_nuisance(fit, summary) if certify and experiment.nuisance else None
        learned = replace(posterior.learned(found), attains=not learns, nuisance=of_nuisance)
        return Terms(found.terms, learned, bound="neither" if learns else None, failed=found.failed)

    def further(result: EIGResult) -> EIGResult:
        others = tuple(other(result.experiment, designs=result.designs) for other in references)
        result = replace(result, references=others)
        return certified(result) if certify else result

    question = (model, observation_labels, target_labels, designs, seed)
    return estimate(question, terms, name="eig_flow", bound="lower", needs=needed, then=further)
