"""Draws from a posterior, whatever made them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.printing import posterior_html, posterior_text
from pyro_voed.results import element_names


@dataclass(frozen=True, repr=False)
class PosteriorSample:
    """Draws from the posterior of one outcome, whatever made them.

    Attributes:
        values: Draws of each site, `(num_chains, num_draws, *shape)`.
        observations: The outcome conditioned on.
        method: "NUTS", "SMC", "ABC" or "flow".
        seconds: Wall time.
        r_hat: Split R-hat of each site (SMC: R-hat between runs), `(*shape)`; None for independent draws.
        effective_sample_size: Effective number of draws of each site, `(*shape)`.
        num_divergences: Divergent transitions; None where there are none by construction.
        inference_data: The same as an ArviZ `InferenceData`.
        log_evidence, log_evidence_error: Log of p(y at the design) in the outcome's own coordinates, nats, and its
            standard error; None where not estimated.
        acceptance_rate: Share of proposals (SMC) or simulations (ABC) accepted, one tensor a chain with one entry a
            temperature or population.
        temperatures: Powers of the likelihood that SMC went through, one tensor a chain, the last entry 1.
        tolerance: Largest distance accepted by ABC, in standardised statistics.
        num_simulations: Runs of the model, in experiments; None where they are not counted.
    """

    values: Mapping[str, Tensor]
    observations: Mapping[str, Tensor]
    method: str
    seconds: float
    effective_sample_size: Mapping[str, Tensor]
    r_hat: Mapping[str, Tensor] | None = None
    num_divergences: int | None = None
    inference_data: Any = field(default=None, repr=False)
    log_evidence: float | None = None
    log_evidence_error: float | None = None
    acceptance_rate: tuple[Tensor, ...] | None = field(default=None, repr=False)
    temperatures: tuple[Tensor, ...] | None = field(default=None, repr=False)
    tolerance: float | None = None
    num_simulations: int | None = None

    def flat(self, name: str) -> Tensor:
        """Return the draws of one site with the chains joined, `(num_chains * num_draws, *shape)`."""
        return self.values[name].flatten(0, 1)

    def matrix(self) -> Float[Tensor, "num_draws dim"]:
        """Return all sites side by side, flattened, in the order of `values`."""
        return torch.cat([self.flat(name).unsqueeze(-1).flatten(1) for name in self.values], dim=-1)

    @property
    def columns(self) -> list[str]:
        """Names of the columns of `matrix`, such as `theta[0]`."""
        return [element for name, draws in self.values.items() for element in element_names(name, draws.shape[2:])]

    def __repr__(self) -> str:
        num_chains, num_draws = next(iter(self.values.values())).shape[:2]
        sites = ", ".join(f"{name} {tuple(draws.shape[2:])}" for name, draws in self.values.items())
        return f"<{self.method} posterior of {sites}: {num_chains} x {num_draws:,} draws>"

    def __str__(self) -> str:
        return posterior_text(self)

    def _repr_html_(self) -> str:
        return posterior_html(self)
