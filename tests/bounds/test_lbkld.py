"""Nearest-neighbour entropies against closed forms, and the bound made of them.

Comparisons are held to `EITHER_SIDE` = 4.5 standard errors: a right estimate fails one with probability 7e-6 (those of
a jackknife of 20 blocks, some 20 % too large, with 1e-4 at most). There are about ten, and the seeds are fixed.
"""

import math

import pytest
import torch

from pyro_voed.bounds.lbkld import _log_volumes, lbkld_terms, nearest_neighbour_entropy

EITHER_SIDE = 4.5
GAUSSIAN_BIAS = 0.03
"""Largest bias, nats, of a Gaussian's entropy in 3 dimensions at 2,000 points and more."""


def repeated_entropy(draw, num_neighbours, repeats=12):
    values = torch.stack([nearest_neighbour_entropy(draw(), num_neighbours) for _ in range(repeats)])
    return values.mean(), values.std() / math.sqrt(repeats)


@pytest.mark.parametrize("num_neighbours", [1, 4])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_bias_of_gaussian_entropies(dim, num_neighbours):
    # A constant without (dim - 1) / num_neighbours would be off by 0.25 or more.
    factor = torch.eye(dim).double() + 0.8 * torch.ones(dim, dim).double().tril(-1)
    exact = 0.5 * dim * math.log(2 * math.pi * math.e)  # the factor has determinant 1
    mean, error = repeated_entropy(lambda: torch.randn(2_000, dim).double() @ factor.mT, num_neighbours)
    assert abs(mean - exact) < GAUSSIAN_BIAS + EITHER_SIDE * error


@pytest.mark.parametrize("dim", [1, 2])
def test_uniform_entropies(dim):
    # Near an edge half of each neighbourhood is empty, which biases upward: 0.03 in two dimensions.
    mean, error = repeated_entropy(lambda: 3.0 * torch.rand(2_000, dim).double(), 4)
    assert -EITHER_SIDE * error < mean - dim * math.log(3.0) < 0.04 + EITHER_SIDE * error


def test_entropies_scale():
    x = torch.randn(500, 3).double()
    scaled = nearest_neighbour_entropy(5.0 * x - 2.0)
    torch.testing.assert_close(scaled, nearest_neighbour_entropy(x) + 3 * math.log(5.0))


def test_points_without_density_are_refused():
    x = torch.randn(300, 1).double()
    for points, words in ((x.round(), "coincide"), (torch.cat([x, 2 * x], 1), "plane")):
        with pytest.raises(ArithmeticError, match=words):
            nearest_neighbour_entropy(points)


def test_leaving_a_block_out_is_leaving_its_points_out():
    z, block = torch.randn(200, 2).double(), torch.arange(200) * 4 // 200
    volumes = _log_volumes(z, block, 4, 3)
    assert volumes.shape == (200, 5)
    kept = block != 2
    torch.testing.assert_close(volumes[kept, 3], _log_volumes(z[kept], block[kept], 0, 3)[:, 0])


def test_terms_of_gaussians():
    # x0 of variance 4 made of unit noise: the information is log 2.
    x0, difference = 2 * torch.randn(4_000, 1), torch.randn(4_000, 1) - torch.randn(4_000, 1)
    bound, without = lbkld_terms(x0, difference, torch.randint(3, (4_000,)))
    error = math.sqrt(19 / 20) * (without - without.mean()).square().sum().sqrt()
    assert abs(bound - math.log(2.0)) < 2 * GAUSSIAN_BIAS + EITHER_SIDE * error
