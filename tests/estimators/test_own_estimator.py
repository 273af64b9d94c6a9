"""The estimator that the docs write is one short file, and works as it stands there."""

import re
from pathlib import Path

import pytest
import torch

from pyro_voed import Fresh, eig_flow
from tests.closed_forms import gain_eig, scaled
from tests.estimators.cases import KINDS, SIDE

PAGE = (Path(__file__).parents[2] / "docs" / "own_estimator.md").read_text()
(BLOCK,) = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
GAINS = torch.tensor([0.3, 1.0])


@pytest.fixture(scope="module")
def own():
    namespace = {"__name__": "own"}
    exec(compile(BLOCK, "own_estimator.md", "exec"), namespace)
    return namespace


def test_it_is_short():
    assert len(BLOCK.splitlines()) <= 60


def test_it_estimates_its_bound_at_every_design(own):
    result = own["eig_club"](scaled, "y", "theta", designs={"xi": GAINS}, num_samples=2_000, seed=0)
    # Of y = xi theta + noise, half the mean square of xi (theta - theta').
    assert ((result.eig - GAINS**2).abs() <= SIDE * result.standard_error).all()
    assert (result.eig >= gain_eig(GAINS) - SIDE * result.standard_error).all()
    assert (result.bound, result.estimator) == ("upper", "eig_club")


def test_its_standard_error_is_that_of_repeats(own):
    repeats = [own["eig_club"](scaled, "y", num_samples=100, seed=seed) for seed in range(60)]
    # 60 repeats give their spread to within 9 %; 4.5 times that is 0.41.
    spread = torch.stack([result.eig for result in repeats]).std()
    assert 0.59 < torch.stack([result.standard_error for result in repeats]).mean() / spread < 1.7


def test_it_stands_beside_a_flow_and_refuses_what_it_cannot_do(own):
    options = {"references": [own["eig_club"]], "training": Fresh(num_steps=2), "num_samples": 50, "seed": 0}
    assert eig_flow(scaled, "y", "theta", **options).references[0].estimator == "eig_club"
    with pytest.raises(NotImplementedError, match="density of the outcome"):
        eig_flow(KINDS["implicit"][0], "y", "theta", **options)
