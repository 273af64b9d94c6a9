"""Did a trained posterior learn each target? The check that training ends with, for any result and as often as wanted.

What is computed stands in `pyro_voed.estimators.collapse`.

References:
    M. Betancourt (2018), Calibrating model-based inferences and decisions, section 4 (contraction).
"""

from __future__ import annotations

from dataclasses import replace

import pyro
import torch

from pyro_voed.checks import check_count
from pyro_voed.estimators.collapse import NUM_EXPERIMENTS, collapse_of
from pyro_voed.experiment.caller_state import isolated
from pyro_voed.experiment.designs import pack_designs
from pyro_voed.experiment.sampling import sample_joint
from pyro_voed.inference.flow import DesignIndex, trained_density
from pyro_voed.results import CollapseCheck, DesignResult, EIGResult


def collapse_check(
    result: EIGResult | DesignResult,
    num_simulations: int = NUM_EXPERIMENTS,
    *,
    design_index: DesignIndex = None,
    seed: int | None = None,
) -> CollapseCheck:
    """Compare what the trained posterior knows of each target with what a plain regression does.

    Args:
        result: What `eig_flow` or `optimise_design` returned, with a summary or without.
        num_simulations: Experiments to simulate, at least 20; the regression is fitted to half of them.

    Returns:
        For each packed target coordinate the contraction, and what posterior mean and regression explain.

    Example:
        >>> from pyro_voed import Fresh, eig_flow
        >>> from pyro_voed.problems.linear_gaussian import linear_gaussian
        >>> result = eig_flow(linear_gaussian(), "y", "theta", training=Fresh(num_steps=200), seed=0)
        >>> collapse_check(result, seed=0).collapsed
        ()
    """
    check_count(num_simulations, "num_simulations", minimum=20)
    trained = trained_density(result, design_index)
    with isolated(seed), torch.no_grad(), pyro.validation_enabled(False):
        sample = sample_joint(trained.experiment, num_simulations, trained.designs)
        if trained.density.context_dim > sample.y.shape[-1]:
            sample = replace(sample, designs=pack_designs(trained.experiment, trained.designs))
        return collapse_of(trained.experiment, trained.density, sample)
