r"""Design search by gradient: climb a bound jointly in the design and in the density that makes it tight.

.. math::
    \xi^*, \phi^* = \arg\max_{\xi, \phi}\;
    \mathbb{E}_{p(\theta, y \mid \xi)}\big[\log q_\phi(\theta \mid y) - \log p(\theta)\big],

with one stochastic gradient a step for both: where the outcome is reparametrised the design's gradient flows through
it into the density, elsewhere score-function terms stand in (`gradients`). Designs move in unconstrained coordinates
(`pyro.param` constraints hold by construction; anything else by a projection after each step). Standardisation follows
the moving design, without gradient, and is frozen for the cool-down, in which both come to rest. The winning start is
chosen, and the reported number made, on simulations that took no part in the search.

References:
    Foster, Jankowiak, O'Meara, Teh and Rainforth (2020), "A unified stochastic gradient approach to designing
    Bayesian-optimal experiments"; Dong et al. (2025), section 3.4.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_voed.caller_state import isolated
from pyro_voed.checks import Labels, check_callable, check_count, check_known, check_positive
from pyro_voed.densities import StandardisedDensity
from pyro_voed.design.gradients import score_sites, score_terms
from pyro_voed.estimators.learning import (
    Budget,
    build_density,
    check_sizes,
    discrete_values,
    evaluate_terms,
    explain_terms,
    warn_constant,
)
from pyro_voed.estimators.posterior_bound import barber_agakov, check_flow_targets, flow_bound, stated_prior
from pyro_voed.monte_carlo import mean_and_standard_error
from pyro_voed.resolve import resolve
from pyro_voed.results import DesignResult, EIGResult, FitHistory, element_names
from pyro_voed.simulate import JointSample, sample_joint
from pyro_voed.sites import DesignSite, Sites
from pyro_voed.training import Ascent, fit_fresh, kept_on_error

RESCALE_EVERY = 50
RESCALE_SIZE = 500
MAX_UNCONSTRAINED = 6.0
"""A design whose sigmoid-like map is this far out hardly moves any more: it is nudged back inside."""

SELECTION_SIZE = 5_000


def optimise_design(
    model: Callable[..., Any],
    observation_labels: Labels = None,
    target_labels: Labels = None,
    *,
    design_labels: Labels = None,
    model_args: Sequence[Any] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    prior: Callable[..., Any] | None = None,
    prior_entropy: float | None = None,
    objective: Any = barber_agakov,
    density: Any = None,
    summary: nn.Module | None = None,
    num_starts: int = 1,
    starts: Mapping[str, Any] | None = None,
    projection: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] | None = None,
    initial_eig: bool = False,
    num_steps: int | None = None,
    max_steps: int = 10_000,
    batch_size: int = 256,
    learning_rate: float = 2e-3,
    design_learning_rate: float = 3e-2,
    num_samples: int = 20_000,
    vectorize: bool = True,
    seed: int | None = None,
    progress: bool | None = None,
) -> DesignResult:
    """Find the design with the largest expected information gain by stochastic gradients.

    Afterwards the best design is in the parameter store under its own name (in the module, for a PyroModule), as
    Pyro users expect; nothing else of the caller's has changed.

    Args:
        model: A Pyro program of one experiment with at least one design.
        observation_labels: Outcome sites; default: the sites given with `obs=`.
        target_labels: Sites to learn about; default: all other latent sites.
        design_labels: Designs to optimise; default: the explicit `pyro.param` / `PyroParam` sites.
        model_args: Positional arguments of the model.
        model_kwargs: Keyword arguments of the model.
        prior: A Pyro guide over the latent sites that replaces the model's prior.
        prior_entropy: Differential entropy of the targets in nats, where the model states no density of them.
        objective: Terms of a bound from a joint sample and a density, with an attribute `bound`; it must not be an
            upper bound, which is no objective to ascend.
        density: A factory `(theta_dim, context_dim) -> density`, a density, or that of an earlier result to go on
            from. Default: a spline coupling flow.
        summary: A module from standardised outcomes to learned statistics.
        num_starts: Number of starts. The first is the stored value, else the model's initial one; further ones add
            N(0, 1) in unconstrained coordinates.
        starts: Further starts of your own, `(num_further_starts, *shape)` for each design.
        projection: Maps the designs (a dict, as in the model) to the nearest admissible ones; applied after each step.
        initial_eig: Also estimate the expected information gain at the start (field `initial`).
        num_steps: Take exactly this many steps. Default: until the bound no longer rises by more than its noise,
            then cool down.
        max_steps: Most steps for a start.
        batch_size: Experiments a step.
        learning_rate: Peak learning rate of the density.
        design_learning_rate: Peak learning rate of the designs, in unconstrained coordinates.
        num_samples: Fresh experiments behind the reported number.
        vectorize: Run experiments together; False runs any model one by one.
        seed: Seed; None draws one from the global generator.
        progress: Show progress bars; None shows them on a terminal only.

    Returns:
        The best design, its estimate on fresh simulations, the path there and the density trained along with it.

    Raises:
        ValueError: If the model has no design, a design does not reach the outcome by a gradient, labels or sizes are
            wrong, or the objective is an upper bound.
        NotImplementedError: If a site that depends on a design has neither reparametrised draws nor a density.
        ArithmeticError: If a term is not finite. This error, like any that ends a run, carries the designs and the
            density as last trained (`error.designs`, `error.density`), with which the search can go on.

    References:
        Foster et al. (2020); Dong et al. (2025), section 3.4.

    Example:
        >>> import pyro, torch
        >>> from pyro import distributions as dist
        >>> from torch.distributions import constraints
        >>> def model():
        ...     xi = pyro.param("xi", torch.tensor(0.5), constraint=constraints.interval(0.0, 2.0))
        ...     theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        ...     return pyro.sample("y", dist.Normal(xi * theta, 1.0), obs=torch.tensor(0.0))
        >>> best = optimise_design(model, num_steps=300, seed=0)
        >>> bool(best.designs["xi"] > 1.5), bool(pyro.param("xi") == best.designs["xi"])
        (True, True)
    """
    check_sizes(None, num_steps, max_steps, batch_size, learning_rate, num_samples)
    check_positive(design_learning_rate, "design_learning_rate")
    check_count(num_starts, "num_starts")
    _check_objective(objective)
    if projection is not None:
        check_callable(projection, "projection")
    with isolated(seed):
        started = time.perf_counter()
        sites = resolve(
            model,
            observation_labels,
            target_labels,
            design_labels=design_labels,
            model_args=model_args,
            model_kwargs=model_kwargs,
            prior=prior,
            vectorize=vectorize,
        )
        if not sites.designs:
            raise ValueError("the model has no design: mark what the experimenter sets with pyro.param.")
        check_flow_targets(sites, prior_entropy)
        search = _Search(
            sites=sites,
            objective=objective,
            scored=score_sites(sites),
            prior_entropy=prior_entropy,
            density=density,
            summary=summary,
            projection=projection,
            num_steps=num_steps,
            max_steps=max_steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            design_learning_rate=design_learning_rate,
            progress=progress,
        )
        initial = None
        budget = Budget(None, None, max_steps, batch_size, learning_rate, num_samples)
        if initial_eig:
            initial = flow_bound(
                sites, sites.design_values, budget, density, summary, prior_entropy, progress, time.perf_counter()
            )
        climbs = [search.climb(start) for start in _starts(sites, num_starts, starts)]
        selection = torch.stack([search.score(climb, SELECTION_SIZE)[0] for climb in climbs])
        best = climbs[int(selection.argmax())]
        result = _report(search, best, selection, num_samples, initial, started)
    _store(sites, result.designs)
    return result


@dataclass(frozen=True)
class _Climb:
    """Where one start ended."""

    designs: dict[str, Tensor]
    density: StandardisedDensity
    history: FitHistory
    path: dict[str, Tensor]
    path_steps: Tensor


@dataclass(frozen=True)
class _Search:
    """One search's settings, shared by its starts."""

    sites: Sites
    objective: Any
    scored: tuple[str, ...]
    prior_entropy: float | None
    density: Any
    summary: nn.Module | None
    projection: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] | None
    num_steps: int | None
    max_steps: int
    batch_size: int
    learning_rate: float
    design_learning_rate: float
    progress: bool | None

    def climb(self, start: Mapping[str, Tensor]) -> _Climb:
        sites, prepare = self.sites, stated_prior(self.prior_entropy)
        leaves = {site.name: _nudged(site, start[site.name]).requires_grad_() for site in sites.designs}
        designs = lambda: {site.name: site.transform(leaves[site.name]) for site in sites.designs}  # noqa: E731
        with torch.no_grad():
            pilot = prepare(sample_joint(sites, 2 * RESCALE_SIZE, designs()))
        warn_constant(sites, pilot)
        density = build_density(
            self.density,
            pilot.theta,
            pilot.y,
            num_designs=0,
            summary=self.summary,
            discrete=discrete_values(sites),
        )
        ascent = Ascent(
            [
                {"params": [p for p in density.parameters() if p.requires_grad], "lr": self.learning_rate},
                {"params": list(leaves.values()), "lr": self.design_learning_rate},
            ]
        )
        path: dict[str, list[Tensor]] = {name: [] for name in leaves}
        path_steps: list[int] = []
        cooling: list[bool] = []
        needs_likelihood = getattr(self.objective, "needs_likelihood", False)

        def draw() -> JointSample:
            return prepare(
                sample_joint(sites, self.batch_size, designs(), likelihood=needs_likelihood, score=self.scored)
            )

        def terms(sample: JointSample) -> Tensor:
            plain = self.objective(sample, density)
            return plain if sample.score is None else score_terms(plain, sample.score)

        def record(step: int) -> None:
            path_steps.append(step)
            for name, value in designs().items():
                path[name].append(value.detach().clone())

        @torch.no_grad()
        def after_step(step: int) -> None:
            if self.projection is not None:
                self._project(self.projection, leaves)
            if step % 10 == 0:
                record(step)
            if not cooling and step % RESCALE_EVERY == 0:
                density.context_scaling.fit_(sample_joint(sites, RESCALE_SIZE, designs()).y)

        learnt = lambda: {"density": density, "designs": {n: v.detach() for n, v in designs().items()}}  # noqa: E731
        with kept_on_error(learnt), pyro.validation_enabled(False):
            history = fit_fresh(
                draw,
                terms,
                ascent,
                num_steps=self.num_steps,
                max_steps=self.max_steps,
                explain=explain_terms,
                after_step=after_step,
                before_cooldown=lambda: cooling.append(True),
                progress=self.progress,
                description="optimise_design",
            )
        record(history.num_steps)
        return _Climb(
            {name: value.detach() for name, value in designs().items()},
            density,
            history,
            {name: torch.stack(values) for name, values in path.items()},
            torch.tensor(path_steps),
        )

    def _project(
        self, projection: Callable[[dict[str, Tensor]], Mapping[str, Tensor]], leaves: Mapping[str, Tensor]
    ) -> None:
        sites = {site.name: site for site in self.sites.designs}
        values = {name: sites[name].transform(leaf) for name, leaf in leaves.items()}
        projected = projection(dict(values))
        check_known(projected, sites, "projection", "design")
        for name, value in projected.items():
            if value.shape != values[name].shape:
                raise ValueError(
                    f"projection: expected '{name}' of shape {tuple(values[name].shape)}, got {tuple(value.shape)}."
                )
            leaves[name].copy_(sites[name].transform.inv(value))

    def score(self, climb: _Climb, num_samples: int) -> tuple[Tensor, Tensor, Tensor]:
        """Estimate, standard error and outcome range on fresh simulations."""
        prepare = stated_prior(self.prior_entropy)
        terms, outcome_range = evaluate_terms(
            self.sites,
            lambda sample: self.objective(prepare(sample), climb.density),
            num_samples,
            climb.designs,
            likelihood=getattr(self.objective, "needs_likelihood", False),
            estimator="optimise_design",
        )
        return *mean_and_standard_error(terms), outcome_range


def _report(
    search: _Search, best: _Climb, selection: Tensor, num_samples: int, initial: EIGResult | None, started: float
) -> DesignResult:
    eig, standard_error, outcome_range = search.score(best, num_samples)
    sites, seconds = search.sites, time.perf_counter() - started
    final = EIGResult(
        eig=eig,
        standard_error=standard_error,
        bound=search.objective.bound,
        estimator="optimise_design",
        num_simulations=sites.program.num_calls,
        num_samples=num_samples,
        seconds=seconds,
        designs=best.designs,
        target_labels=sites.target_labels,
        observation_labels=sites.observation_labels,
        nuisance_labels=tuple(site.name for site in sites.nuisance),
        history=best.history,
        density=best.density.eval(),
        sites=replace(sites, designs=tuple(replace(site, value=best.designs[site.name]) for site in sites.designs)),
        observation_range=outcome_range,
    )
    return DesignResult(
        designs=best.designs,
        eig=eig,
        standard_error=standard_error,
        bound=search.objective.bound,
        final=final,
        path=best.path,
        path_steps=best.path_steps,
        history=best.history,
        start_eigs=selection,
        num_simulations=sites.program.num_calls,
        seconds=seconds,
        initial=initial,
    )


def _starts(sites: Sites, num_starts: int, starts: Mapping[str, Any] | None) -> list[dict[str, Tensor]]:
    stored = sites.design_values
    if starts is None:
        return [stored, *(_perturbed(sites) for _ in range(num_starts - 1))]
    check_known(starts, stored, "starts", "design")
    given = {name: torch.as_tensor(value).to(stored[name]) for name, value in starts.items()}
    counts = {name: value.shape[0] if value.dim() else 0 for name, value in given.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"starts: expected equally many for each design, got {counts}.")
    for site in sites.designs:
        value = given.get(site.name)
        if value is not None and (value.shape[1:] != site.value.shape or not site.constraint.check(value).all()):
            raise ValueError(
                f"starts['{site.name}']: expected shape (num_starts, {', '.join(map(str, site.value.shape))}) inside "
                f"{site.constraint}, got {tuple(value.shape)}."
            )
    count = next(iter(counts.values()))
    return [stored, *({**stored, **{name: value[row] for name, value in given.items()}} for row in range(count))]


def _perturbed(sites: Sites) -> dict[str, Tensor]:
    moved = {}
    for site in sites.designs:
        coordinates = _unconstrained(site, site.value)
        moved[site.name] = site.transform(coordinates + torch.randn_like(coordinates))
    return moved


def _unconstrained(site: DesignSite, value: Tensor) -> Tensor:
    return site.transform.inv(value).detach().clone()


def _nudged(site: DesignSite, value: Tensor) -> Tensor:
    """Return unconstrained coordinates, moved inside where the constraint's map is flat."""
    coordinates = _unconstrained(site, value)
    probe = coordinates.clone().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(site.transform(probe).sum(), probe)
    # Near a bound the map is flat (a sigmoid's slope is below 0.0025 beyond 6) and no gradient gets through; a real
    # line or a positive value has slopes of its own size, however far out.
    flat = (coordinates.abs() > MAX_UNCONSTRAINED) & (slope.abs() < 1e-3 * (1 + value.detach().abs().max()))
    if value.shape == coordinates.shape and flat.any():
        elements = zip(element_names(site.name, value.shape), flat.flatten().tolist(), strict=True)
        names = [name for name, is_flat in elements if is_flat]
        coordinates = torch.where(flat, coordinates.sign() * 4.0, coordinates)
        warnings.warn(
            f"design {', '.join(names[:8])} starts at a bound of {site.constraint}, where no gradient moves it: nudged "
            "inside. Start it further from the bound.",
            stacklevel=5,
        )
    return coordinates


def _check_objective(objective: Any) -> None:
    bound = getattr(objective, "bound", None)
    if not callable(objective) or bound is None:
        raise TypeError(
            "objective: expected a callable (sample, density) -> terms with an attribute `bound`, such as "
            f"barber_agakov, got {objective!r}."
        )
    if bound == "upper":
        raise ValueError(
            "objective: an upper bound is no objective to ascend, since the density would be driven to loosen it. "
            "Ascend a lower bound such as barber_agakov."
        )


def _store(sites: Sites, designs: Mapping[str, Tensor]) -> None:
    """Leave the best design where Pyro users look for it: in the parameter store, or in the module that owns it."""
    store = pyro.get_param_store()
    with torch.no_grad():
        for site in sites.designs:
            if site.leaf is not None:
                # In place, so that a module or an optimiser that holds the leaf sees the new value.
                site.leaf.copy_(site.transform.inv(designs[site.name]))
            if site.in_store and site.name not in store:
                store.setdefault(site.name, designs[site.name].clone(), site.constraint)
