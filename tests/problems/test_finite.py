import itertools
import math

import pytest
import torch
from pyro import poutine

from pyro_voed.problems import finite


@pytest.mark.parametrize("design", [0.05, 0.5, 0.77])
def test_exact_eig_enumerates_the_program(design):
    # Independent route: the joint table comes from the program's own densities, the EIG from the definition.
    model = finite.finite(design)
    joint = {}
    for theta, y in itertools.product((0.0, 1.0), repeat=2):
        data = {"theta": torch.tensor(theta), "y": torch.tensor(y)}
        joint[theta, y] = poutine.trace(poutine.condition(model, data=data)).get_trace().log_prob_sum().exp().item()
    assert sum(joint.values()) == pytest.approx(1.0)
    of_theta = {t: joint[t, 0.0] + joint[t, 1.0] for t in (0.0, 1.0)}
    of_y = {y: joint[0.0, y] + joint[1.0, y] for y in (0.0, 1.0)}
    eig = sum(p * math.log(p / (of_theta[t] * of_y[y])) for (t, y), p in joint.items())
    assert finite.exact_eig(torch.tensor(design)).item() == pytest.approx(eig, abs=1e-6)


def test_default_eig():
    assert finite.exact_eig(torch.tensor(finite.DEFAULT_DESIGN)).item() == pytest.approx(finite.DEFAULT_EIG, abs=5e-12)


def test_gradient_agrees_with_finite_differences():
    design = torch.tensor([0.2, 0.5, 0.9], dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(finite.exact_eig, (design,))
