r"""Starts by exchange: entries of a design are swapped while a stand-in for the information rises.

Replicated measurements and sensors that could stand in for each other make many local optima, out of which no gradient
leads: with two entries at one place and five at another, the optimum may have three and four. An exchange of entries
leads from one to the other in a step. It needs the information of many designs, for which a stand-in is enough: targets
are regressed on outcomes and their squares, by a few hundred simulations of each design, and

.. math:: \tfrac12 \log\det \operatorname{Cov}(\theta) - \tfrac12 \log\det \operatorname{Cov}(\theta - \hat\theta(y))

is what a Gaussian posterior with the predicted mean learns: a lower bound where the prior is Gaussian, but for the
error of estimation, and exact in linear-Gaussian experiments. In each round some exchanges are drawn: an entry takes
the value of another one or a new one, or a row of a matrix does. The best is made if it is better.

References:
    Fedorov (1972), "Theory of optimal experiments"; Meyer and Nachtsheim (1995), "The coordinate-exchange algorithm for
    constructing exact optimal experimental designs", Technometrics 37.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_voed.design.coordinates import coordinate_shape, from_coordinates, in_interval, to_coordinates
from pyro_voed.design.cost import Cost
from pyro_voed.design.projection import Projection
from pyro_voed.design.starts import EDGE
from pyro_voed.experiment.caller_state import common_stream
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.sampling import draw_joint
from pyro_voed.experiment.sites import DesignSite

SIMULATIONS = 256
NEIGHBOURS = 32
MOST_ROUNDS = 40
PATIENCE = 5
"""Rounds without a better exchange that end it."""

RIDGE = 1e-6


def swapped(
    experiment: Experiment, start: Mapping[str, Tensor], projection: Projection | None, cost: Cost | None
) -> dict[str, Tensor]:
    """Return a start after exchanges of its entries, for an experiment that runs many designs together."""
    sites = experiment.designs
    present, stale = to_coordinates(sites, start), 0
    for _ in range(MOST_ROUNDS):
        rows = torch.stack([present, *(_neighbour(sites, present) for _ in range(NEIGHBOURS))])
        designs = from_coordinates(sites, rows)
        designs = designs if projection is None else projection.of_rows(designs)
        try:
            worth = _told(experiment, designs)
        except (ArithmeticError, RuntimeError, ValueError):
            break  # the model cannot be run at one of them, to which a climb may never come
        if cost is not None:
            costs = cost.at_rows(designs, {site.name: site.value.shape for site in sites}, len(rows))
            worth = cost.worth(worth, costs.to(worth))
        best = int(worth.nan_to_num(nan=-torch.inf).argmax())
        stale = stale + 1 if best == 0 else 0
        if stale == PATIENCE:
            break
        present = to_coordinates(sites, {name: value[best] for name, value in designs.items()})
    # At an end, where no gradient leads away, a climb cannot start.
    inside = torch.where(in_interval(sites).to(present.device), present.clamp(EDGE, 1.0 - EDGE), present)
    return from_coordinates(sites, inside)


def _neighbour(sites: Sequence[DesignSite], x: Float[Tensor, " dim"]) -> Float[Tensor, " dim"]:
    """Draw an exchange: one entry, or one row of a matrix, takes the values of another or new ones."""
    counts = [coordinate_shape(site).numel() for site in sites]
    first = [0, *torch.tensor(counts).cumsum(0).tolist()]
    low, high = list(pairwise(first))[int(torch.multinomial(torch.tensor(counts).double(), 1))]
    site = sites[first.index(low)]
    shape = coordinate_shape(site)
    width = shape[-1] if len(shape) > 1 and torch.rand(()) < 0.5 else 1
    places = torch.randint((high - low) // width, (2,))
    one, other = (slice(low + width * int(place), low + width * (int(place) + 1)) for place in places)
    changed = x.clone()
    if one != other and torch.rand(()) < 0.5:
        changed[one] = x[other]
    else:
        bounded = in_interval([site])[0]
        changed[one] = torch.rand_like(x[one]) if bounded else x[one] + torch.randn_like(x[one])
    return changed


@torch.no_grad()
def _told(experiment: Experiment, designs: Mapping[str, Tensor]) -> Float[Tensor, " num"]:
    """Return the stand-in for the information of `(num, *shape)` designs, on the same random numbers."""
    with common_stream(int(torch.randint(2**31 - 1, ()).item())):
        sample = draw_joint(experiment, SIMULATIONS, designs)
    theta, y = (value.double().transpose(0, 1) for value in (sample.theta, sample.y))  # (num, SIMULATIONS, dim)
    theta, y = theta - theta.mean(1, keepdim=True), _standard(y)
    features = torch.cat([y, _standard(y.square())], -1) if 16 * y.shape[-1] <= SIMULATIONS else y
    gram = features.mT @ features + RIDGE * SIMULATIONS * torch.eye(features.shape[-1]).to(features)
    left = theta - features @ torch.linalg.solve(gram, features.mT @ theta)
    freedom = SIMULATIONS - 1 - features.shape[-1]
    return 0.5 * (torch.logdet(theta.mT @ theta / (SIMULATIONS - 1)) - torch.logdet(left.mT @ left / freedom))


def _standard(values: Tensor) -> Tensor:
    values = values - values.mean(1, keepdim=True)
    return values / values.square().mean(1, keepdim=True).sqrt().clamp_min(1e-12)


def can_swap(experiment: Experiment) -> bool:
    """Whether the stand-in can be computed: designs run together, and outcomes are few enough to regress on."""
    return experiment.takes_design_rows and 4 * experiment.y_dim <= SIMULATIONS
