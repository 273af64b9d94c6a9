r"""Linear regression with Gaussian priors and noise: every information quantity in closed form.

The experiment observes :math:`y = X \theta + \varepsilon` with :math:`\theta_j \sim N(0, s_j^2)` independent,
:math:`\varepsilon_i \sim N(0, \sigma^2)`; the design is the matrix :math:`X` (num_observations x num_parameters).
With :math:`S = \operatorname{diag}(s^2)`,

.. math::
    \mathrm{EIG}(X) = \tfrac12 \log\det\left(I + X S X^\top / \sigma^2\right), \qquad
    \theta \mid y \sim N\left(\Sigma X^\top y / \sigma^2, \Sigma\right), \quad
    \Sigma^{-1} = S^{-1} + X^\top X / \sigma^2 .

Two relatives follow: the A/B test of the Pyro tutorials, whose design is how many of ten rows go to group one, and a
model with a nuisance on which the prior of the target depends.

References:
    K. Chaloner and I. Verdinelli (1995), Bayesian experimental design: a review. Statistical Science 10, section 2.
    A. Foster et al. (2019), Variational Bayesian optimal experimental design. NeurIPS, section 6.1.
"""

import math
from collections.abc import Callable, Sequence

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

DEFAULT_DESIGN = ((1.0, 0.0), (0.0, 1.0), (0.0, 1.0))
DEFAULT_PRIOR_SCALES = (1.0, 1.5)
DEFAULT_NOISE_SCALE = 1.0

#: EIG of the default design, 0.5 log 2 + 0.5 log 5.5 nats.
DEFAULT_EIG = 0.5 * math.log(2.0) + 0.5 * math.log(5.5)

AB_TEST_NUM_OBSERVATIONS = 10
AB_TEST_PRIOR_SCALES = (10.0, 1.0 / 0.55)

#: EIG in nats of the A/B test with 0, 1, ..., 10 of its ten rows in group one.
AB_TEST_EIG = (
    1.76403029,
    4.02053885,
    4.30776779,
    4.44550051,
    4.5152909,
    4.54022926,
    4.52673259,
    4.47143082,
    4.35776522,
    4.13173238,
    3.45437739,
)

#: EIG in nats about the target "theta" of `dependent_nuisance`: prior variance 2, posterior variance 1/2.
DEPENDENT_NUISANCE_EIG = 0.5 * math.log(4.0)


def linear_gaussian(
    design: Float[Tensor, "num_observations num_parameters"] | None = None,
    *,
    prior_scales: Sequence[float] = DEFAULT_PRIOR_SCALES,
    noise_scale: float = DEFAULT_NOISE_SCALE,
) -> Callable[[], Tensor]:
    """Make the model of one regression experiment, with sites "xi" (design), "theta" (target) and "y" (outcome).

    Args:
        design: initial value of the parameter "xi", a column for each coefficient; default `DEFAULT_DESIGN`.
        prior_scales: prior standard deviation of each coefficient.
        noise_scale: standard deviation of the noise.

    Example:
        >>> import pyro
        >>> model = linear_gaussian()
        >>> model().shape, pyro.param("xi").shape
        (torch.Size([3]), torch.Size([3, 2]))
    """
    initial = torch.tensor(DEFAULT_DESIGN) if design is None else design
    scales = torch.as_tensor(prior_scales, dtype=initial.dtype, device=initial.device)
    if initial.shape[-1] != len(scales):
        raise ValueError(f"the design needs one column for each of the {len(scales)} prior scales, got {initial.shape}")

    def model() -> Tensor:
        xi = pyro.param("xi", lambda: initial.clone())
        theta = pyro.sample("theta", dist.Normal(torch.zeros_like(scales), scales).to_event(1))
        # A sum instead of a matrix product, because it broadcasts over a batch of parameters and of designs alike.
        mean = (xi * theta.unsqueeze(-2)).sum(-1)
        return pyro.sample("y", dist.Normal(mean, noise_scale).to_event(1))

    return model


def exact_eig(
    design: Float[Tensor, "*batch num_observations num_parameters"],
    *,
    prior_scales: Sequence[float] = DEFAULT_PRIOR_SCALES,
    noise_scale: float = DEFAULT_NOISE_SCALE,
) -> Float[Tensor, "*batch"]:
    """Compute the EIG of design matrices, in nats, double precision; scales as in `linear_gaussian`.

    Example:
        >>> round(exact_eig(torch.tensor(DEFAULT_DESIGN)).item(), 7)
        1.1989476
    """
    scaled = design.double() * torch.as_tensor(prior_scales, dtype=torch.double, device=design.device) / noise_scale
    # The smaller of the two Gram matrices would do; the one over observations is the one of the formula above.
    identity = torch.eye(design.shape[-2], dtype=torch.double, device=design.device)
    return 0.5 * torch.logdet(identity + scaled @ scaled.mT)


def exact_posterior(
    observations: Float[Tensor, "*batch num_observations"],
    design: Float[Tensor, "num_observations num_parameters"],
    *,
    prior_scales: Sequence[float] = DEFAULT_PRIOR_SCALES,
    noise_scale: float = DEFAULT_NOISE_SCALE,
) -> tuple[Float[Tensor, "*batch num_parameters"], Float[Tensor, "num_parameters num_parameters"]]:
    """Compute the Gaussian posterior of the coefficients; scales as in `linear_gaussian`.

    Returns:
        The posterior mean of each outcome, and the covariance, which all outcomes share.

    Example:
        >>> mean, covariance = exact_posterior(torch.tensor([1.0, 2.0, 4.0]), torch.tensor(DEFAULT_DESIGN))
        >>> mean, covariance.diagonal()
        (tensor([0.5000, 2.4545]), tensor([0.5000, 0.4091]))
    """
    scales = torch.as_tensor(prior_scales, dtype=design.dtype, device=design.device)
    precision = torch.diag(scales**-2) + design.mT @ design / noise_scale**2
    covariance = torch.linalg.inv(precision)
    mean = observations @ design @ covariance / noise_scale**2
    return mean, covariance


def ab_test_design(num_in_group_one: int) -> Float[Tensor, "10 2"]:
    """Make the indicator matrix of an A/B test with ten participants, 0 to 10 of them in group one, the others in two.

    Its model is ``linear_gaussian(ab_test_design(n), prior_scales=AB_TEST_PRIOR_SCALES)`` and its EIG
    ``AB_TEST_EIG[n]``.

    Example:
        >>> ab_test_design(3).sum(0)
        tensor([3., 7.])
    """
    if not 0 <= num_in_group_one <= AB_TEST_NUM_OBSERVATIONS:
        raise ValueError(f"num_in_group_one must lie in 0, ..., {AB_TEST_NUM_OBSERVATIONS}, got {num_in_group_one}")
    in_group_one = torch.arange(AB_TEST_NUM_OBSERVATIONS) < num_in_group_one
    return torch.stack([in_group_one, ~in_group_one], dim=-1).to(torch.get_default_dtype())


def dependent_nuisance() -> Callable[[], Tensor]:
    r"""Make a model that observes the sum of a target and the nuisance on which the target's prior is centred.

    :math:`u \sim N(0, 1)`, :math:`\theta \mid u \sim N(u, 1)`, :math:`y \sim N(\theta + u, 1)`. Marginally
    :math:`\theta \sim N(0, 2)`, Var(y) = 6 and Cov(:math:`\theta`, y) = 3, so the EIG about "theta" alone is
    `DEPENDENT_NUISANCE_EIG`. The density of the site "theta" given "u" is not the prior of the target: an estimator
    that takes it for one is wrong here. There is no design.
    """

    def model() -> Tensor:
        nuisance = pyro.sample("u", dist.Normal(0.0, 1.0))
        target = pyro.sample("theta", dist.Normal(nuisance, 1.0))
        return pyro.sample("y", dist.Normal(target + nuisance, 1.0))

    return model
