r"""All latent sites of an experiment at one outcome as one vector of real coordinates: what samplers move in.

For latent values :math:`\phi` and the bijections T to their supports, :math:`u = T_\phi^{-1}(\phi)` has the log density

.. math::
    \log p(u, y) = \log p(\phi) + \log \lvert \det \partial\phi / \partial u \rvert + \log p(y \mid \phi, \xi) .

The bijections are those of the run itself, made afresh each time, since the bounds of one site may depend on another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from pyro import distributions as dist
from torch import Tensor

from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.programs import ProgramRun, base_distribution, is_deterministic, run_rows, sample_nodes
from pyro_voed.experiment.scoring import outcome_log_likelihood
from pyro_voed.inference.outcomes import like_simulated
from pyro_voed.inference.reference.conditioned import Conditioned


@dataclass(frozen=True)
class Latents:
    """The latent sites of an experiment at one design and outcome, and how many real coordinates each has."""

    experiment: Experiment
    designs: Mapping[str, Tensor]
    outcome: Mapping[str, Tensor]
    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def run(self, num_rows: int, theta: Float[Tensor, "num_rows dim"] | None = None) -> ProgramRun:
        """Run the model at the outcome, at given coordinates or at draws of the prior."""
        pieces = {} if theta is None else dict(zip(self.names, theta.split(self.sizes, -1), strict=True))
        rows = {name: value.expand(num_rows, *value.shape) for name, value in self.outcome.items()}
        return run_rows(
            self.experiment.program,
            num_rows,
            self.experiment.shapes,
            designs=self.designs,
            row_coordinates=pieces,
            row_values=rows,
        )

    def coordinates(self, run: ProgramRun) -> Float[Tensor, "num_rows dim"]:
        """Return the coordinates of a run's latent sites."""
        return torch.cat([run.unconstrained(name)[0].to(self.experiment.dtype) for name in self.names], -1)

    def log_priors(self, run: ProgramRun) -> dict[str, Float[Tensor, " num_rows"]]:
        """Return the log density of each latent site's coordinates, nats; -inf where the prior has no mass."""
        return {name: _log_prior(run, name) for name in self.names}

    def log_likelihood(self, run: ProgramRun) -> Float[Tensor, " num_rows"]:
        """Return the log density of the outcome, nats; -inf where it is impossible."""
        return outcome_log_likelihood(run, self.experiment)

    def targets(self, theta: Float[Tensor, "num_rows dim"]) -> dict[str, Tensor]:
        """Return the targets' values at given coordinates, `(num_rows, *shape)`, deterministic ones computed."""
        run = self.run(len(theta), theta)
        return {name: run.value(name) for name in self.experiment.target_labels}


def latents_of(case: Conditioned) -> Latents:
    """Return the latent sites of an experiment with its outcome."""
    experiment = case.experiment
    run = run_rows(experiment.program, 1, experiment.shapes, designs=case.designs)
    outcome = like_simulated(experiment, run, case.observed)
    # A replaced prior may draw auxiliary sites and hand their values on as Deltas, which leave nothing to sample.
    names = tuple(
        name
        for name, node in sample_nodes(run.traces[0]).items()
        if name not in outcome and not node["is_observed"] and not _is_fixed(node)
    )
    sizes = tuple(run.unconstrained(name)[0].shape[-1] for name in names)
    return Latents(experiment, case.designs, outcome, names, sizes)


def _log_prior(run: ProgramRun, name: str) -> Tensor:
    log_prob = run.log_prob(name)
    # Rounded off the end of the support a density may be NaN. Elsewhere the check is too strict: sums are rounded too.
    if log_prob.isnan().any():
        log_prob = torch.where(log_prob.isnan(), run.log_prob(name, on_support=True), log_prob)
    # A value that overflowed has density 0, regardless of its infinite Jacobian.
    return torch.where(log_prob > -torch.inf, log_prob + run.unconstrained(name)[1], log_prob)


def _is_fixed(node: Mapping[str, Any]) -> bool:
    return is_deterministic(node) or isinstance(base_distribution(node["fn"]), dist.Delta)
