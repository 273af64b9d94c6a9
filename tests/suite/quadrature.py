r"""Numerics in numpy: information gains of twins by grids, sums and closed forms.

A twin (`Twin`) restates a model in numpy. Its latent sites are independent, and quadrature runs over their normal
scores z, :math:`\theta = F^{-1}(\Phi(z))`, where the trapezoidal rule converges exponentially: with spacing h, a
posterior whose standard deviation in z is s leaves a relative error of about :math:`2 \exp(-2 \pi^2 s^2 / h^2)`.
Each function returns the expected information gain in nats and its error.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from scipy.special import logsumexp, xlogy
from scipy.stats import qmc

Arrays = Mapping[str, np.ndarray]
MOST_ENTRIES = 4_000_000
"""Entries of the largest temporary array."""


@dataclass(frozen=True)
class Twin:
    """A model in numpy, its outcomes packed side by side in the order of their labels.

    Attributes:
        prior: Distribution of each latent site that is not integrated out, frozen; a list of them for a vector.
        outcome: From latents `(num, *shape)` and uniform draws `(num, noise_dim)` to outcomes `(num, y_dim)`.
        noise_dim: Uniform draws that an outcome takes.
        log_likelihood: From latents `(num_latents, *shape)` and outcomes `(num, 1, y_dim)` to `(num, num_latents)`.
        log_joint: Log density of all sites the Pyro program samples, from their values, where it is not the sum of the
            densities of `prior` and `log_likelihood`.
        computed: The packed outcomes from the values of the sampled sites, where outcomes are computed.
    """

    prior: Mapping[str, Any]
    outcome: Callable[[Arrays, np.ndarray], np.ndarray]
    noise_dim: int
    log_likelihood: Callable[[Arrays, np.ndarray], np.ndarray]
    log_joint: Callable[[Arrays], float] | None = None
    computed: Callable[[Arrays], np.ndarray] | None = None

    @property
    def columns(self) -> list[tuple[str, Any]]:
        """The scalar distributions of all sites in a row, with the names of their sites."""
        listed = {name: own if isinstance(own, list) else [own] for name, own in self.prior.items()}
        return [(name, column) for name, columns in listed.items() for column in columns]

    def gathered(self, columns: list[np.ndarray]) -> dict[str, np.ndarray]:
        """Return sites from their columns: scalars `(num,)`, vectors `(num, size)`."""
        found: dict[str, list[np.ndarray]] = {}
        for (name, _), column in zip(self.columns, columns, strict=True):
            found.setdefault(name, []).append(column)
        return {
            name: np.stack(own, axis=-1) if isinstance(self.prior[name], list) else own[0]
            for name, own in found.items()
        }

    def latents(self, uniform: np.ndarray) -> dict[str, np.ndarray]:
        """Return draws of the prior from uniform ones, `(num, number of columns)`."""
        return self.gathered([column.ppf(u) for (_, column), u in zip(self.columns, uniform.T, strict=True)])

    def simulate(self, uniform: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Return latents and outcomes from uniform draws."""
        split = len(self.columns)
        latents = self.latents(uniform[:, :split])
        return latents, self.outcome(latents, uniform[:, split:])

    @property
    def uniform_dim(self) -> int:
        """Uniform draws that an experiment takes."""
        return len(self.columns) + self.noise_dim


def scores(column: Any, num: int, reach: float) -> tuple[np.ndarray, np.ndarray]:
    """Return nodes and weights for one column: its values where it is discrete, else equally spaced normal scores."""
    if hasattr(column.dist, "pmf"):
        low, high = column.support()
        values = np.arange(low, high + 1)
        return values, column.pmf(values)
    z = np.linspace(-reach, reach, num)
    weights = np.exp(-0.5 * z**2)
    upper = z > 0
    nodes = np.where(upper, column.isf(stats.norm.sf(z)), column.ppf(stats.norm.cdf(z)))
    return nodes, weights / weights.sum()


def grid(twin: Twin, sizes: Mapping[str, int], reach: float) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the product grid over all latent sites, `(num, *shape)`, the last site the fastest, and its weights."""
    parts = [scores(column, sizes.get(name, 0), reach) for name, column in twin.columns]
    nodes = np.meshgrid(*(nodes for nodes, _ in parts), indexing="ij")
    weights = np.ones(())
    for _, own in parts:
        weights = np.multiply.outer(weights, own)
    return twin.gathered([axis.ravel() for axis in nodes]), weights.ravel()


def chunks(y: np.ndarray, num_latents: int) -> Iterator[np.ndarray]:
    """Yield outcomes `(num, 1, y_dim)` in pieces that keep temporary arrays small."""
    size = max(1, MOST_ENTRIES // (num_latents * y.shape[-1]))
    for start in range(0, len(y), size):
        yield y[start : start + size, None, :]


def given_targets(log_likelihood: np.ndarray, weights: np.ndarray, num_targets: int) -> tuple[np.ndarray, np.ndarray]:
    """Average the likelihood over nuisances, the fastest axis: `(num, num_targets)` and the weights of the targets."""
    blocks = weights.reshape(num_targets, -1)
    prior = blocks.sum(axis=1)
    if blocks.shape[1] == 1:
        return log_likelihood, prior
    log_likelihood = log_likelihood.reshape(len(log_likelihood), num_targets, -1)
    return logsumexp(log_likelihood, axis=2, b=blocks / prior[:, None]), prior


def num_targets_of(twin: Twin, targets: tuple[str, ...], sizes: Mapping[str, int]) -> int:
    """Return the number of nodes of the targets, which must come first among the sites."""
    assert tuple(twin.prior)[: len(targets)] == targets, "targets come first in a twin"
    columns = [column for name, column in twin.columns if name in targets]
    names = [name for name, _ in twin.columns if name in targets]
    return int(np.prod([len(scores(c, sizes.get(n, 0), 1.0)[0]) for n, c in zip(names, columns, strict=True)]))


def divergences(
    twin: Twin, targets: tuple[str, ...], y: np.ndarray, sizes: Mapping[str, int], reach: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the divergence of the posterior from the prior at each outcome, and the log of its probability."""
    latents, weights = grid(twin, sizes, reach)
    num_targets = num_targets_of(twin, targets, sizes)
    divergence, evidence = [], []
    for piece in chunks(y, len(weights)):
        log_likelihood, prior = given_targets(twin.log_likelihood(latents, piece), weights, num_targets)
        largest = log_likelihood.max(axis=1, keepdims=True)
        joint = np.exp(log_likelihood - largest) * prior
        mass = joint.sum(axis=1)
        # Far from the mode a likelihood may be zero: there the posterior is too.
        shifted = np.where(joint > 0, log_likelihood - largest, 0.0)
        divergence.append((joint * shifted).sum(axis=1) / mass - np.log(mass))
        evidence.append(np.log(mass) + largest[:, 0])
    return np.concatenate(divergence), np.concatenate(evidence)


def averaged(
    twin: Twin,
    targets: tuple[str, ...],
    sizes: Mapping[str, int],
    *,
    log2_draws: int = 13,
    repeats: int = 8,
    reach: float = 5.0,
) -> tuple[float, float]:
    """Average the divergence of the posterior, by quadrature, over outcomes from scrambled Sobol points."""
    means = []
    for seed in range(repeats):
        points = qmc.Sobol(twin.uniform_dim, rng=seed).random_base2(log2_draws)
        y = twin.simulate(np.clip(points, 1e-12, 1 - 1e-12))[1]
        means.append(divergences(twin, targets, y, sizes, reach)[0].mean())
    return float(np.mean(means)), float(np.std(means, ddof=1) / repeats**0.5)


def summed(
    twin: Twin,
    targets: tuple[str, ...],
    y: np.ndarray,
    sizes: Mapping[str, int],
    *,
    log_copies: np.ndarray | float = 0.0,
    reach: float = 6.0,
) -> tuple[float, float]:
    """Sum over all outcomes, `(num, y_dim)`, each standing for several that are equally likely.

    The error is the probability left out, and the difference to a grid of two thirds of the size.
    """
    values = []
    for share in (1.0, 2 / 3):
        smaller = {name: max(2, round(share * size)) for name, size in sizes.items()}
        divergence, evidence = divergences(twin, targets, y, smaller, reach)
        mass = np.exp(evidence + log_copies)
        values.append(((mass * divergence).sum(), abs(1 - mass.sum())))
    (value, left), (coarser, _) = values
    return float(value), float(abs(value - coarser) + 10 * left + 1e-9)


def linear_gaussian(
    rows: np.ndarray, prior_scales: np.ndarray, noise_covariance: np.ndarray, num_targets: int | None = None
) -> tuple[float, float]:
    """Return the closed form for y = rows @ theta + noise: the first coefficients are the targets."""
    num_targets = rows.shape[1] if num_targets is None else num_targets
    scaled = rows * prior_scales
    nuisance = scaled[:, num_targets:]
    given = noise_covariance + nuisance @ nuisance.T
    marginal = given + scaled[:, :num_targets] @ scaled[:, :num_targets].T
    return float(0.5 * (np.linalg.slogdet(marginal)[1] - np.linalg.slogdet(given)[1])), 1e-8


def entropy(probability: np.ndarray) -> np.ndarray:
    """Return the entropy of probabilities along the last axis, nats."""
    return -xlogy(probability, probability).sum(axis=-1)
