"""Twins of the regressions."""

import numpy as np
from scipy import stats

from tests.suite.quadrature import Twin
from tests.suite.twins.normal import log_correlated, log_normal, noise, vector


def linear(prior, rows, scale):
    """Make the twin of y = rows @ coefficients + noise, with the columns of all sites side by side."""

    def mean(t):
        parts = [t[name] if isinstance(own, list) else t[name][..., None] for name, own in prior.items()]
        return np.concatenate(parts, axis=-1) @ rows.T

    return Twin(
        prior,
        lambda t, u: mean(t) + noise(u, scale),
        len(rows),
        lambda t, y: log_normal(y, mean(t), scale),
    )


LINE = np.stack([np.arange(6.0), np.ones(6)], axis=-1)
POWERS = np.vander(np.linspace(0.0, 0.7212, 6), 4, increasing=True)
PLANE = np.array([[1.0, 0.5, 0.2], [0.5, 1.0, 0.5], [0.2, 0.5, 1.0], [0.1, -0.4, 0.3]])
CUBIC = np.vander(np.linspace(-1.0, 1.0, 8), 4, increasing=True)
BATH = np.array([[0.0, 1.0], [1.0, 1.0]])
BALANCE = np.tril(np.ones((6, 6)))
REGRESSORS = np.array([[1, 0, 0.5], [1, 1, -0.5], [1, 2, 0.5], [1, 3, -0.5]])
MATRIX = np.kron(REGRESSORS, np.eye(2))
TWO_SLOPES = np.stack([np.ones(10), np.linspace(-1.0, 1.0, 10)], axis=-1)
CONJUGATE = np.eye(10) + TWO_SLOPES @ np.diag([9.0, 25.0]) @ TWO_SLOPES.T


def conjugate_joint(s):
    spread = s["precision"] ** -0.5
    return (
        stats.gamma(3.0, scale=1 / 2.0).logpdf(s["precision"])
        + log_normal(s["beta"], 0.0, spread * np.array([3.0, 5.0]))
        + log_normal(s["y"], TWO_SLOPES @ s["beta"], spread)
    )


def conjugate_outcome(t, u):
    beta = noise(u[:, :2]) * np.array([3.0, 5.0])
    return (beta @ TWO_SLOPES.T + noise(u[:, 2:])) / np.sqrt(t["precision"])[:, None]


def hundred_joint(s):
    spread = s["precision"] ** -0.5
    return (
        stats.gamma(4.0, scale=1 / 4.0).logpdf(s["precision"])
        + stats.norm(0.0, spread).logpdf(s["mean"])
        + log_normal(s["y"], s["mean"], spread)
    )


def hundred_log_likelihood(t, y):
    """By mean and sum of squares; the mean is given in standard deviations."""
    num, average = y.shape[-1], y.mean(axis=-1)
    squares = ((y - average[..., None]) ** 2).sum(axis=-1)
    mean = t["mean"] / np.sqrt(t["precision"])
    return 0.5 * num * np.log(t["precision"] / (2 * np.pi)) - 0.5 * t["precision"] * (
        squares + num * (average - mean) ** 2
    )


TWINS = {
    "calibration_line": linear({"slope": stats.norm(1.0, 0.5), "intercept": stats.norm(0.0, 2.0)}, LINE, 1.5),
    "badly_scaled": linear({"coefficients": vector(4, 0.0, [100.0, 1.0, 0.1, 0.01])}, POWERS, 0.01),
    "low_noise_plane": linear({"weights": vector(3)}, PLANE, 0.00093),
    "cubic": linear({f"c{k}": stats.norm(0.0, scale) for k, scale in enumerate((1.0, 1.0, 2.0, 3.0))}, CUBIC, 0.4),
    "precision_of_a_line": Twin(
        {"precision": stats.gamma(3.0, scale=1 / 2.0)},
        conjugate_outcome,
        12,
        lambda t, y: log_correlated(y, CONJUGATE[None] / t["precision"][:, None, None]),
        log_joint=conjugate_joint,
    ),
    "normal_inverse_gamma": Twin(
        {"precision": stats.gamma(3.0, scale=1 / 2.0), "scores": vector(2)},
        lambda t, u: (
            (t["scores"] * np.array([3.0, 5.0])) @ TWO_SLOPES.T + noise(u)
        ) / np.sqrt(t["precision"])[:, None],
        10,
        lambda t, y: log_normal(
            y,
            (t["scores"] * np.array([3.0, 5.0])) @ TWO_SLOPES.T / np.sqrt(t["precision"])[..., None],
            t["precision"][..., None] ** -0.5,
        ),
        log_joint=conjugate_joint,
    ),
    "two_thermometers": linear({"offset": stats.norm(0.0, 0.1), "bath": stats.norm(20.0, 10.0)}, BATH, 0.01),
    "thirty_nats": linear({"masses": vector(6, 5.0, 1.0)}, BALANCE, 0.0067),
    "tiny_information": linear({"effect": stats.norm(0.0, 0.01414)}, np.ones((1, 1)), 1.0),
    "placebo": linear({"effect": stats.norm(1.0, 1.0)}, np.zeros((5, 1)), 1.0),
    "matrix_coefficients": linear({"coefficients": vector(6)}, MATRIX, np.tile([0.5, 1.0], 4)),
    "hundred_readings": Twin(
        {"precision": stats.gamma(4.0, scale=1 / 4.0), "mean": stats.norm(0.0, 1.0)},
        lambda t, u: (t["mean"][:, None] + noise(u)) / np.sqrt(t["precision"])[:, None],
        100,
        hundred_log_likelihood,
        log_joint=hundred_joint,
    ),
}  # fmt: skip
