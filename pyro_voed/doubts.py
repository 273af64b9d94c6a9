"""Numbers that should not come alone: what speaks against an estimate, in one line each, with the remedy.

A line is empty where nothing speaks against it. Results keep their lines and print them; who makes a result warns.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_voed.monte_carlo import HEAVY_TAIL

FEWEST_FOR_TAIL = 500
"""Fewer terms than this give a tail index that may be large by chance."""

SURE = 4.0
"""Standard errors beyond which chance is not the reason: exceeded with probability 3e-5."""


def heavy_tailed(weights: Any, num_samples: int) -> str:
    """Say so where the tails of weighted terms do not allow the standard error to be trusted."""
    tail = None if weights is None or weights.passed is not False else weights.pareto_k
    if tail is None or num_samples < FEWEST_FOR_TAIL or not bool((tail > HEAVY_TAIL).any()):
        return ""
    return (
        f"terms are heavy-tailed (Pareto k up to {float(tail.max()):.2f}): a few of them carry the mean, and the "
        "standard error cannot be trusted. Take more inner draws, or a better proposal"
    )


def above_entropy(eig: Tensor, standard_error: Tensor, entropy: Tensor) -> str:
    """Say so where an estimate clearly exceeds the entropy of discrete targets, the mean of `entropy`."""
    most, error = float(entropy.mean()), float(entropy.std() / math.sqrt(len(entropy)))
    above = eig - most > SURE * torch.hypot(standard_error, torch.as_tensor(error).to(standard_error))
    if not bool((above & (eig > 1.01 * most)).any()):
        return ""
    return (
        f"the estimate {float(eig.max()):.4f} exceeds the entropy of the targets, {most:.4f} nats, the most there is "
        "to learn. Take the entropy for an upper bound, and more draws for the estimate"
    )


def indistinguishable(result: Any) -> str:
    """Say so where no design of a batch is clearly better than another."""
    if result.eig.numel() < 2 or not bool(result.near_best.all()):
        return ""
    spread = float(result.eig.max() - result.eig.min())
    return (
        f"the {result.eig.numel()} designs are indistinguishable: their estimates differ by at most {spread:.2g} nats, "
        "within their errors. Which is the largest is chance; take more samples, or any of the designs"
    )


def at_edge(candidates: Any) -> str:
    """Say so where the best of a grid of candidates has the least or largest value of a design, which might go on."""
    eig = candidates.eig.reshape(-1)
    if len(eig) < 3:
        return ""
    best, near = int(eig.argmax()), candidates.near_best.reshape(-1)
    sites = {} if candidates.experiment is None else {site.name: site for site in candidates.experiment.designs}
    for name, value in candidates.designs.items():
        columns = value.reshape(len(eig), -1) if value.shape[: candidates.eig.dim()] == candidates.eig.shape else None
        if columns is None or columns.shape[1] != 1:
            continue
        column, levels = columns[:, 0], columns.unique()
        ends = None if name not in sites else sites[name].interval_ends
        for end, inner, limit in ((0, 1, 0), (-1, -2, 1)):
            edge = levels[end]
            inside = bool((column[near] != edge).any())
            if len(levels) < 3 or column[best] != edge or inside:
                continue
            if ends is not None and bool((ends[limit] - edge).abs().min() < (levels[inner] - edge).abs()):
                continue
            return (
                f"the best candidate has the {'largest' if limit else 'least'} value of '{name}' tried, "
                f"{float(edge):.4g}: better designs may lie beyond. Try further values, or search with optimise_design"
            )
    return ""
