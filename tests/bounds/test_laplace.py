"""Laplace terms and what they are made of."""

import torch

from pyro_voed.bounds.laplace import curvature, laplace_terms, newton_modes


def test_curvature_is_that_of_each_row():
    matrices = torch.randn(4, 3, 3)
    matrices = matrices @ matrices.mT
    theta = torch.randn(4, 3)
    value, gradient, precision = curvature(
        lambda x: -0.5 * (x * (matrices @ x.unsqueeze(-1)).squeeze(-1)).sum(-1), theta
    )
    assert torch.allclose(precision, matrices, atol=1e-4)
    assert torch.allclose(gradient, -(matrices @ theta.unsqueeze(-1)).squeeze(-1), atol=1e-4)
    assert value.shape == (4,)


def test_a_linear_log_density_has_no_curvature():
    _, _, precision = curvature(lambda x: x.sum(-1), torch.zeros(2, 3))
    assert torch.equal(precision, torch.zeros(2, 3, 3))
    assert torch.isnan(laplace_terms(torch.zeros(2), precision)).all()


def test_newton_climbs_from_where_the_curvature_is_negative():
    # log density of a Student t with a saddle of curvature beyond its scale; undamped Newton runs away from 3.
    modes = newton_modes(lambda x: -2.0 * torch.log1p(x.square()).sum(-1), torch.tensor([[3.0, -0.2], [-5.0, 4.0]]), 30)
    assert modes.abs().max() < 1e-2
