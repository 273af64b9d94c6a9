"""What all reference methods begin and end with: an experiment with its outcome in hand, and a judged sample."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from pyro_voed.checks import Labels, as_labels, check_callable
from pyro_voed.experiment import needs
from pyro_voed.experiment.designs import design_batch_shape
from pyro_voed.experiment.experiment import Experiment, as_experiment
from pyro_voed.experiment.programs import is_deterministic, sample_nodes
from pyro_voed.inference.outcomes import check_outcome, to_inference_data
from pyro_voed.posterior_sample import PosteriorSample

MAX_R_HAT = 1.05
MIN_EFFECTIVE_SAMPLE_SIZE = 100


@dataclass(frozen=True)
class Conditioned:
    """An experiment at one design, with the outcome that was observed there, and when the call began."""

    experiment: Experiment
    designs: Mapping[str, Tensor]
    observed: Mapping[str, Tensor]
    started: float = field(default_factory=time.perf_counter)

    def sample(
        self,
        method: str,
        draws: Mapping[str, Tensor],
        effective: Mapping[str, Tensor],
        diverging: Tensor | None = None,
        **found: Any,
    ) -> PosteriorSample:
        """Return draws `(num_chains, num_draws, *shape)` of each target as a sample, with what else was found."""
        return PosteriorSample(
            values=draws,
            observations=self.observed,
            method=method,
            seconds=time.perf_counter() - self.started,
            effective_sample_size=effective,
            inference_data=to_inference_data(draws, self.observed, diverging),
            **found,
        )


def conditioned(
    model: Callable[..., Any] | Experiment,
    observations: Tensor | Mapping[str, Any],
    observation_labels: Labels,
    target_labels: Labels,
    designs: Mapping[str, Any] | None,
    *,
    scored_by: str | None = None,
    vectorize: bool = True,
) -> Conditioned:
    """Return the experiment of a model at one design and outcome; inside `isolated`.

    `scored_by` names a method that needs the density of outcomes and moves latent sites; None where none does.
    """
    started = time.perf_counter()
    if scored_by is not None:
        # Before the experiment is read, which would ask for the targets first.
        _refuse_implicit(_computed_outcomes(model, observation_labels), scored_by)
    experiment, values = as_experiment(model, observation_labels, target_labels, designs, vectorize=vectorize)
    if scored_by is not None:
        _check_scored(experiment, scored_by)
    if batch := design_batch_shape(experiment, values):
        raise ValueError(f"designs: expected the one design of the outcome, got a batch of shape {tuple(batch)}.")
    return Conditioned(experiment, values, check_outcome(experiment, observations), started)


def mixing(draws: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return split R-hat and effective sample size of the mean of each site's elements, by ArviZ.

    Draws are `(num_chains, num_draws, *shape)`, at least 4 a chain. Both are NaN where an element never changes.

    References:
        A. Vehtari, A. Gelman, D. Simpson, B. Carpenter and P.-C. Bürkner (2021), Rank-normalization, folding, and
        localization: an improved R-hat. Bayesian Analysis 16, section 3.
    """
    import arviz  # here, because it takes seconds that not every user of the library should pay

    halves = {name: torch.cat(value[:, : value.shape[1] // 2 * 2].chunk(2, 1)) for name, value in draws.items()}
    # ArviZ gives an element that never changes as many effective draws as it has.
    effective = _by_site(arviz.ess, draws, method="mean")
    constant = {name: (value == value[:1, :1]).all(1).all(0) for name, value in draws.items()}
    effective = {name: torch.where(constant[name], torch.nan, value) for name, value in effective.items()}
    return between_runs(halves), effective


def between_runs(draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return R-hat between whole runs of each site's elements `(num_runs, num_draws, *shape)`, by ArviZ."""
    import arviz

    return _by_site(arviz.rhat, draws, method="identity")


def _by_site(statistic: Callable[..., Any], draws: Mapping[str, Tensor], **options: Any) -> dict[str, Tensor]:
    import arviz

    # Sums over thousands of draws whose spread is far smaller than their size need double precision.
    arrays = {name: value.detach().double().cpu().numpy() for name, value in draws.items()}
    with np.errstate(divide="ignore", invalid="ignore"):
        found = statistic(arviz.convert_to_dataset(arrays), **options)
    return {name: torch.as_tensor(found[name].values, device=value.device) for name, value in draws.items()}


def mixing_faults(effective: Mapping[str, Tensor], r_hat: Mapping[str, Tensor] | None = None) -> list[str]:
    """Return, site by site, what says that draws are no reference."""
    found = []
    for name, sizes in effective.items():
        # Some elements are constant by nature (a Cholesky factor's zeros), a site that never moves is not.
        moved = ~sizes.isnan()
        if not moved.any():
            found.append(f"'{name}' never moved")
            continue
        if r_hat is not None and (worst := r_hat[name][moved].max().item()) > MAX_R_HAT:
            found.append(f"'{name}' has R-hat {worst:.3f}")
        if not (fewest := sizes[moved].min().item()) >= MIN_EFFECTIVE_SAMPLE_SIZE:
            found.append(f"'{name}' has an effective sample size of {fewest:.0f}")
    return found


def _computed_outcomes(model: Callable[..., Any] | Experiment, labels: Labels) -> list[str]:
    """Return which of the named outcomes a model computes rather than draws, seen in one run of it."""
    if isinstance(model, Experiment):
        return [site.name for site in model.observations if site.is_deterministic]
    check_callable(model)
    named = as_labels(labels, "observation_labels")
    if named is None:
        return []
    with poutine.trace() as recorder:
        model()
    nodes = sample_nodes(recorder.trace)
    return [name for name in named if name in nodes and is_deterministic(nodes[name])]


def _refuse_implicit(names: Sequence[str], method: str) -> None:
    if names:
        raise NotImplementedError(
            f"outcomes {list(names)} have no density given the latent sites, which {method} needs. Use abc_posterior, "
            "which needs simulations only, or train a flow with eig_flow and use flow_posterior."
        )


def _check_scored(experiment: Experiment, method: str) -> None:
    needs.no_failures(experiment, method)
    _refuse_implicit([site.name for site in experiment.observations if not site.has_density], method)
    latent = [
        site
        for site in (*experiment.targets, *experiment.others)
        if not site.is_deterministic and site.role != "history"
    ]
    if discrete := [site.name for site in latent if site.is_discrete]:
        raise NotImplementedError(
            f"latent sites {discrete} are discrete, where {method} moves real coordinates. Sum them out in the model, "
            "or use abc_posterior."
        )
    if unknown := [site.name for site in latent if not site.has_density]:
        raise NotImplementedError(
            f"latent sites {unknown} have no density, which {method} needs to move them. Use abc_posterior."
        )
