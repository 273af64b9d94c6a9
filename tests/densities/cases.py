"""The densities and critics that the laws are about, at random weights where `randomised`."""

import pyro.distributions as dist
import torch
import zuko
from pyro.distributions import transforms
from pyro.nn import ConditionalDenseNN
from torch import nn

from pyro_voed import densities
from pyro_voed.densities import AffineCouplingFlow, SplineCouplingFlow, Standardise, StandardisedDensity, as_density
from pyro_voed.densities.critics import JointCritic, SeparableCritic, StandardisedCritic

CONTEXT_DIM = 3
MEMBERS = 3
VALUES = [torch.tensor([0.0, 1.0]), torch.tensor([-1.0, 2.0, 5.0])]
SIZES = {"num_transforms": 2, "hidden_dim": 16}


def affine(theta_dim):
    return AffineCouplingFlow(theta_dim, CONTEXT_DIM, **SIZES)


def spline(theta_dim, context_dim=CONTEXT_DIM):
    return SplineCouplingFlow(theta_dim, context_dim, **SIZES, num_bins=5)


def scalings(theta_dim):
    theta, context = torch.randn(50, theta_dim), torch.randn(50, CONTEXT_DIM)
    return Standardise(theta_dim).fit_(0.7 * theta + 0.3), Standardise(CONTEXT_DIM).fit_(2.0 * context - 1.0)


def standardised(theta_dim):
    summary = nn.Linear(CONTEXT_DIM - 1, 4)
    return StandardisedDensity(spline(theta_dim, 4 + 1), *scalings(theta_dim), summary, num_bypass=1)


def zuko_flow(theta_dim, context_dim=CONTEXT_DIM):
    return zuko.flows.NICE(theta_dim, context_dim, hidden_features=(16,))


def pyro_flow(theta_dim, context_dim=CONTEXT_DIM):
    base = dist.Normal(torch.zeros(theta_dim).double(), torch.ones(theta_dim).double()).to_event(1)
    fixed_dim, moved_dim = theta_dim // 2, theta_dim - theta_dim // 2
    network = ConditionalDenseNN(fixed_dim, context_dim, [16], [moved_dim, moved_dim], nonlinearity=nn.Tanh())
    coupling = transforms.ConditionalAffineCoupling(fixed_dim, network)
    cached = transforms.AffineTransform(0.5, 0.8, event_dim=1, cache_size=1)
    return dist.ConditionalTransformedDistribution(base, [coupling, cached, transforms.matrix_exponential(theta_dim)])


def classifier(context_dim=CONTEXT_DIM):
    return densities.Classifier(VALUES, context_dim, hidden_dim=8)


def mixed(context_dim=CONTEXT_DIM):
    # The continuous entry stands between the discrete ones.
    flow = SplineCouplingFlow(1, context_dim + 5, num_transforms=1, hidden_dim=8)
    return densities.MixedDensity(classifier(context_dim), flow, torch.tensor([True, False, True]))


def stacked():
    """Scale by each member's own draws, so that the members' buffers differ too."""
    return densities.StackedDensity([randomised(standardised(2)) for _ in range(MEMBERS)])


def critic(architecture):
    summary = nn.Sequential(nn.Linear(CONTEXT_DIM - 1, 4), nn.Tanh())
    return StandardisedCritic(architecture(2, 4 + 1), *scalings(2), summary, num_bypass=1, with_baseline=True)


OURS = {"affine": affine, "spline": spline}
REAL = {
    **OURS,
    "standardised": standardised,
    "zuko": lambda theta_dim: as_density(zuko_flow(theta_dim), theta_dim, CONTEXT_DIM),
    "pyro": lambda theta_dim: as_density(pyro_flow(theta_dim), theta_dim, CONTEXT_DIM),
}
"""Makers `theta_dim -> density` of real vectors."""

DISCRETE = {"classifier": classifier, "mixed": mixed}
"""Makers `context_dim -> density` of vectors with discrete entries."""

ARCHITECTURES = {"separable": SeparableCritic, "joint": JointCritic}


def randomised(module, size=0.1, dtype=torch.float32):
    """Move away from the start, where last layers are zero and a context has no influence."""
    module = module.to(dtype)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(size * torch.randn_like(weight))
    return module
