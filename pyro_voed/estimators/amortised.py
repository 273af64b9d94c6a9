r"""Expected information gain over a whole design space from one training run.

One density takes the design as part of its context and is trained at designs drawn from a proposal over the design
space,

.. math::
    \max_\phi\; \mathbb{E}_{\pi(\xi)}\, \mathbb{E}_{p(\theta, y \mid \xi)}\big[\log q_\phi(\theta \mid y, \xi)
    - \log p(\theta)\big].

At every design the bound of Barber and Agakov holds, trained there or not; the standard error is that of the bound,
and how far the bound is from the truth shows in a certificate (`certify`), where the outcome has a density.

Designs in an interval are drawn uniformly, with a uniform angle, or right at the ends, in shares of 0.42, 0.5 and 0.08:
near the ends information often changes fastest, and uniform draws hardly ever fall there.

References:
    Foster, Ivanova, Malik and Rainforth (2021), "Deep adaptive design", on amortisation; Dong et al. (2025).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyro_voed.checks import Labels, check_callable, check_count, check_known
from pyro_voed.densities import SplineCouplingFlow
from pyro_voed.estimators.building import build_posterior
from pyro_voed.estimators.estimate import Terms, estimate
from pyro_voed.estimators.fit import fit_of
from pyro_voed.estimators.posterior import RATE, posterior_terms
from pyro_voed.estimators.summarising import Summary
from pyro_voed.experiment import needs
from pyro_voed.experiment.caller_state import common_stream, isolated
from pyro_voed.experiment.designs import design_batch_shape
from pyro_voed.experiment.experiment import Experiment, as_experiment
from pyro_voed.experiment.packing import JointSample
from pyro_voed.experiment.sampling import draw_joint
from pyro_voed.experiment.sites import DesignSite, given_designs
from pyro_voed.results import EIGResult, FitHistory, Learned, experiment_of
from pyro_voed.training.settings import Fresh, check_training

BATCH_SIZE, MAX_STEPS = 1_024, 20_000
EVALUATION_ROWS = 100_000
FEWEST_ROWS, MOST_ROWS = 100, 20_000
AT_THE_ENDS = 0.08
"""Share of the default proposal whose entries all lie at an end of their interval."""
NUM_SURVEYED = 100
"""Designs of the proposal that are looked at first."""
DESIGNS_AT_ONCE = 8
"""Designs in a step where rows cannot have designs of their own, so that every further one costs a run."""

Proposal = Callable[[int], Mapping[str, Tensor]]


@dataclass(frozen=True)
class AmortisedEIG:
    """The expected information gain at any design; made by `amortise_eig`.

    `experiment` is None where it was loaded without its model. `learned` holds the density, which takes outcome and
    design, and its training record, whose bound is the mean over the proposal's designs.
    """

    experiment: Experiment | None
    learned: Learned
    num_simulations: int
    seconds: float

    @property
    def density(self) -> Any:
        """The conditional density."""
        return self.learned.density

    @property
    def history(self) -> FitHistory | None:
        """Training record."""
        return self.learned.history

    def at(
        self, designs: Mapping[str, Any] | None = None, *, num_samples: int | None = None, seed: int | None = None
    ) -> EIGResult:
        """Estimate the expected information gain at designs, on fresh simulations.

        Args:
            designs: As in `eig_flow`; default: the one in the store when the model was resolved.
            num_samples: Experiments at each design. Default: 100,000 shared among the designs, between 100 and 20,000
                each.
            seed: As in `eig_flow`.

        Returns:
            The lower bound in nats with its standard error, of the shape of the design batch.
        """
        if num_samples is not None:
            check_count(num_samples, "num_samples", 2)

        def terms(experiment: Experiment, candidates: dict[str, Tensor]) -> Terms:
            # A density that takes the design as context takes it for a single design too.
            batch = design_batch_shape(experiment, candidates)
            shaped = candidates if batch else {name: value.unsqueeze(0) for name, value in candidates.items()}
            fit = fit_of(experiment, shaped, None, name="amortise_eig", rate=RATE)
            size = num_samples or min(MOST_ROWS, max(FEWEST_ROWS, EVALUATION_ROWS // batch.numel()))
            found = fit.evaluate(lambda sample: posterior_terms(sample, self.density), size)
            learned = replace(self.learned, attains=True, outcome_range=found.outcome_range)
            return Terms(found.terms.reshape(size, *batch), learned)

        question = (experiment_of(self), None, None, designs, seed)
        return estimate(question, terms, name="amortise_eig", bound="lower")

    def __str__(self) -> str:
        over, about = "designs", []
        if self.experiment is not None:
            over, own = ", ".join(self.experiment.design_labels), self.experiment
            about = [f"targets {list(own.target_labels)}, outcomes {list(own.observation_labels)}"]
        lines = [f"expected information gain amortised over {over}", *about, str(self.learned)]
        lines.append(f"{self.num_simulations:,} simulated experiments, {self.seconds:.1f} s")
        return "\n".join(lines)


def amortise_eig(
    model: Callable[..., Any] | Experiment,
    observation_labels: Labels = None,
    target_labels: Labels = None,
    *,
    proposal: Proposal | None = None,
    density: Any = None,
    summary: Summary = None,
    training: Fresh | None = None,
    seed: int | None = None,
    progress: bool | None = None,
) -> AmortisedEIG:
    """Train one density over the whole design space; its result answers for any design in milliseconds.

    Args:
        model: A Pyro program of one experiment with at least one design.
        proposal: Function from a number to that many designs to train at, `(num_designs, *shape)` by label, drawn with
            torch's generator. Default: over intervals, half uniform and half with more draws near the ends.
        density: As in `eig_flow`; that of an earlier amortised result is trained further.
        training: `Fresh(...)`, as in `eig_flow`; default 1,024 experiments a step, each at a design of its own where
            the model allows, and at most 20,000 steps.
        observation_labels, target_labels, summary, seed, progress: As in `eig_flow`.

    Returns:
        An object whose `at(designs)` gives the lower bound there, on fresh simulations.

    Raises:
        ValueError: If the model has no design, or a design has no interval and no proposal is given.

    Example:
        >>> from pyro_voed.problems.nonlinear import nonlinear
        >>> amortised = amortise_eig(nonlinear(), "y", training=Fresh(num_steps=100), seed=0)
        >>> eig = amortised.at({"d": torch.tensor([0.1, 1.0])}, seed=0).eig
        >>> bool(eig[0] < eig[1])
        True
    """
    check_training(training, kinds=(Fresh,))
    if proposal is not None:
        check_callable(proposal, "proposal")
    training = training or Fresh()
    size = training.batch_size or BATCH_SIZE
    training = replace(training, batch_size=size, max_steps=training.max_steps or MAX_STEPS)
    with isolated(seed):
        started = time.perf_counter()
        spent = model.num_calls if isinstance(model, Experiment) else 0
        experiment, _ = as_experiment(model, observation_labels, target_labels)
        for need in (needs.designs, needs.learnable_targets, needs.stated_prior):
            need(experiment, "amortise_eig")
        propose = partial(_spread, experiment.designs) if proposal is None else partial(_checked, experiment, proposal)
        experiment = experiment.laid_out(propose(3))
        with common_stream(0):
            surveyed = propose(NUM_SURVEYED)
        experiment = experiment.surveyed(surveyed)
        members = size if experiment.takes_design_rows else min(DESIGNS_AT_ONCE, size)

        def draw(rows: int) -> JointSample:
            return draw_joint(experiment, max(1, rows // members), propose(min(rows, members)))

        fit = fit_of(
            experiment, experiment.design_values, training, name="amortise_eig", rate=RATE, draw=draw, progress=progress
        )
        pilot = fit.pilot(None, draw=lambda rows: draw(max(size, 2 * rows)))
        discrete = any(site.is_discrete for site in experiment.targets)
        given = _make_flow if density is None and not discrete else density
        build = partial(build_posterior, given, pilot, experiment, summary)
        trained, history, rate = fit.train_best(build, posterior_terms)
        return AmortisedEIG(
            experiment=experiment,
            learned=Learned(trained, of_targets=True, history=history, learning_rate=rate),
            num_simulations=experiment.num_calls - spent,
            seconds=time.perf_counter() - started,
        )


def _make_flow(dim: int, context_dim: int) -> nn.Module:
    # Rectifiers, because designs enter through thresholds and absolute values more often than outcomes do: at a kink of
    # the nonlinear test problem they halved the gap.
    return SplineCouplingFlow(dim, context_dim, num_transforms=4 if dim > 1 else 2, hidden_dim=128, activation=nn.ReLU)


def _spread(sites: Sequence[DesignSite], num_designs: int) -> dict[str, Tensor]:
    return {site.name: _spread_one(site, num_designs) for site in sites}


def _spread_one(site: DesignSite, num_designs: int) -> Tensor:
    ends = site.interval_ends
    if ends is None:
        raise ValueError(
            f"proposal: design '{site.name}' has the constraint {site.constraint}, which is no interval to draw from. "
            "Give a function from a number to that many designs, or a constraint such as "
            "constraints.interval(low, high)."
        )
    places = torch.rand(num_designs, *site.value.shape, dtype=site.value.dtype, device=site.value.device)
    with_angle = 0.5 - 0.5 * torch.cos(math.pi * places)
    kind = torch.rand(num_designs, *(1,) * site.value.dim(), device=site.value.device)
    drawn = torch.where(kind < 0.5, places, with_angle)
    drawn = torch.where(kind < AT_THE_ENDS, places.round(), drawn)
    return ends[0] + (ends[1] - ends[0]) * drawn


def _checked(experiment: Experiment, proposal: Proposal, num_designs: int) -> dict[str, Tensor]:
    drawn = proposal(num_designs)
    check_known(drawn, {site.name: site for site in experiment.designs}, "proposal", "design")
    missing = [site.name for site in experiment.designs if site.name not in drawn]
    if missing:
        raise ValueError(f"proposal: expected designs {list(experiment.design_labels)}, got none of {missing}.")
    given = given_designs(experiment.designs, drawn)
    for site in experiment.designs:
        if given[site.name].shape != (num_designs, *site.value.shape):
            raise ValueError(
                f"proposal: expected '{site.name}' of shape {(num_designs, *site.value.shape)} for {num_designs} "
                f"designs, got {tuple(given[site.name].shape)}."
            )
    return given
