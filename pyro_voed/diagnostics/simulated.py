r"""Simulated experiments with posterior draws for each: what every calibration check is computed from.

For a calibrated posterior, the truth :math:`\theta^\star` of a simulated experiment :math:`(\theta^\star, y)` and draws
:math:`\theta_1, \dots, \theta_L \sim q(\theta \mid y)` are exchangeable. The checks are ways to see that they are not.
`simulate_posteriors` simulates experiments that took no part in training and draws from the trained density for each;
draws of any other method can be put into a `SimulatedPosteriors` by hand.

References:
    S. R. Cook, A. Gelman and D. B. Rubin (2006), Validation of software for Bayesian models using posterior quantiles.
    S. Talts, M. Betancourt, D. Simpson, A. Vehtari and A. Gelman (2018), Validating Bayesian inference algorithms with
    simulation-based calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pyro
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.checks import check_count, check_finite
from pyro_voed.experiment.caller_state import isolated
from pyro_voed.experiment.packing import unpack_targets
from pyro_voed.experiment.sampling import sample_joint
from pyro_voed.inference.flow import DesignIndex, trained_density
from pyro_voed.results import DesignResult, EIGResult, element_names

Quantities = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Test quantities: from target values `(*batch, *shape)` by site to named values `(*batch, *shape)`."""

CHUNK_DRAWS = 2**18


@dataclass(frozen=True)
class SimulatedPosteriors:
    """Simulated experiments: their truths, and posterior draws for each.

    Attributes:
        truths: What the experiments were simulated with.
        draws: Posterior draws of each, independent within an experiment.
        columns: Names of the `dim` quantities.
        y: Packed outcomes; None where unknown.
        log_density: Log posterior density of the truths, nats, in packed coordinates; None where unknown.
        draw_log_density: That of the draws, in the same coordinates.
    """

    truths: Float[Tensor, "num_simulations dim"]
    draws: Float[Tensor, "num_simulations num_draws dim"]
    columns: tuple[str, ...]
    y: Float[Tensor, "num_simulations y_dim"] | None = None
    log_density: Float[Tensor, " num_simulations"] | None = field(default=None, repr=False)
    draw_log_density: Float[Tensor, "num_simulations num_draws"] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        shape = tuple(self.draws.shape)
        if self.draws.dim() != 3 or tuple(self.truths.shape) != (shape[0], shape[-1]):
            raise ValueError(
                "draws: expected shape (num_simulations, num_draws, dim) for truths (num_simulations, dim), got "
                f"{shape} and {tuple(self.truths.shape)}."
            )
        if len(self.columns) != shape[-1]:
            raise ValueError(f"columns: expected {shape[-1]} names, got {len(self.columns)}.")
        for name, values in (("truths", self.truths), ("draws", self.draws)):
            check_finite(values, name)

    @property
    def num_simulations(self) -> int:
        """Simulated experiments."""
        return self.draws.shape[0]

    @property
    def num_draws(self) -> int:
        """Posterior draws of each experiment."""
        return self.draws.shape[1]


def simulate_posteriors(
    result: EIGResult | DesignResult,
    num_simulations: int = 500,
    num_draws: int = 200,
    *,
    quantities: Quantities | None = None,
    design_index: DesignIndex = None,
    seed: int | None = None,
) -> SimulatedPosteriors:
    """Simulate experiments and draw from the trained posterior of each.

    Args:
        result: This and `design_index`: as in `flow_posterior`.
        num_simulations: Experiments, none of which took part in training.
        num_draws: Posterior draws for each.
        quantities: Functions of the targets to check, such as the correlation matrix of a Cholesky factor; default: the
            targets' own elements. Columns that are constant (zeros of a triangular matrix) are left out.

    Returns:
        Truths and draws in the targets' own supports, with the log densities of both in packed coordinates.

    Example:
        >>> from pyro_voed import Fresh, eig_flow
        >>> from pyro_voed.problems.linear_gaussian import linear_gaussian
        >>> result = eig_flow(linear_gaussian(), "y", "theta", training=Fresh(num_steps=100), seed=0)
        >>> simulated = simulate_posteriors(result, 50, 20, seed=0)
        >>> simulated.draws.shape, simulated.columns
        (torch.Size([50, 20, 2]), ('theta[0]', 'theta[1]'))
    """
    check_count(num_simulations, "num_simulations", minimum=2)
    check_count(num_draws, "num_draws", minimum=1)
    trained = trained_density(result, design_index)
    with isolated(seed), torch.no_grad(), pyro.validation_enabled(False):
        sample = sample_joint(trained.experiment, num_simulations, trained.designs)
        context = trained.context(sample.y)
        log_density = trained.density.log_prob(sample.theta, context)
        packed, draw_log_density = [], []
        for part in context.split(max(1, CHUNK_DRAWS // num_draws)):
            theta = trained.density.condition(part).sample((num_draws,))
            packed.append(theta.movedim(0, 1))
            draw_log_density.append(trained.density.log_prob(theta, part).movedim(0, 1))
        named = [
            unpack_targets(trained.experiment, theta, trained.designs) for theta in (sample.theta, torch.cat(packed))
        ]
        if quantities is not None:
            named = [dict(quantities(values)) for values in named]
    columns, truths, draws = _flat(*named)
    return SimulatedPosteriors(truths, draws, columns, sample.y, log_density, torch.cat(draw_log_density))


def _flat(
    truths: Mapping[str, Tensor], draws: Mapping[str, Tensor]
) -> tuple[tuple[str, ...], Float[Tensor, "num_simulations dim"], Float[Tensor, "num_simulations num_draws dim"]]:
    """Return names, truths and draws side by side, without the columns that never vary."""
    names = [element for name, value in truths.items() for element in element_names(name, value.shape[1:])]
    true = torch.cat([value.flatten(1) if value.dim() > 1 else value[:, None] for value in truths.values()], -1)
    drawn = torch.cat([value.flatten(2) if value.dim() > 2 else value[..., None] for value in draws.values()], -1)
    varies = (true != true[:1]).any(0)
    kept = tuple(name for name, keep in zip(names, varies.tolist(), strict=True) if keep)
    return kept, true[:, varies], drawn[..., varies]
