r"""Did the density learn each target, or does it answer with the prior?

A summary network may ignore some of the targets though the outcome tells about them; the bound then misses what they
are worth, and nothing in the loss says so. Per packed target coordinate, over simulated experiments, two shares of the
prior variance are compared:

.. math::
    R^2_q = 1 - \frac{\mathbb{E}\,(\theta - \mathbb{E}_q[\theta \mid y])^2}{\operatorname{Var} \theta}, \qquad
    R^2_{\text{probe}} = 1 - \frac{\mathbb{E}\,(\theta - b^\top f(y))^2}{\operatorname{Var} \theta},

what the learned posterior's mean explains, and what a ridge regression on plain features of the outcome explains on
held out experiments: its entries and their squares and, where rows are exchangeable, their moments. A target is called
*collapsed* where the probe finds something, beyond its error, and the posterior knows less than half of it. The
*contraction* :math:`1 - \mathbb{E} \operatorname{Var}_q(\theta \mid y) / \operatorname{Var} \theta` goes along: near
zero the posterior is as wide as the prior.

References:
    M. Betancourt (2018), Calibrating model-based inferences and decisions, section 4 (contraction).
    G. Alain and Y. Bengio (2016), Understanding intermediate layers using linear classifier probes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.checks import warn
from pyro_voed.densities import StandardisedDensity
from pyro_voed.estimators.summarising import Rows, exchangeable_rows
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.packing import JointSample
from pyro_voed.results import CollapseCheck, element_names
from pyro_voed.summaries import row_moments

NUM_EXPERIMENTS, NUM_DRAWS = 2_000, 50
MOST_ENTRIES = 128
"""Outcomes of more entries are probed by the moments of their rows alone, if they have exchangeable ones."""
RIDGE = 1e-2


def collapse_of(experiment: Experiment, density: Any, sample: JointSample) -> CollapseCheck:
    """Compare what a density of the targets and what a probe know of each, on simulated experiments."""
    theta = sample.theta.reshape(-1, sample.theta.shape[-1])
    context = sample.context().reshape(len(theta), -1)
    y = sample.y.reshape(len(theta), -1)
    with torch.no_grad():
        draws = density.condition(context).sample((NUM_DRAWS,))
        variance = theta.var(0)
        contraction = 1.0 - draws.var(0) / variance
        recovered, recovered_error = _explained(theta, draws.mean(0))
        probed, probed_error = _explained(*_probe(theta, probe_features(y, exchangeable_rows(experiment))))
    found = probed > torch.maximum(5.0 * probed_error, torch.full_like(probed, 0.05))
    collapsed = found & (recovered < 0.5 * probed)
    columns = target_columns(experiment)
    return CollapseCheck(
        columns=columns,
        contraction=contraction.mean(0),
        contraction_standard_error=contraction.std(0) / len(theta) ** 0.5,
        recovered=recovered,
        recovered_standard_error=recovered_error,
        probed=probed,
        probed_standard_error=probed_error,
        collapsed=tuple(name for name, flag in zip(columns, collapsed.tolist(), strict=True) if flag),
    )


def warn_of_collapse(check: CollapseCheck) -> None:
    """Warn, naming the targets that stayed at the prior."""
    if check.collapsed:
        shown = ", ".join(check.collapsed[:12]) + (" ..." if len(check.collapsed) > 12 else "")
        warn(
            f"the learned posterior hardly knows {shown}, of which a linear regression on plain features of the "
            "outcome explains more than twice as much: the summary ignores them, and the bound misses what they are "
            "worth. Leave summary= out for one picked from the outcome's shape, or take one with moments; or train for "
            "longer."
        )


def checked_for_collapse(experiment: Experiment, density: Any, sample: JointSample) -> CollapseCheck | None:
    """Check on fresh simulations that a density's summary ignores no target, and warn; None where it has no summary."""
    if not isinstance(density, StandardisedDensity) or density.summary is None:
        return None
    with torch.no_grad(), pyro.validation_enabled(False):
        check = collapse_of(experiment, density, sample)
    warn_of_collapse(check)
    return check


def target_columns(experiment: Experiment) -> tuple[str, ...]:
    """Return names of the packed target coordinates."""
    names: list[str] = []
    for site in experiment.targets:
        elements = element_names(site.name, site.shape)
        whole = len(elements) == site.packed_dim
        names += elements if whole else element_names(f"{site.name} coordinate", torch.Size([site.packed_dim]))
    return tuple(names)


def probe_features(y: Float[Tensor, "num y_dim"], sets: Sequence[Rows]) -> Float[Tensor, "num num_features"]:
    """Return plain features of outcomes, standardised."""
    scale = y.std(0)
    standardised = (y - y.mean(0)) / torch.where(scale > 0, scale, 1.0)
    features = [] if y.shape[1] > MOST_ENTRIES else [standardised, standardised.square()]
    for rows in sets:
        entries = rows.entries.to(y.device)
        cross = 1 < entries.shape[1] <= 16
        features.append(row_moments(standardised[:, entries.flatten()].unflatten(1, entries.shape), cross=cross))
    if not features:
        features = [standardised]
    joined = torch.cat(features, 1)
    spread = joined.std(0)
    return (joined - joined.mean(0)) / torch.where(spread > 0, spread, 1.0)


def _probe(
    theta: Float[Tensor, "num dim"], features: Float[Tensor, "num num_features"]
) -> tuple[Float[Tensor, "held dim"], Float[Tensor, "held dim"]]:
    """Return targets of the held-out half, and what a ridge regression on the other half says of them."""
    half = len(theta) // 2
    x, centre = features[:half].double(), theta[:half].double().mean(0)
    gram = x.mT @ x + RIDGE * half * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weights = torch.linalg.solve(gram, x.mT @ (theta[:half].double() - centre))
    return theta[half:], (features[half:].double() @ weights + centre).to(theta)


def _explained(truth: Float[Tensor, "num dim"], guess: Float[Tensor, "num dim"]) -> tuple[Tensor, Tensor]:
    """Return the share of the variance explained, and its standard error by the delta method."""
    error, centred = (truth - guess).square(), (truth - truth.mean(0)).square()
    ratio = error.mean(0) / centred.mean(0)
    residual = (error - ratio * centred) / centred.mean(0)
    return 1.0 - ratio, residual.std(0) / len(truth) ** 0.5
