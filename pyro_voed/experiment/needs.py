"""What estimators need of an experiment, each need a function that raises where it is not met.

All parts of a call state their needs, and these are checked before anything is paid for. Each function takes the
experiment and the name of what needs it, and raises NotImplementedError with what to do instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

from pyro_voed.experiment.experiment import Experiment

Need = Callable[[Experiment, str], None]
Function = TypeVar("Function", bound=Callable[..., Any])


def needing(*needs: Need) -> Callable[[Function], Function]:
    """Note on an estimator what it needs, for calls that it is a part of (`needs_of`)."""

    def note(estimator: Function) -> Function:
        vars(estimator)["needs"] = needs
        return estimator

    return note


def needs_of(part: Any) -> tuple[Need, ...]:
    """Return what a part of a call says that it needs: an estimator, its arguments bound or not, or a proposal."""
    while isinstance(part, partial):
        part = part.func
    return getattr(part, "needs", ())


def on_behalf(name: str, needs: Iterable[Need]) -> list[Need]:
    """Return the needs of a part of a call under its own name: the call itself may be what its refusal advises."""

    def named(need: Need) -> Need:
        return lambda experiment, _: need(experiment, name)

    return [named(need) for need in needs]


def no_failures(experiment: Experiment, name: str) -> None:
    """Need outcomes that are finite in every run."""
    if experiment.failures != "error":
        raise NotImplementedError(
            f'{name} needs finite outcomes, and failures="{experiment.failures}" allows others, which have no density. '
            "Use eig_flow or eig_critic, which need simulations alone."
        )


def whole_outcomes(experiment: Experiment, name: str) -> None:
    """Need outcomes all of whose elements are there, in every run and at every design."""
    no_failures(experiment, name)
    missing = [site.name for site in experiment.observations if site.fill is not None]
    if missing:
        raise NotImplementedError(
            f"{name} learns the density of the outcome, and how much of {missing} is measured depends on the design. "
            "Call it at one design a time, or use eig_flow or, where the outcome has a density, eig_nmc."
        )


def smooth_outcomes(experiment: Experiment, name: str) -> None:
    """Need outcomes whose distribution moves smoothly with the design, so that gradients tell how."""
    if experiment.failures != "error":
        raise NotImplementedError(
            f'{name} climbs gradients, and these do not see failures="{experiment.failures}" come and go with the '
            "design. Use search_spsa, search_grid or search_random with eig_flow or eig_critic."
        )
    moving = [site.name for site in experiment.observations if site.fill is not None]
    if moving:
        raise NotImplementedError(
            f"{name} climbs gradients, and these do not see how much of {moving} is measured change with the design. "
            "Use search_spsa, search_grid or search_random."
        )


def outcome_density(experiment: Experiment, name: str) -> None:
    """Need the density of every outcome site."""
    no_failures(experiment, name)
    implicit = [site.name for site in experiment.observations if not site.has_density]
    if implicit:
        raise NotImplementedError(
            f"{name} needs the density of the outcome, and {implicit} have none (deterministic, or a distribution "
            "that only samples). Use eig_flow, or eig_critic for discrete computed targets: these need simulations "
            "alone."
        )


def held_targets(experiment: Experiment, name: str) -> None:
    """Need targets that can be held while the rest is drawn."""
    computed = [site.name for site in experiment.targets if not site.has_density]
    if computed:
        raise NotImplementedError(
            f"{name} holds the targets while it draws the rest, and {computed} cannot be held: they are computed. "
            "Name the sites they are computed from, or use eig_critic, or for continuous targets eig_flow on an "
            "Experiment with prior_entropy=."
        )


def no_nuisance(experiment: Experiment, name: str) -> None:
    """Need p(y given the targets), which must not be an integral over nuisance sites."""
    if experiment.nuisance:
        raise NotImplementedError(
            f"{name} needs the density of the outcome given the targets, but {[s.name for s in experiment.nuisance]} "
            "are drawn too and are not targets. Make them targets, or use eig_flow, which needs simulations alone, or "
            "eig_nmc and eig_pce, which average over them."
        )


def scored_targets(experiment: Experiment, name: str) -> None:
    """Need the prior density of targets that the prior did not draw."""
    if experiment.has_auxiliary_density:
        raise NotImplementedError(
            f"{name} scores targets that the prior did not draw, and the prior guide states its density by "
            "auxiliary sites. Use a guide that samples the model's sites from their own distributions, or eig_flow."
        )


def likelihood(experiment: Experiment, name: str) -> None:
    """Need p(y given the targets) at targets that the model drew."""
    for need in (outcome_density, held_targets, no_nuisance):
        need(experiment, name)


def likelihood_anywhere(experiment: Experiment, name: str) -> None:
    """Need p(y given the targets) and p(targets) at targets from a proposal."""
    likelihood(experiment, name)
    scored_targets(experiment, name)


def certifiable(experiment: Experiment, name: str) -> None:
    """Need what a certificate by trained densities does: one of the nuisance sites too, where there are any."""
    for need in (no_failures, outcome_density, held_targets, scored_targets):
        need(experiment, name)
    unfit = [
        site.name
        for site in experiment.nuisance
        if not site.has_density or (site.is_discrete and site.support_values is None)
    ]
    if unfit:
        raise NotImplementedError(
            f"{name} learns a density of the nuisance sites, and {unfit} state none, or take endlessly many values. "
            "Use eig_nmc and eig_pce, which draw them."
        )


def inner_draws(experiment: Experiment, name: str) -> None:
    """Need outcomes with a density and targets that can be held, nuisance sites allowed."""
    outcome_density(experiment, name)
    held_targets(experiment, name)


def continuous_targets(experiment: Experiment, name: str) -> None:
    """Need targets that have a curvature."""
    discrete = [site.name for site in experiment.targets if site.is_discrete]
    if discrete:
        raise NotImplementedError(
            f"{name}: targets {discrete} are discrete and have no curvature. Use eig_nmc or eig_marginal, which only "
            "need the outcome's density."
        )


def laplace(experiment: Experiment, name: str) -> None:
    """Need the log joint density of continuous targets and outcomes."""
    for need in (likelihood, continuous_targets):
        need(experiment, name)
    if not experiment.has_log_prior:
        raise NotImplementedError(
            f"{name} needs the prior density of the targets, and the model does not state it. Name all its latent "
            "sites as targets."
        )


def learnable_targets(experiment: Experiment, name: str) -> None:
    """Need targets that a flow or a classifier can stand for."""
    endless = [site.name for site in experiment.targets if site.is_discrete and site.support_values is None]
    if endless:
        raise NotImplementedError(
            f"{name}: targets {endless} are discrete without finitely many values of their own, so no classifier can "
            "stand for their posterior. Use eig_critic, which only needs simulations; or eig_nmc where they are random "
            "sites and the outcome has a density; or other targets."
        )


def stated_prior(experiment: Experiment, name: str) -> None:
    """Need the density of the targets, stated or averaged over nuisance sites, or their entropy."""
    if experiment.has_log_prior or experiment.averages_prior or experiment.prior_entropy is not None:
        return
    if experiment.failures == "ignore":
        raise NotImplementedError(
            f'{name}: with failures="ignore" the targets are those of runs that did not fail, whose density the model '
            "does not state. Use eig_critic, which needs none, or eig_flow with learn_prior=True, which gives up the "
            "side of the bound."
        )
    unstated = [site.name for site in experiment.targets if not site.has_density]
    jointly = "the prior guide states the density of all latent sites together, not of the targets alone"
    why = f"{unstated} have no log density" if unstated else jointly
    raise NotImplementedError(
        f"{name}: the model does not state the prior density of the targets: {why}. Make targets of the sites that do, "
        "or give the targets' entropy in nats, Experiment(..., prior_entropy=); eig_flow can also learn their density "
        "(learn_prior=True), which gives up the side of the bound."
    )


def designs(experiment: Experiment, name: str) -> None:
    """Need at least one design; a model without any is a ValueError."""
    if not experiment.designs:
        raise ValueError(f"{name}: the model has no design: mark what the experimenter sets with pyro.param.")
