"""What the estimators with a learnt density share: its sizes, its scales, its training and its evaluation.

A density is trained either on fresh simulations every step or, where simulations are dear, on a pool of them; then its
terms are averaged over simulations that took no part in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_voed.checks import check_count, check_positive, warn
from pyro_voed.densities import (
    StackedDensity,
)
from pyro_voed.experiment.simulate import (
    JointSample,
    batch_shape,
    design_batch_shape,
    draw_joint,
    flat_designs,
    non_finite_sites,
    sample_joint,
)
from pyro_voed.experiment.sites import Experiment, Site
from pyro_voed.monte_carlo import controlled_terms
from pyro_voed.results import FitHistory, element_names
from pyro_voed.training.ascent import Ascent
from pyro_voed.training.loop import fit_fresh, fit_pool

Terms = Callable[[JointSample, Any], Tensor]
"""An objective: terms of shape `(num_samples, *design_batch)` from a sample and a density."""

EVALUATION_CHUNK = 8_192
CHUNK_ENTRIES = 2**22
"""Most entries of the outcome in one chunk of an evaluation: a summary may take a hundred times their memory."""
ROWS_OF_A_MEMBER = 64
"""Experiments a step for each member of an ensemble: stacked, larger batches cost in proportion."""
POOL_VERSIONS = 8
"""Sets of outcomes kept for a pool whose experiments were run one by one."""


@dataclass(frozen=True)
class Budget:
    """How much to simulate and to train; None where the estimator chooses.

    Attributes:
        num_simulations: Size of a fixed pool; None for fresh simulations every step.
        num_steps: Exact number of steps on fresh simulations; None to stop when the bound no longer rises. 0 uses a
            density as it is.
        max_steps: Most steps on fresh simulations.
        batch_size: Experiments a step.
        learning_rate: Peak learning rate of the density, or several to choose from.
        num_samples: Fresh experiments (at each design) behind the reported number.
        redraw_outcomes: Draw the outcomes of a pool's forward runs anew for every pass, where that is right.
    """

    num_simulations: int | None
    num_steps: int | None
    max_steps: int
    batch_size: int
    learning_rate: float | tuple[float, ...]
    num_samples: int
    redraw_outcomes: bool = True


def draw_pool(
    experiment: Experiment,
    budget: Budget,
    designs: Mapping[str, Tensor],
    *,
    likelihood: bool,
    prepare: Callable[[JointSample], JointSample] = lambda sample: sample,
    fewest: int = 4,
) -> JointSample | None:
    """Simulate the fixed pool that the budget asks for, None where it asks for fresh simulations or no training.

    Where outcomes are a forward map plus explicit noise the pool can draw its outcomes anew (`refreshed`).
    """
    if budget.num_simulations is None or budget.num_steps == 0:
        return None
    size = max(fewest, budget.num_simulations // design_batch_shape(experiment, designs).numel())
    redraw = budget.redraw_outcomes and experiment.redrawable
    with torch.no_grad():
        pool = sample_joint(experiment, size, designs, likelihood=likelihood, redraw=redraw)
        if pool.redraw is not None and not experiment.program.vectorised:
            # A trace for every experiment is slow to draw from: a few whole versions, then their traces can go.
            versions = [pool.redraw() for _ in range(POOL_VERSIONS)]
            pool = replace(pool, redraw=lambda: versions[int(torch.randint(len(versions), ()))])
        return prepare(pool)


def refresher(
    pool: JointSample, prepare: Callable[[JointSample], JointSample] = lambda sample: sample
) -> Callable[[JointSample], JointSample] | None:
    """Return what gives a part of the pool new outcomes, None where the pool cannot draw them."""
    if pool.redraw is None:
        return None

    def refresh(part: JointSample) -> JointSample:
        assert part.redraw is not None  # the pool has it, and a part keeps it
        with torch.no_grad():
            # The part's own way of drawing is kept for the next pass.
            return replace(prepare(part.redraw()), redraw=part.redraw)

    return refresh


def train_density(
    experiment: Experiment,
    density: nn.Module,
    terms: Terms,
    budget: Budget,
    designs: Mapping[str, Tensor] | None,
    *,
    likelihood: bool,
    prepare: Callable[[JointSample], JointSample] = lambda sample: sample,
    pool: JointSample | None = None,
    draw: Callable[[], JointSample] | None = None,
    begin: Callable[[JointSample], None] = lambda training: None,
    progress: bool | None,
    description: str,
) -> FitHistory:
    """Train a density on fresh simulations or on the pool; with validation of distributions off, as it is costly.

    Before it learns from a pool, `begin` gets the part of it that is learnt from.
    """
    ascent = Ascent([weights_group(density, budget.learning_rate)])
    objective = lambda sample: terms(sample, density)  # noqa: E731
    common: dict[str, Any] = {"explain": explain_terms, "progress": progress, "description": description}
    density.train()
    with pyro.validation_enabled(False):
        if pool is not None:
            rows = max(1, budget.batch_size // math.prod(pool.theta.shape[1:-1]))
            own: dict[str, Any] = {"batch_size": rows, "refresh": refresher(pool, prepare), "begin": begin}
            history = fit_pool(pool, objective, ascent, **own, **common)
        else:
            plain = draw or (lambda: draw_training(experiment, budget.batch_size, designs, likelihood=likelihood))

            def prepared() -> JointSample:
                with torch.no_grad():
                    return prepare(plain())

            steps: dict[str, Any] = {"num_steps": budget.num_steps, "max_steps": budget.max_steps}
            history = fit_fresh(prepared, objective, ascent, **steps, **common)
    density.eval()
    return history


def weights_group(density: nn.Module, learning_rate: float | tuple[float, ...]) -> dict[str, Any]:
    """Return the parameter group of a density for `Ascent`; rates of a stack are those of its members in turn."""
    weights = [parameter for parameter in density.parameters() if parameter.requires_grad]
    rates = (learning_rate,) if isinstance(learning_rate, float | int) else learning_rate
    group: dict[str, Any] = {"params": weights, "lr": max(rates)}
    if isinstance(density, StackedDensity):
        group["members"] = density.num_members
        if len(rates) > 1:
            factors = torch.tensor(rates).repeat_interleave(density.num_members // len(rates)) / max(rates)
            group["factors"] = factors
    return group


def explain_terms(sample: JointSample) -> str:
    """Say what in a sample is not finite, for an error about its terms."""
    return non_finite_sites(sample) or "All sites are finite, so it is the density: try a smaller learning rate."


def draw_training(
    experiment: Experiment, batch_size: int, designs: Mapping[str, Tensor] | None, *, likelihood: bool
) -> JointSample:
    """Simulate one minibatch at designs known to be right; over a batch of them, at some drawn at random from it."""
    designs = experiment.design_values if designs is None else designs
    batch = batch_shape(experiment, designs)
    if not batch:
        return draw_joint(experiment, batch_size, designs, likelihood=likelihood)
    flat = flat_designs(experiment, designs)
    # Where designs are looped over, every further design costs a run of the model.
    members = batch_size if experiment.program.design_singletons is not None else min(8, batch_size)
    chosen = torch.randint(batch.numel(), (members,), device=experiment.device)
    own = {name: value[chosen] for name, value in flat.items()}
    return draw_joint(experiment, batch_size // members, own, likelihood=likelihood)


def evaluate_terms(
    experiment: Experiment,
    terms: Callable[[JointSample], Tensor],
    num_samples: int,
    designs: Mapping[str, Tensor] | None,
    *,
    likelihood: bool,
    estimator: str,
    chunk: int = EVALUATION_CHUNK,
) -> tuple[Tensor, Tensor]:
    """Return the terms on fresh simulations, `(num_samples, *design_batch)`, and the range of outcomes `(2, y_dim)`.

    Where sites state their entropy, what their log densities explain of the terms is taken off (`controlled_terms`),
    which leaves the mean and lowers the variance.

    Raises:
        ArithmeticError: If a term is not finite, naming site and count.
    """
    batch = design_batch_shape(experiment, designs or {})
    chunk = max(1, min(chunk, CHUNK_ENTRIES // max(1, experiment.y_dim)) // batch.numel())
    parts, controls, lowest, highest = [], [], [], []
    with torch.no_grad(), pyro.validation_enabled(False):
        for start in range(0, num_samples, chunk):
            size = min(chunk, num_samples - start)
            sample = sample_joint(experiment, size, designs, likelihood=likelihood, controls=True)
            values = terms(sample)
            if not torch.isfinite(values).all():
                bad = int((~torch.isfinite(values)).sum())
                raise ArithmeticError(
                    f"{estimator}: {bad} of {values.numel()} terms of the evaluation are not finite. "
                    f"{explain_terms(sample)}"
                )
            parts.append(values)
            assert sample.controls is not None  # asked for above
            controls.append(sample.controls)
            y = sample.y.reshape(-1, sample.y.shape[-1])
            lowest.append(y.amin(0))
            highest.append(y.amax(0))
    terms_left = controlled_terms(torch.cat(parts), torch.cat(controls))
    return terms_left, torch.stack([torch.stack(lowest).amin(0), torch.stack(highest).amax(0)])


def default_budget(
    experiment: Experiment,
    batch: torch.Size,
    *,
    num_simulations: int | None,
    num_steps: int | None,
    max_steps: int,
    batch_size: int | None,
    learning_rate: float | tuple[float, ...],
    num_samples: int | None,
    ensemble: bool = False,
) -> Budget:
    """Fill in what was left open from the model's dimensions and the way it runs."""
    single_runs = not experiment.program.vectorised
    if num_simulations is None and num_steps is None and single_runs:
        num_simulations = 10_000
    if batch_size is None and ensemble:
        batch_size = ROWS_OF_A_MEMBER * batch.numel()
    if batch_size is None:
        batch_size = 256 if not batch or num_simulations is not None else min(2_048, max(256, 16 * batch.numel()))
    if num_samples is None:
        num_samples = 2_000 if single_runs else max(2_000, 20_000 // batch.numel())
    return Budget(num_simulations, num_steps, max_steps, batch_size, learning_rate, num_samples)


def check_sizes(
    num_simulations: int | None,
    num_steps: int | None,
    max_steps: int,
    batch_size: int | None,
    learning_rate: float,
    num_samples: int | None,
) -> None:
    """Raise where a size that a user may give is out of range."""
    sizes = {"num_simulations": (num_simulations, 20), "num_steps": (num_steps, 0), "batch_size": (batch_size, 2)}
    sizes |= {"num_samples": (num_samples, 2), "max_steps": (max_steps, 1)}
    for name, (value, minimum) in sizes.items():
        if value is not None:
            check_count(value, name, minimum)
    check_positive(learning_rate, "learning_rate")
    if num_simulations is not None and num_steps:
        raise ValueError("give num_simulations (a fixed pool) or num_steps (fresh simulations), not both.")


def check_pilot(experiment: Experiment, pilot: JointSample) -> None:
    """Warn of target and outcome elements that hardly vary in the pilot.

    Raises:
        ArithmeticError: If a value is not finite, naming the site.
    """
    broken = non_finite_sites(pilot)
    if broken:
        raise ArithmeticError(f"in {pilot.num_samples} simulations before training {broken}. Check the model there.")
    for role, members in (("target", experiment.targets), ("outcome", experiment.observations)):
        for site in members:
            constant = _constant_elements(site, pilot.values[site.name].flatten(0, pilot.theta.dim() - 2))
            if constant:
                consequence = "nothing can be learnt about it" if role == "target" else "it tells nothing"
                warn(
                    f"{role} {', '.join(constant[:8])}{' ...' if len(constant) > 8 else ''} is constant or nearly so "
                    f"in {pilot.num_samples} simulations: {consequence}. Leave it out, or check the model and its "
                    "units.",
                )


def _constant_elements(site: Site, values: Tensor) -> list[str]:
    flat = values.reshape(values.shape[0], -1)
    if site.measured is not None:
        flat = torch.where(site.measured.flatten(), flat, torch.arange(flat.shape[0]).to(flat).unsqueeze(-1))
    spread = flat.to(torch.float64).std(0)
    # Relative to its size, a spread below the resolution of single precision carries no information.
    constant = spread <= 1e-6 * flat.to(torch.float64).abs().mean(0)
    if site.transform is not None and site.packed_dim < site.shape.numel():
        constant &= _free_elements(site, values).cpu()
    return [name for name, flag in zip(element_names(site.name, site.shape), constant.tolist(), strict=True) if flag]


def _free_elements(site: Site, values: Tensor) -> Tensor:
    """Return which elements move with the coordinates; those of a triangular matrix above the diagonal do not."""
    assert site.transform is not None
    coordinates = torch.linspace(0.3, 1.0, site.packed_dim, dtype=values.dtype, device=values.device)
    coordinates = coordinates.reshape(site.transform.inverse_shape(site.shape))
    return (site.transform(coordinates) - site.transform(2.0 * coordinates)).abs().flatten() > 1e-5
