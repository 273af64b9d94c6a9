r"""Posterior of one outcome by the trained flow: draws in milliseconds, and the flow as an ordinary Pyro guide.

Training the flow lower bound leaves a conditional density :math:`q(\theta \mid y, \xi)` behind, which answers for every
outcome it was trained on. In the targets' own supports, :math:`\theta = T(u)`, its density is

.. math:: q(\theta \mid y, \xi) = q_u(u \mid y, \xi) \,/\, \lvert \det \partial T / \partial u \rvert .

`flow_posterior` draws from it; `flow_guide` hands it to Pyro, where importance sampling corrects what it got wrong and
stochastic variational inference refines it at the outcome in hand.

References:
    Dong et al. (2025), "Variational Bayesian optimal experimental design with normalizing flows".
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from jaxtyping import Float
from pyro import distributions as dist
from torch import Tensor

from pyro_voed.checks import check_count, warn
from pyro_voed.densities import StackedDensity
from pyro_voed.experiment.caller_state import isolated
from pyro_voed.experiment.designs import design_batch_shape, flat_designs
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.packing import unpack_targets
from pyro_voed.experiment.programs import sample_nodes, trace_program
from pyro_voed.experiment.sites import Site
from pyro_voed.experiment.weighting import design_context
from pyro_voed.inference.outcomes import check_outcome, pack_outcome, packed_names, to_inference_data
from pyro_voed.posterior_sample import PosteriorSample
from pyro_voed.results import DesignResult, EIGResult, experiment_of

DesignIndex = int | tuple[int, ...] | None
"""Which member of a batch of designs; None where there is one design."""

_guide_numbers = itertools.count()


def flow_posterior(
    result: EIGResult | DesignResult,
    observations: Tensor | Mapping[str, Any],
    num_samples: int = 1000,
    *,
    design_index: DesignIndex = None,
    seed: int | None = None,
) -> PosteriorSample:
    """Draw the targets from the trained density of a result, given an outcome.

    The draws are independent, and as good as the density: compare with `nuts_posterior`, or look at the gap between
    the lower bound and an upper one. Warns, naming the elements, where the outcome lies outside the range of the
    simulations: there the density extrapolates.

    Args:
        result: What `eig_flow` or `optimise_design` returned.
        observations: The outcome, of one experiment's shape: a dict by site, or a tensor where there is one site.
        num_samples: Number of draws.
        design_index: For a result over a batch of designs, at which member the outcome was observed.
        seed: Seed; None draws one from the global generator. Equal seeds give equal draws.

    Returns:
        Draws `(1, num_samples, *shape)` of each target in its own support.

    Raises:
        ValueError: If the result has no density of the targets, the outcome's shape is wrong or it is not finite, or
            `design_index` does not fit the result.
        ArithmeticError: If a draw is not finite.

    Example:
        >>> from pyro_voed import Fresh, eig_flow
        >>> from pyro_voed.problems.linear_gaussian import linear_gaussian
        >>> result = eig_flow(linear_gaussian(), "y", "theta", training=Fresh(num_steps=100), seed=0)
        >>> posterior = flow_posterior(result, torch.tensor([1.0, 2.0, 1.5]), 500, seed=0)
        >>> posterior.flat("theta").shape
        torch.Size([500, 2])
    """
    check_count(num_samples, "num_samples")
    with isolated(seed), torch.no_grad():
        started = time.perf_counter()
        case, observed, context = _at_outcome(result, observations, design_index)
        theta = case.density.condition(context).sample((num_samples,))
        targets = unpack_targets(case.experiment, theta, case.designs)
        values = {name: draws.unsqueeze(0) for name, draws in targets.items()}
        bad = [name for name, draws in values.items() if not torch.isfinite(draws).all()]
        if bad:
            raise ArithmeticError(f"draws of {bad} are not finite: the density does not hold at this outcome.")
        return PosteriorSample(
            values=values,
            observations=observed,
            method="flow",
            seconds=time.perf_counter() - started,
            effective_sample_size={name: own.new_full(own.shape[2:], num_samples) for name, own in values.items()},
            inference_data=to_inference_data(values, observed),
        )


def flow_guide(
    result: EIGResult | DesignResult, observations: Tensor | Mapping[str, Any], *, design_index: DesignIndex = None
) -> FlowGuide:
    """Return the trained density as a Pyro guide for one outcome; arguments as in `flow_posterior`.

    The guide works with `Predictive`, `poutine.replay`, `Importance` and `SVI`, with the model conditioned on the same
    outcome (`pyro.condition`) at the same design, and with the prior that the result was made with. It holds a copy of
    the density: refining it by `SVI` leaves the result as it is.

    Raises:
        ValueError: As for `flow_posterior`.
        NotImplementedError: If the guide would not draw every latent site (nuisance, deterministic targets), or the
            support of a target depends on another.

    Example:
        >>> from pyro_voed import Fresh, eig_flow
        >>> from pyro_voed.problems.linear_gaussian import linear_gaussian
        >>> outcome = torch.tensor([1.0, 2.0, 1.5])
        >>> result = eig_flow(linear_gaussian(), "y", "theta", training=Fresh(num_steps=100), seed=0)
        >>> model = pyro.condition(linear_gaussian(), {"y": outcome})
        >>> weighted = pyro.infer.Importance(model, flow_guide(result, outcome), num_samples=100).run()
        >>> bool(weighted.get_log_normalizer() < 0)
        True
    """
    # Nothing random comes out, so the caller's stream stays where it is.
    with isolated(seed=0):
        case, _, context = _at_outcome(result, observations, design_index)
        _check_guidable(case.experiment)
        trace = trace_program(case.experiment.program, case.designs, {}, None)
        case.experiment.program.meter.num_calls += 1
        nodes = sample_nodes(trace)
        density = copy.deepcopy(case.density).eval()
        parts = tuple(_part(site, nodes[site.name]) for site in case.experiment.targets)
        return FlowGuide(density, context.clone(), parts)


@dataclass(frozen=True)
class _Part:
    """What the guide must know of a target: the site, its event dimensions, and the plates it stands in."""

    site: Site
    event_dim: int
    plates: tuple[tuple[str, int, int], ...]

    @property
    def batch_shape(self) -> torch.Size:
        return self.site.shape[: len(self.site.shape) - self.event_dim]


class FlowGuide:
    """A trained density at one outcome, as a Pyro guide; made by `flow_guide`.

    A call registers the density's weights with the parameter store and samples the packed targets at an auxiliary
    site, then hands every target on as a `Delta` site in its own support, weighted by the Jacobian, as Pyro's automatic
    guides do.
    """

    def __init__(self, density: Any, context: Float[Tensor, " context_dim"], parts: tuple[_Part, ...]) -> None:
        self.density = density
        self.context = context
        self.parts = parts
        # Two guides under one name in the store would share the weights of the first.
        self.name = f"flow_guide_{next(_guide_numbers)}"

    def __getstate__(self) -> dict[str, Any]:
        # The copy's weights have no ties to the parameter store, which cannot be pickled.
        return {"density": copy.deepcopy(self.density), "context": self.context, "parts": self.parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        FlowGuide.__init__(self, **state)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw the targets; the model's arguments are taken and ignored, the guide being made for one outcome."""
        density = pyro.module(self.name, self.density)
        packed = pyro.sample(f"_{self.name}_packed", density.condition(self.context), infer={"is_auxiliary": True})
        pieces = packed.split([part.site.packed_dim for part in self.parts], -1)
        return {part.site.name: _hand_on(part, piece) for part, piece in zip(self.parts, pieces, strict=True)}


def _hand_on(part: _Part, packed: Tensor) -> Tensor:
    """Sample a target's Delta site at packed coordinates `(*batch, packed_dim)`."""
    transform, site = part.site.transform, part.site
    assert transform is not None  # continuous sample sites all have one
    # Outer plates (vectorised particles) stand left of the model's own, which the packed site fills with singletons.
    outer = packed.shape[: max(0, packed.dim() - 1 - len(part.batch_shape))]
    coordinates = packed.reshape(-1, *transform.inverse_shape(site.shape))
    value = transform(coordinates)
    log_det = transform.log_abs_det_jacobian(coordinates, value)
    log_det = log_det.reshape(outer + part.batch_shape + (-1,)).sum(-1)
    value = value.reshape(outer + site.shape)
    with ExitStack() as plates:
        for name, size, dim in part.plates:
            plates.enter_context(pyro.plate(name, size, dim=dim))
        return pyro.sample(site.name, dist.Delta(value, log_density=-log_det, event_dim=part.event_dim))


def _part(site: Site, node: Mapping[str, Any]) -> _Part:
    plates = tuple((frame.name, frame.size, frame.dim) for frame in node["cond_indep_stack"] if frame.vectorized)
    return _Part(site, node["fn"].event_dim, plates)


def _check_guidable(experiment: Experiment) -> None:
    draws = "or use flow_posterior for draws alone."
    if discrete := [site.name for site in experiment.targets if site.is_discrete]:
        raise NotImplementedError(
            f"targets {discrete} are discrete, which a guide of packed coordinates does not draw. Use flow_posterior "
            "for draws."
        )
    if deterministic := [site.name for site in experiment.targets if site.is_deterministic]:
        raise NotImplementedError(
            f"targets {deterministic} are deterministic: a guide draws sample sites. Make the sites that they are "
            f"computed from the targets, {draws}"
        )
    if nuisance := [site.name for site in experiment.nuisance]:
        raise NotImplementedError(
            f"the density does not draw the nuisance sites {nuisance}, so a guide made of it would have wrong weights. "
            f"Make them targets too, {draws}"
        )
    if dependent := [site.name for site in experiment.targets if site.dependent_support]:
        raise NotImplementedError(
            f"the supports of targets {dependent} depend on other targets. Sample a fraction in the unit interval and "
            f"compute the site from it with pyro.deterministic, {draws}"
        )


@dataclass(frozen=True)
class TrainedDensity:
    """The density of a result at one design: of packed targets given `context(y)`."""

    density: Any
    experiment: Experiment
    designs: Mapping[str, Tensor]

    def context(self, y: Float[Tensor, "*batch y_dim"]) -> Float[Tensor, "*batch context_dim"]:
        """Return what the density is conditioned on: the outcome, and the design where it takes that."""
        return design_context(self.experiment, self.designs, self.density, y)


def trained_density(result: EIGResult | DesignResult, design_index: DesignIndex = None) -> TrainedDensity:
    """Return the density of the targets that a result learned, at one of its designs; ValueError if it has none."""
    estimate = result.final if isinstance(result, DesignResult) else result
    if estimate.learned is None or not estimate.learned.of_targets:
        raise ValueError(
            f"result: {estimate.estimator} learned no density of the targets given the outcome. Use the result of "
            "eig_flow, or of optimise_design with a lower bound."
        )
    experiment = experiment_of(estimate)
    designs = _member(experiment, estimate.designs, design_index)
    density = estimate.density
    if isinstance(density, StackedDensity):
        batch = design_batch_shape(experiment, estimate.designs)
        index = torch.arange(batch.numel()).reshape(batch)[design_index]
        density = density.member(int(index))
    return TrainedDensity(density, experiment, designs)


def _at_outcome(
    result: EIGResult | DesignResult, observations: Tensor | Mapping[str, Any], design_index: DesignIndex
) -> tuple[TrainedDensity, dict[str, Tensor], Float[Tensor, " context_dim"]]:
    """Return the density, the checked outcome, and what the density is conditioned on there."""
    estimate = result.final if isinstance(result, DesignResult) else result
    trained = trained_density(result, design_index)
    observed = check_outcome(trained.experiment, observations)
    y = pack_outcome(trained.experiment, observed, trained.designs)
    _warn_outside(trained.experiment, y, None if estimate.learned is None else estimate.learned.outcome_range)
    return trained, observed, trained.context(y)


def _member(experiment: Experiment, designs: Mapping[str, Tensor], index: DesignIndex) -> dict[str, Tensor]:
    """Return the design in question."""
    batch = design_batch_shape(experiment, designs)
    if not batch:
        if index is not None:
            raise ValueError(f"design_index: the result holds one design, got {index}. Leave it out.")
        return dict(designs)
    where = (index,) if isinstance(index, int) else index
    if where is None or len(where) != len(batch) or not all(-n <= i < n for i, n in zip(where, batch, strict=True)):
        raise ValueError(
            f"design_index: the result holds designs of batch shape {tuple(batch)}; expected the index of the one that "
            f"the outcome was observed at, got {index}."
        )
    members = flat_designs(experiment, designs)
    return {name: value.unflatten(0, batch)[where] for name, value in members.items()}


def _warn_outside(experiment: Experiment, y: Float[Tensor, " y_dim"], outcome_range: Tensor | None) -> None:
    if outcome_range is None:
        return
    outside = ((y < outcome_range[0]) | (y > outcome_range[1])).tolist()
    names = list(dict.fromkeys(name for name, flag in zip(packed_names(experiment), outside, strict=True) if flag))
    if names:
        warn(
            f"outcome {', '.join(names[:8])}{' ...' if len(names) > 8 else ''} lies outside the range of the "
            "simulations: the learned posterior extrapolates there. Compare with nuts_posterior, or check the model."
        )
