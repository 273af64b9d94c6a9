"""Every combination of estimator and model that a table of the docs names runs, or is refused as the table says."""

import functools
import itertools
import math
import re
from pathlib import Path

import pytest
import torch

from pyro_voed import Experiment, eig_flow, eig_nmc
from pyro_voed.densities import AffineCouplingFlow
from pyro_voed.problems.finite import finite
from pyro_voed.problems.implicit_toy import implicit_toy
from pyro_voed.problems.linear_gaussian import linear_gaussian
from pyro_voed.problems.michaelis_menten import michaelis_menten
from pyro_voed.problems.nonlinear import nonlinear
from tests.estimators.cases import ESTIMATORS, FEW, KINDS, MOMENT, PAIR, WITH_DENSITY

ROOT = Path(__file__).parents[2]
SIDES = {
    "lower bound": "lower",
    "upper bound": "upper",
    "both": "lower",
    "neither": "neither",
    "approximate": "neither",
}
# Trained for a moment on few draws, estimators have reason to warn.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def rows(page, heading):
    """Cells of the rows of the table with a heading, first cells without their links."""
    text = (ROOT / page).read_text()
    table = text[text.index(f"| {heading} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


@pytest.mark.parametrize("page", ["README.md", "docs/estimators/index.md"])
def test_tables_name_estimators_with_their_side_and_what_they_need(page):
    table = rows(page, "function")
    assert len(table) >= 13
    for name, side, needs, *_ in table:
        name = re.search(r"`([^`]+)`", name).group(1)
        assert side.startswith(ESTIMATORS[name][1]), name
        assert needs.startswith("yes") is (name in WITH_DENSITY), name


@functools.cache
def experiment_of(kind):
    model, options, _ = KINDS[kind]
    return Experiment(model, "y", "theta", seed=0, **options)


def pairs():
    """Of every estimator and kind of model; the fewest runs that a certificate takes are a minute one by one."""
    for name, kind in itertools.product(ESTIMATORS, KINDS):
        slow = (name, kind) == ("certify", "run one by one")
        yield pytest.param(name, kind, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("name", "kind"), pairs())
def test_every_estimator_runs_on_every_kind_of_model_or_refuses_it_at_no_cost(name, kind):
    (estimate, side), experiment = ESTIMATORS[name], experiment_of(kind)
    if name in KINDS[kind][2]:
        before = experiment.num_calls
        with pytest.raises(NotImplementedError):
            estimate(experiment, seed=0)
        # Only a few experiments are run at candidate designs before; a certificate comes after what it is of.
        allowed = {"certify": math.inf, "eig_flow(ensemble=True)": 50}.get(name, 0)
        assert experiment.num_calls - before <= allowed
        return
    result = estimate(experiment, seed=0)
    # The model states the density of its targets.
    assert result.bound == ("lower" if name == "eig_flow(learn_prior=True)" else SIDES.get(side, side))
    assert result.eig.shape == result.standard_error.shape == ((2,) if "ensemble" in name else ())
    assert torch.isfinite(result.eig).all()
    assert torch.isfinite(result.standard_error).all()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_takes_candidate_designs(name):
    result = ESTIMATORS[name][0](experiment_of("explicit"), designs={"xi": PAIR}, seed=0)
    assert result.eig.shape == (2,)
    assert (result.certificate is None) is (name != "certify")


# --- the table of five problems ---------------------------------------------------------------------------------------

PROBLEMS = {
    "linear_gaussian": linear_gaussian(),
    "finite": finite(),
    "michaelis_menten": michaelis_menten(),
    "implicit_toy": implicit_toy(),
    "nonlinear": nonlinear(),
}
gaussian = functools.partial(AffineCouplingFlow, num_transforms=0)
COMPARED = {
    **{name.removeprefix("eig_"): estimate for name, (estimate, _) in ESTIMATORS.items()},
    "gaussian_flow": functools.partial(eig_flow, density=gaussian, **MOMENT),
    "nmc_low": functools.partial(eig_nmc, num_inner_samples=5, **FEW),
    "nmc_high": functools.partial(eig_nmc, num_inner_samples=20, **FEW),
    "nmc_reused": functools.partial(eig_nmc, **FEW),
}


@functools.cache
def read(problem):
    return Experiment(PROBLEMS[problem], "y", "theta" if problem == "implicit_toy" else None, seed=0)


@pytest.mark.parametrize(
    ("name", "cells"),
    [(row[0].strip("`"), row[2:]) for row in rows("docs/how_to_choose.md", "estimator") if len(row) == 7],
)
def test_the_table_of_five_problems_names_what_runs_and_what_is_refused(name, cells):
    for problem, cell in zip(PROBLEMS, cells, strict=True):
        if cell in ("refused", "-"):
            with pytest.raises(NotImplementedError):
                COMPARED[name](read(problem), seed=0)
        else:
            assert torch.isfinite(COMPARED[name](read(problem), seed=0).eig), problem
