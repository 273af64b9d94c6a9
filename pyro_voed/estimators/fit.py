"""From an experiment to a trained density, and its terms on simulations that took no part in training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor, nn

from pyro_voed.densities import StackedDensity
from pyro_voed.experiment.designs import batch_shape, design_batch_shape, flat_designs
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.failures import average_share, failed_share, non_finite_sites
from pyro_voed.experiment.noise import check_noise
from pyro_voed.experiment.packing import JointSample
from pyro_voed.experiment.parameters import checked_draws
from pyro_voed.experiment.pilot import check_pilot
from pyro_voed.experiment.sampling import draw_in_common, draw_joint, sample_joint
from pyro_voed.monte_carlo import controlled_terms
from pyro_voed.results import FitHistory
from pyro_voed.training.ascent import Ascent
from pyro_voed.training.loop import fit_fresh, fit_pool, keeping
from pyro_voed.training.settings import Fresh, Pool, Training, rates_of

Terms = Callable[[JointSample, Any], Tensor]
"""Terms of shape `(num_samples, *design_batch)` from a sample and a density."""

MAX_STEPS = 10_000
EVALUATION_CHUNK = 8_192
CHUNK_ENTRIES = 2**22
"""Most entries of the outcome in one chunk of an evaluation: a summary may take a hundred times their memory."""
COMMON_ENTRIES = 2**23
"""Most entries of targets and outcomes drawn at once on random numbers common to all designs."""
MOST_IN_COMMON = 1_000
"""Designs beyond which one run for all of them, each with random numbers of its own, is so much cheaper."""
ROWS_OF_A_MEMBER = 64
"""Experiments a step for each member of an ensemble: stacked, larger batches cost in proportion."""
POOL_VERSIONS = 8
"""Sets of outcomes kept for a pool whose experiments were run one by one."""
PILOT_SIZE, SMALL_PILOT_SIZE = 1_000, 200
SELECTION_SIZE = 10_000
NUM_CHECKED = 2_000
"""Experiments of an evaluation that are kept for checks of what was learned."""


class Evaluation(NamedTuple):
    """Terms on fresh simulations, `(num_samples, *design_batch)`, range of outcomes, and the first simulations.

    `failed` is the share of runs that failed, `(*design_batch)`, where they may.
    """

    terms: Tensor
    outcome_range: Tensor
    sample: JointSample
    failed: Tensor | None = None


@dataclass(frozen=True)
class Fit:
    """What a density learns from: the simulations of an experiment at one design or a batch.

    `prepare` is applied to simulations before they are learned from; `draw(size)` gives a minibatch, by default
    `draw_training`. `likelihood` and `pairs` say what simulations hold; a pool has at least `fewest` rows.
    """

    experiment: Experiment
    designs: Mapping[str, Tensor]
    training: Training
    rates: tuple[float, ...]
    name: str
    likelihood: bool = False
    pairs: bool = False
    prepare: Callable[[JointSample], JointSample] = lambda sample: sample
    draw: Callable[[int], JointSample] | None = None
    fewest: int = 4
    progress: bool | None = None

    @property
    def trains(self) -> bool:
        """Whether there is anything to train."""
        return not (isinstance(self.training, Fresh) and self.training.num_steps == 0)

    @property
    def batch_size(self) -> int:
        """Experiments a step."""
        assert self.training.batch_size is not None  # filled in by `fit_of`
        return self.training.batch_size

    def pool(self) -> JointSample | None:
        """Simulate the fixed pool, not yet prepared; None where simulations are fresh or there is no training."""
        if not isinstance(self.training, Pool):
            return None
        experiment = self.experiment
        size = max(self.fewest, self.training.num_simulations // design_batch_shape(experiment, self.designs).numel())
        redraw = self.training.redraw_outcomes and experiment.redrawable
        with torch.no_grad():
            simulate = partial(sample_joint, experiment, size, self.designs, likelihood=self.likelihood, redraw=redraw)
            pool = checked_draws(simulate, may_fail=experiment.failures != "error")
            if pool.redraw is not None and not experiment.runs_together:
                # A trace for every experiment is slow to draw from: a few whole versions, then their traces can go.
                versions = [pool.redraw() for _ in range(POOL_VERSIONS)]
                pool = replace(pool, redraw=lambda: versions[int(torch.randint(len(versions), ()))])
            return pool

    def pilot(self, pool: JointSample | None, draw: Callable[[int], JointSample] | None = None) -> JointSample:
        """Return simulations to take scales from, checked: the pool, where there is one."""
        with torch.no_grad():
            if pool is None:
                size = PILOT_SIZE if self.experiment.runs_together else SMALL_PILOT_SIZE
                draw = draw or self._draw
                pool = checked_draws(lambda: draw(size), may_fail=self.experiment.failures != "error")
            pilot = self.prepare(pool)
        check_pilot(self.experiment, pilot)
        check_noise(self.experiment, self.designs)
        return pilot

    def train(
        self,
        density: nn.Module,
        terms: Terms,
        pool: JointSample | None = None,
        *,
        begin: Callable[[JointSample], None] = lambda training: None,
    ) -> FitHistory | None:
        """Train a density in place on fresh simulations or on the pool; None where there is nothing to train.

        Validation of distributions is off, as it is costly. `begin` gets the part of a pool that is learned from. An
        error raises `TrainingStopped`, which holds the density as last trained.
        """
        if not self.trains:
            density.eval()
            return None
        ascent = Ascent([weights_group(density, self.rates)])
        common: dict[str, Any] = {
            "explain": partial(explain_terms, self.experiment),
            "progress": self.progress,
            "description": self.name,
        }
        objective = lambda sample: terms(sample, density)  # noqa: E731
        density.train()
        with keeping(lambda: {"density": density.eval()}), pyro.validation_enabled(False):
            if isinstance(self.training, Pool):
                assert pool is not None  # made by `pool`
                history = self._train_on_pool(pool, objective, ascent, begin, common)
            else:
                history = fit_fresh(
                    lambda: self._prepared(self._draw(self.batch_size)),
                    objective,
                    ascent,
                    num_steps=self.training.num_steps,
                    max_steps=self.training.max_steps or MAX_STEPS,
                    **common,
                )
        density.eval()
        return history

    def _train_on_pool(
        self,
        pool: JointSample,
        objective: Callable[[JointSample], Tensor],
        ascent: Ascent,
        begin: Callable[[JointSample], None],
        common: dict[str, Any],
    ) -> FitHistory:
        assert isinstance(self.training, Pool)

        def refresh(part: JointSample) -> JointSample:
            assert part.redraw is not None  # the pool has it, and a part keeps it
            # The part's own way of drawing is kept for the next pass.
            return replace(self._prepared(part.redraw()), redraw=part.redraw)

        return fit_pool(
            self._prepared(pool),
            objective,
            ascent,
            batch_size=max(self.fewest // 4, self.batch_size // math.prod(pool.theta.shape[1:-1])),
            validation_fraction=self.training.validation_fraction,
            patience=self.training.patience,
            max_epochs=self.training.max_epochs,
            refresh=None if pool.redraw is None else refresh,
            begin=begin,
            **common,
        )

    def train_best(
        self,
        build: Callable[[], nn.Module],
        terms: Terms,
        pool: JointSample | None = None,
        *,
        begin: Callable[[Any, JointSample], None] = lambda density, training: None,
    ) -> tuple[Any, FitHistory | None, Tensor | None]:
        """Train a density with every rate in turn; return the best on other simulations, its history and its rate."""
        found = []
        for rate in self.rates:
            density = build()
            start = lambda training, density=density: begin(density, training)  # noqa: E731
            found.append((density, replace(self, rates=(rate,)).train(density, terms, pool, begin=start)))
        if len(found) == 1:
            return *found[0], None
        with torch.no_grad(), pyro.validation_enabled(False):
            sample = self.selection_sample()
            scores = torch.stack([terms(sample, density).mean() for density, _ in found])
        winner = int(scores.argmax())
        return *found[winner], torch.tensor(self.rates[winner])

    def selection_sample(self) -> JointSample:
        """Simulate experiments on which candidates are compared."""
        size = max(500, SELECTION_SIZE // design_batch_shape(self.experiment, self.designs).numel())
        return self._prepared(sample_joint(self.experiment, size, self.designs, likelihood=self.likelihood))

    def evaluate(
        self,
        terms: Callable[[JointSample], Tensor],
        num_samples: int | None,
        *,
        chunk: int = EVALUATION_CHUNK,
    ) -> Evaluation:
        """Return the terms on fresh simulations, less what log densities of sites of known entropy explain of them."""
        batch = design_batch_shape(self.experiment, self.designs)
        num_samples = num_samples or default_num_samples(self.experiment, batch)
        parts, controls, ranges, kept, failed = [], [], [], None, []
        with torch.no_grad(), pyro.validation_enabled(False):
            for sample in self._evaluation_chunks(num_samples, chunk):
                values = terms(sample)
                if not torch.isfinite(values).all():
                    bad = int((~torch.isfinite(values)).sum())
                    raise ArithmeticError(
                        f"{self.name}: {bad} of {values.numel()} terms of the evaluation are not finite. "
                        f"{explain_terms(self.experiment, sample)}"
                    )
                parts.append(values)
                assert sample.controls is not None  # asked for
                controls.append(sample.controls)
                failed.append(failed_share(sample, left_out=self.experiment.failures == "ignore"))
                y = sample.y.reshape(-1, sample.y.shape[-1])
                ranges.append(torch.stack([y.amin(0), y.amax(0)]))
                kept = sample[: max(1, NUM_CHECKED // batch.numel())] if kept is None else kept
        assert kept is not None  # at least one chunk
        lowest, highest = torch.stack(ranges).unbind(1)
        left = controlled_terms(torch.cat(parts), torch.cat(controls))
        outcome_range = torch.stack([lowest.amin(0), highest.amax(0)])
        return Evaluation(left, outcome_range, kept, average_share(failed))

    def _evaluation_chunks(self, num_samples: int, chunk: int) -> Iterator[JointSample]:
        """Simulate and prepare the experiments of an evaluation, on random numbers common to the designs of a batch."""
        experiment, num_designs = self.experiment, batch_shape(self.experiment, self.designs).numel()
        chunk = max(1, min(chunk, CHUNK_ENTRIES // max(1, experiment.y_dim)) // num_designs)
        options: dict[str, Any] = {"likelihood": self.likelihood, "controls": True}
        if num_designs == 1 or num_designs > MOST_IN_COMMON or self.pairs:
            for start in range(0, num_samples, chunk):
                size = min(chunk, num_samples - start)
                yield self.prepare(draw_joint(experiment, size, self.designs, pairs=self.pairs, **options))
            return
        # A run at each design is worth its while for many rows, more than terms are made of at once.
        entries = num_designs * max(1, experiment.theta_dim + experiment.y_dim)
        block = max(1, COMMON_ENTRIES // entries)
        for start in range(0, num_samples, block):
            size = min(block, num_samples - start)
            drawn = draw_in_common(experiment, size, self.designs, self.prepare, **options)
            for first in range(0, size, chunk):
                yield drawn[first : first + chunk]

    def _prepared(self, sample: JointSample) -> JointSample:
        with torch.no_grad():
            return self.prepare(sample)

    def _draw(self, size: int) -> JointSample:
        if self.draw is not None:
            return self.draw(size)
        return draw_training(self.experiment, size, self.designs, likelihood=self.likelihood)


def fit_of(
    experiment: Experiment,
    designs: Mapping[str, Tensor],
    training: Training | None,
    *,
    name: str,
    rate: float,
    ensemble: bool = False,
    **options: Any,
) -> Fit:
    """Return a fit with what was left open filled in from the model's dimensions and the way it runs.

    Args:
        experiment: The experiment.
        designs: The designs, as the driver hands them to `terms`.
        training: As the user gave it; None is fresh simulations, or a pool where experiments are run one by one.
        name: Name of the estimator.
        rate: Its default learning rate.
        ensemble: Every design has a density of its own.
        **options: Further fields of `Fit`.
    """
    batch = design_batch_shape(experiment, designs)
    if training is None:
        training = Fresh() if experiment.runs_together else Pool()
    if training.batch_size is None:
        size = 256
        if ensemble:
            size = ROWS_OF_A_MEMBER * batch.numel()
        elif batch and isinstance(training, Fresh):
            size = min(2_048, max(256, 16 * batch.numel()))
        training = replace(training, batch_size=size)
    return Fit(experiment, designs, training, rates_of(training, rate), name, **options)


def default_num_samples(experiment: Experiment, batch: Sequence[int]) -> int:
    """Return how many fresh experiments at each design stand behind a reported number."""
    return max(2_000, 20_000 // math.prod(batch)) if experiment.runs_together else 2_000


def draw_training(
    experiment: Experiment, batch_size: int, designs: Mapping[str, Tensor], *, likelihood: bool = False
) -> JointSample:
    """Simulate one minibatch at designs known to be right; over a batch of them, at some drawn at random from it."""
    batch = batch_shape(experiment, designs)
    if not batch:
        return draw_joint(experiment, batch_size, designs, likelihood=likelihood)
    flat = flat_designs(experiment, designs)
    # Where designs are looped over, every further design costs a run of the model.
    members = batch_size if experiment.takes_design_rows else min(8, batch_size)
    chosen = torch.randint(batch.numel(), (members,), device=experiment.device)
    own = {name: value[chosen] for name, value in flat.items()}
    return draw_joint(experiment, batch_size // members, own, likelihood=likelihood)


def weights_group(density: nn.Module, rates: Sequence[float]) -> dict[str, Any]:
    """Return the parameter group of a density for `Ascent`; rates of a stack are those of its members in turn."""
    weights = [parameter for parameter in density.parameters() if parameter.requires_grad]
    group: dict[str, Any] = {"params": weights, "lr": max(rates)}
    if isinstance(density, StackedDensity):
        group["members"] = density.num_members
        if len(rates) > 1:
            group["factors"] = torch.tensor(rates).repeat_interleave(density.num_members // len(rates)) / max(rates)
    return group


def explain_terms(experiment: Experiment, sample: JointSample) -> str:
    """Say what in a sample is not finite, for an error about its terms."""
    return (
        non_finite_sites(experiment, sample)
        or "All sites are finite, so it is the density: try a smaller learning rate."
    )
