"""The Gaussian-Gamma family that the paper compares flows with, as a density of coefficients and log sigma.

The coefficients are normal, with a mean from a network of the outcomes and one learnt Cholesky factor times a scalar
from the network; sigma is Gamma distributed, shape and rate from the network. Given the outcomes they are independent.
"""

import torch
from torch import nn
from torch.distributions import Gamma, MultivariateNormal

from pyro_voed.densities import FlowDistribution, Standardise, StandardisedDensity

HIDDEN_DIM = 64
LEAST_SIGMA = 1e-12


class GaussianGamma(nn.Module):
    """q(w, log sigma given y): the last entry of theta is log sigma, the others are coefficients.

    Args:
        theta_dim: Number of coefficients plus one.
        context_dim: Number of outcomes.
    """

    has_rsample = True

    def __init__(self, theta_dim, context_dim):
        super().__init__()
        self.theta_dim, self.context_dim = theta_dim, context_dim
        num = theta_dim - 1
        self.trunk = nn.Sequential(
            nn.Linear(context_dim, HIDDEN_DIM), nn.ReLU(), nn.Linear(HIDDEN_DIM, HIDDEN_DIM), nn.ReLU()
        )
        self.head = nn.Linear(HIDDEN_DIM, num + 3)
        self.lower = nn.Parameter(torch.zeros(num, num))
        self.log_diagonal = nn.Parameter(torch.zeros(num))

    def parts(self, context):
        """Return the two distributions."""
        raw = self.head(self.trunk(context))
        mean, log_scalar, log_shape, log_rate = raw.split([self.theta_dim - 1, 1, 1, 1], -1)
        factor = self.lower.tril(-1) + self.log_diagonal.exp().diag()
        gaussian = MultivariateNormal(mean, scale_tril=log_scalar.exp().unsqueeze(-1) * factor)
        return gaussian, Gamma(log_shape.squeeze(-1).exp(), log_rate.squeeze(-1).exp())

    def condition(self, context):
        return FlowDistribution(self, context)

    def log_prob(self, theta, context):
        gaussian, gamma = self.parts(context)
        log_sigma = theta[..., -1]
        # The density of log sigma is that of sigma times sigma.
        return gaussian.log_prob(theta[..., :-1]) + gamma.log_prob(log_sigma.exp()) + log_sigma

    def draw(self, context, batch_shape):
        gaussian, gamma = self.parts(context.expand(*batch_shape, self.context_dim))
        # A Gamma of small shape rounds to zero, which has no logarithm.
        log_sigma = gamma.rsample().clamp(min=LEAST_SIGMA).log()
        return torch.cat([gaussian.rsample(), log_sigma.unsqueeze(-1)], -1)


def gaussian_gamma(num_coefficients=20, num_outcomes=20):
    """Make the family for raw targets and raw outcomes; both scalings stay the identity unless they are fitted."""
    density = GaussianGamma(num_coefficients + 1, num_outcomes)
    return StandardisedDensity(density, Standardise(num_coefficients + 1), Standardise(num_outcomes))
