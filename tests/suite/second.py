"""The second method for each model: what stands here shares no formula with `exact`, only the twins.

Nested Monte Carlo averages log p(y given targets) - log p(y), both by evenly spread draws from the prior. Linear
Gaussian models take the canonical correlations of simulated targets and outcomes instead, conjugate ones the divergence
of their posteriors. Standard errors are those between independent blocks.
"""

import zlib
from collections.abc import Callable
from functools import cache, partial

import numpy as np
from scipy.special import digamma, gammaln, logsumexp, ndtri
from scipy.stats import norm, qmc

from tests.suite.catalogue import MODELS, TWINS
from tests.suite.quadrature import Twin
from tests.suite.twins.glm import log_poisson
from tests.suite.twins.normal import log_normal
from tests.suite.twins.regression import TWO_SLOPES

NUM_BLOCKS = 20


def generator(name: str) -> np.random.Generator:
    """Return a stream of its own for each model."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def between(values: list[float]) -> tuple[float, float]:
    """Return the mean of the blocks and its standard error."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5)


def log_mean(log_likelihood: np.ndarray) -> np.ndarray:
    """Return the log of the mean likelihood over the last axis."""
    return logsumexp(log_likelihood, axis=-1) - np.log(log_likelihood.shape[-1])


def spread(num: int, dim: int, rng: np.random.Generator) -> np.ndarray:
    """Return Sobol points, a power of two of them, shifted at random.

    The logarithm of a mean of independent draws is biased by as much as outcomes in the tails have few draws near them;
    evenly spread ones leave next to no bias.
    """
    return (_sobol(num, dim) + rng.random(dim)) % 1.0


@cache
def _sobol(num: int, dim: int) -> np.ndarray:
    return qmc.Sobol(dim, scramble=False).random(num)


def own(twin: Twin, latents: dict[str, np.ndarray], y: np.ndarray) -> np.ndarray:
    """Return the log likelihood of each outcome at its own latents."""
    size, found = 50, []
    for start in range(0, len(y), size):
        piece = slice(start, start + size)
        found.append(np.diagonal(twin.log_likelihood({k: v[piece] for k, v in latents.items()}, y[piece, None, :])))
    return np.concatenate(found)


def given_targets(twin: Twin, targets: tuple[str, ...], latents: dict, y: np.ndarray, inner: int, rng) -> np.ndarray:
    """Return the log likelihood of each outcome at its own targets, nuisances averaged over fresh draws."""
    if set(twin.prior) == set(targets):
        return own(twin, latents, y)
    found = []
    for row, outcome in enumerate(y):
        fresh = twin.latents(spread(inner, len(twin.columns), rng))
        for name in targets:
            fresh[name] = np.broadcast_to(latents[name][row], fresh[name].shape)
        found.append(log_mean(twin.log_likelihood(fresh, outcome[None, None, :])[0]))
    return np.array(found)


def nested(name: str, outer: int | None = None, inner: int | None = None) -> tuple[float, float]:
    """Average over `outer` experiments, in blocks with `inner` draws from the prior each."""
    twin, targets = TWINS[name], twin_targets(name)
    if outer is None or inner is None:
        # The more is learned, the fewer of the inner draws count; with nuisances the numerator is an average too.
        outer, inner = (20_000, 1_024) if MODELS[name].exact < 1.5 else (10_000, 4_096)
        outer, inner = (outer, inner) if set(twin.prior) == set(targets) else (8_000, 512)
    rng, blocks = generator(name), []
    for _ in range(NUM_BLOCKS):
        latents, y = twin.simulate(rng.random((outer // NUM_BLOCKS, twin.uniform_dim)))
        conditional = given_targets(twin, targets, latents, y, inner, rng)
        fresh = twin.latents(spread(inner, len(twin.columns), rng))
        size = max(1, 4_000_000 // (inner * y.shape[-1]))
        pieces = [y[start : start + size, None, :] for start in range(0, len(y), size)]
        marginal = np.concatenate([log_mean(twin.log_likelihood(fresh, piece)) for piece in pieces])
        blocks.append((conditional - marginal).mean())
    return between(blocks)


def by_correlations(name: str, num: int = 1_000_000) -> tuple[float, float]:
    """Gaussian information from the canonical correlations of simulated targets and outcomes."""
    twin, targets = TWINS[name], twin_targets(name)
    rng, blocks = generator(name), []
    for _ in range(NUM_BLOCKS):
        latents, y = twin.simulate(rng.random((num // NUM_BLOCKS, twin.uniform_dim)))
        theta = np.column_stack([LOGARITHMS.get(site, np.asarray)(latents[site]) for site in targets])
        sides = [np.linalg.qr(side - side.mean(axis=0))[0] for side in (theta, LOGARITHMS.get(name, np.asarray)(y))]
        correlations = np.linalg.svd(sides[0].T @ sides[1], compute_uv=False)
        by_chance = theta.shape[1] * y.shape[1] / (2 * len(y))
        blocks.append(-0.5 * np.log1p(-(correlations**2)).sum() - by_chance)
    return between(blocks)


def by_conjugacy(name: str, rows: np.ndarray, variances: np.ndarray, shape: float, rate: float, num: int = 400_000):
    """Average the divergence of normal-gamma posteriors from the prior over simulated outcomes."""
    twin, rng, blocks = TWINS[name], generator(name), []
    covariance = np.linalg.inv(rows.T @ rows + np.diag(1 / variances))
    both = np.eye(len(rows)) + (rows * variances) @ rows.T
    for _ in range(NUM_BLOCKS):
        y = twin.simulate(rng.random((num // NUM_BLOCKS, twin.uniform_dim)))[1]
        new_shape = shape + len(rows) / 2
        new_rate = rate + 0.5 * (y * np.linalg.solve(both, y.T).T).sum(axis=1)
        divergence = (new_shape - shape) * digamma(new_shape) - gammaln(new_shape) + gammaln(shape)
        divergence = divergence + shape * np.log(new_rate / rate) + new_shape * (rate - new_rate) / new_rate
        if len(twin.prior) > 1:
            mean = y @ rows @ covariance
            divergence += 0.5 * (new_shape / new_rate) * (mean**2 / variances).sum(axis=1)
            divergence += 0.5 * (np.trace(covariance / variances) - len(variances))
            divergence += 0.5 * (np.log(variances).sum() - np.linalg.slogdet(covariance)[1])
        blocks.append(divergence.mean())
    return between(blocks)


def uniform_noise(num: int = 200_000, inner: int = 4_000_000) -> tuple[float, float]:
    """Nested Monte Carlo whose inner draws are sorted, so that those an outcome allows are counted at once."""
    twin, blocks = TWINS["uniform_noise"], []
    rng = generator("uniform_noise")
    for _ in range(NUM_BLOCKS):
        y = twin.simulate(rng.random((num // NUM_BLOCKS, twin.uniform_dim)))[1]
        draws = np.sort(rng.standard_normal(inner))
        allowed = np.searchsorted(draws, y.min(axis=1) + 0.5) - np.searchsorted(draws, y.max(axis=1) - 0.5)
        allowed = np.maximum(allowed, 0.5)
        blocks.append((np.log(inner) - np.log(allowed) - 0.5 / allowed).mean())
    return between(blocks)


def group_effects(num: int = 200_000, inner: int = 2_048) -> tuple[float, float]:
    """Nested Monte Carlo over the spread alone: the effects given it are integrated out of the outcome's density."""
    twin, blocks = TWINS["group_effects"], []
    rng = generator("group_effects")
    for _ in range(NUM_BLOCKS):
        latents, y = twin.simulate(rng.random((num // NUM_BLOCKS, twin.uniform_dim)))
        conditional = log_normal(y, latents["tau"][:, None] * latents["scores"], 0.5)
        variance = (1.5 * ndtri(spread(inner, 1, rng)[:, 0])) ** 2 + 0.5**2
        squares = (y**2).sum(axis=1)[:, None]
        marginal = log_mean(-0.5 * squares / variance - 2.5 * np.log(2 * np.pi * variance))
        blocks.append((conditional - marginal).mean())
    return between(blocks)


def exploding_poisson(num: int = 1_000_000, split: int = 1_000) -> tuple[float, float]:
    """Log p(y) of small counts by stratified draws from the prior, of large ones by Gauss-Hermite about the mode."""
    twin, blocks, rng = TWINS["exploding_poisson"], [], generator("exploding_poisson")
    strata = 3.0 * ndtri((np.arange(20_000) + 0.5) / 20_000)
    small = np.arange(split, dtype=float)[:, None]
    table = np.concatenate(
        [logsumexp(log_poisson(y[:, :, None], strata[:, None]), axis=1) for y in np.array_split(small, 20)]
    ) - np.log(len(strata))
    nodes, weights = np.polynomial.hermite_e.hermegauss(30)
    for _ in range(NUM_BLOCKS):
        latents, y = twin.simulate(rng.random((num // NUM_BLOCKS, twin.uniform_dim)))
        marginal = table[np.minimum(y[:, 0], split - 1).astype(int)]
        large = y[:, 0] >= split
        mode = np.log(y[large])
        for _ in range(20):
            mode += (y[large] - np.exp(mode) - mode / 9) / (np.exp(mode) + 1 / 9)
        width = 1 / np.sqrt(np.exp(mode) + 1 / 9)
        log_rate = mode + width * nodes
        log_joint = log_poisson(y[large][:, :, None], log_rate[:, :, None]) + norm(0.0, 3.0).logpdf(log_rate)
        marginal[large] = logsumexp(log_joint + 0.5 * nodes**2, b=weights, axis=1) + np.log(width[:, 0])
        blocks.append((log_poisson(y, latents["log_rate"][:, None]) - marginal).mean())
    return between(blocks)


def twin_targets(name: str) -> tuple[str, ...]:
    """Return the targets as the twin names them: its first sites."""
    return TARGETS.get(name, MODELS[name].target_labels)


TARGETS = {
    "dirichlet_multinomial": ("first", "second"),
    "component_mean": ("label", "score"),
}
"""Where a twin has other latent sites than the model."""

LOGARITHMS = {"activity": np.log, "lognormal_decay": np.log}
"""Sites, and outcomes of models, that are Gaussian in logarithms."""

LINEAR = (
    "calibration_line", "badly_scaled", "low_noise_plane", "cubic", "two_thermometers", "thirty_nats",
    "tiny_information", "placebo", "matrix_coefficients", "lognormal_decay", "local_level", "random_effects",
)  # fmt: skip
SIZES = {
    "student_t_line": (10_000, 8_192),
}
"""Outer and inner draws where the default does not suit."""

SECOND: dict[str, Callable[[], tuple[float, float]]] = {
    name: partial(by_correlations, name) if name in LINEAR else partial(nested, name, *SIZES.get(name, ()))
    for name in MODELS
}
SECOND |= {"uniform_noise": uniform_noise, "group_effects": group_effects, "exploding_poisson": exploding_poisson}
LINE = (TWO_SLOPES, np.array([9.0, 25.0]), 3.0, 2.0)
SECOND["precision_of_a_line"] = partial(by_conjugacy, "precision_of_a_line", *LINE)
SECOND["normal_inverse_gamma"] = partial(by_conjugacy, "normal_inverse_gamma", *LINE)
SECOND["hundred_readings"] = partial(by_conjugacy, "hundred_readings", np.ones((100, 1)), np.ones(1), 4.0, 4.0, 100_000)
