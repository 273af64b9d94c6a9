"""Laws of files: what is saved loads to the same numbers, to the bit and in a new process, and never runs code."""

import os
import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_voed
from pyro_voed import Experiment, Fresh, amortise_eig, certify, eig_flow, eig_nmc, flow_posterior, load, save
from pyro_voed.plots import plot_eig
from pyro_voed.summaries import FeedForwardSummary
from tests import kept
from tests.kept import CASES, QUIET, TRAINED

GUIDES = {
    "ba": kept.posterior_guide,
    "ba with a module": kept.PosteriorGuide(),
    "marginal with a guide": kept.outcome_guide,
    "nmc with a guide": kept.posterior_guide,
}
"""Code that is given again."""
MODELS = {
    "flow of mixed targets": kept.mixed,
    "flow behind a summary": Experiment(kept.in_rows, "y", model_args=(2.0,), model_kwargs={"shift": 1.0}),
    "flow with a prior": Experiment(kept.model, "y", prior=kept.narrow),
    "flow of a module": kept.Module(),
}
OUTCOME = torch.tensor(0.5)
MORE = {
    "search": lambda: pyro_voed.optimise_design(kept.model, "y", training=Fresh(num_steps=5), num_samples=50, **QUIET),
    "grid": lambda: pyro_voed.search_grid(kept.brief_flow, {"xi": torch.tensor([0.5, 1.0])}, seed=0),
    "amortised": lambda: amortise_eig(kept.model, "y", training=TRAINED, **QUIET),
    "certified": lambda: certify(CASES["flow over designs"][0](), width=1.0, seed=0),
}
ASKED = {
    "search": lambda best: flow_posterior(best, OUTCOME, 20, seed=2).matrix(),
    "grid": lambda best: flow_posterior(best, OUTCOME, 20, seed=2).matrix(),
    "amortised": lambda found: found.at({"xi": torch.tensor([0.2, 2.5])}, num_samples=50, seed=1).eig,
    "certified": lambda sure: certify(sure, width=1.0, seed=3).interval,
}
ALL = [*CASES, *MORE]


@cache
def make(name):
    return MORE[name]() if name in MORE else CASES[name][0]()


def asked(name, result):
    """What a result gives when it is asked for more."""
    return ASKED[name](result) if name in MORE else CASES[name][1](result).eig


def loaded(name, path):
    return load(path, MODELS.get(name, kept.model), density=GUIDES.get(name))


def lines_of(result):
    """Everything that a result says, and all its numbers."""
    return [str(result), *map(repr, numbers_of(result))]


def numbers_of(value):
    if isinstance(value, torch.Tensor):
        return [value.tolist()]
    if isinstance(value, dict):
        return numbers_of(tuple(value.values()))
    if isinstance(value, tuple):
        return [number for entry in value for number in numbers_of(entry)]
    if type(value).__module__ == "pyro_voed.results":
        return numbers_of({name: own for name, own in vars(value).items() if name != "experiment"})
    if isinstance(value, nn.Module):
        return numbers_of(dict(value.state_dict()))
    return [value] if isinstance(value, bool | int | float | str) else []


@pytest.mark.parametrize("name", ALL)
@pytest.mark.filterwarnings("ignore:the Laplace approximation is doubtful")
def test_the_same_result_comes_back(name, tmp_path):
    result = make(name)
    before = torch.get_rng_state()
    save(result, tmp_path / "result.pt")
    again = loaded(name, tmp_path / "result.pt")
    assert torch.equal(torch.get_rng_state(), before)
    assert list(pyro.get_param_store()) in ([], ["xi"])
    assert type(again) is type(result)
    assert lines_of(again) == lines_of(result)
    assert torch.equal(asked(name, again), asked(name, result))


NEW_PROCESS = """
import sys
import torch
from tests import test_saving
torch.set_num_threads(1)
torch.save({name: (test_saving.lines_of(result), test_saving.asked(name, result))
            for name in test_saving.ALL
            for result in [test_saving.loaded(name, f"{sys.argv[1]}/{name}.pt")]}, f"{sys.argv[1]}/found")
"""


@pytest.mark.filterwarnings("ignore:the Laplace approximation is doubtful")
def test_a_new_process_has_the_same_numbers(tmp_path):
    expected = {}
    for name in ALL:
        result = make(name)
        save(result, tmp_path / f"{name}.pt")
        expected[name] = lines_of(result), asked(name, result)
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-W", "ignore", "-c", NEW_PROCESS, str(tmp_path)], cwd=root, check=True)
    found = torch.load(tmp_path / "found", weights_only=True)
    for name in ALL:
        assert found[name][0] == expected[name][0]
        assert torch.equal(found[name][1], expected[name][1])


# --- without a model ------------------------------------------------------------------------------------------------


def test_numbers_and_figures_need_no_model(tmp_path):
    save(CASES["flow over designs"][0](), tmp_path / "curve.pt")
    curve = load(tmp_path / "curve.pt")
    assert curve.experiment is None
    assert curve.learned.density is not None
    plt.close(plot_eig(curve).figure)
    for ask in (lambda: flow_posterior(curve, OUTCOME, design_index=0), lambda: certify(curve)):
        with pytest.raises(ValueError, match=r"load it with model="):
            ask()
    save(MORE["amortised"](), tmp_path / "amortised.pt")
    amortised = load(tmp_path / "amortised.pt")
    assert "amortised over designs" in str(amortised)
    with pytest.raises(ValueError, match=r"load it with model="):
        amortised.at()


# --- another model --------------------------------------------------------------------------------------------------


def varied(prior=None, noise=1.0, design=None, outcome="y", shape=()):
    """The model `kept.model`, but for what is given."""

    def model():
        constraint = dist.constraints.interval(0.0, 3.0) if design is None else design
        xi = pyro.param("xi", torch.tensor(1.0), constraint=constraint)
        theta = pyro.sample("theta", (prior or dist.Normal(0.0, 1.0)).expand(shape).to_event(len(shape)))
        pyro.sample(outcome, dist.Normal(xi * (theta.sum(-1) if shape else theta), noise))

    return model


def guided():
    return Experiment(kept.model, "y", prior=kept.narrow)


OTHERS = {
    "support": (lambda: varied(dist.Uniform(-1.0, 1.0)), r"'theta': saved .*Real\(\), given .*-1.0, upper_bound=1"),
    "shape": (lambda: varied(shape=(2,)), r"site 'theta': saved target of shape \(\), .* given target of shape \(2,\)"),
    "kind": (lambda: varied(dist.Bernoulli(0.5)), r"given .*Boolean with values \[0.0, 1.0\]"),
    "constraint": (
        lambda: varied(design=dist.constraints.positive), r"design 'xi': saved .*Interval.*given .*GreaterThan"
    ),
    "labels": (lambda: Experiment(varied(outcome="z"), "z"), "site 'y': saved observation .*, given none"),
    "prior": (guided, "prior: saved the model's own, given replaced by a guide"),
    "run": (lambda: Experiment(kept.model, "y", vectorize=False), "run: saved together, given one by one"),
}  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    found = tmp_path_factory.mktemp("saved") / "result.pt"
    save(eig_flow(kept.model, "y", training=TRAINED, num_samples=50, **QUIET), found)
    return found


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_is_refused_naming_both_sides(name, path):
    other, message = OTHERS[name]
    with pytest.raises(ValueError, match=f"not the one that the result was saved with.*{message}"):
        load(path, other())


@pytest.mark.filterwarnings("ignore:the prior of target:UserWarning")
def test_what_the_fingerprint_must_not_see(path, tmp_path):
    pyro.param("xi", torch.tensor(2.0), constraint=dist.constraints.interval(0.0, 3.0))
    assert torch.equal(load(path, varied()).designs["xi"], torch.tensor(1.0))

    def moving():
        top = pyro.sample("top", dist.Uniform(0.5, 2.0))
        xi = pyro.param("reach", torch.tensor(2.0), constraint=dist.constraints.positive)
        part = pyro.sample("part", dist.Uniform(-top, top * xi))
        pyro.sample("y", dist.Uniform(part - 1.0, part + 1.0))

    save(eig_nmc(moving, "y", num_outer_samples=20, seed=0), tmp_path / "moving.pt")
    pyro.param("reach", torch.tensor(3.0), constraint=dist.constraints.positive)
    assert load(tmp_path / "moving.pt", moving).experiment.targets[1].dependent_support


def test_what_the_program_alone_does_not_tell_is_asked_for(tmp_path):
    for name, missing in {"flow with a prior": "prior=", "flow behind a summary": "the model's arguments"}.items():
        save(make(name), tmp_path / "result.pt")
        with pytest.raises(ValueError, match=f"made with {missing}, got the program alone"):
            load(tmp_path / "result.pt", kept.model)


# --- what is not of this library ------------------------------------------------------------------------------------


class Own(nn.Module):
    """A user's summary."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 3)

    def forward(self, y):
        return self.layer(y).sin()


class OwnDensity(nn.Module):
    """A user's density, made by its class."""

    def __init__(self, theta_dim, context_dim):
        super().__init__()
        self.layer = nn.Linear(context_dim, theta_dim)

    def condition(self, context):
        return dist.Normal(self.layer(context), 1.0).to_event(1)


FOREIGN = {
    "density": ({"density": OwnDensity}, OwnDensity, "density=factory"),
    "summary": ({"summary": Own()}, {"summary": Own()}, "density={'summary': factory}"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_users_own_density_or_summary_is_given_again(name, tmp_path):
    options, given, asked_for = FOREIGN[name]
    result = eig_flow(kept.model, "y", training=TRAINED, num_samples=50, **options, **QUIET)
    save(result, tmp_path / "result.pt")
    again = load(tmp_path / "result.pt", kept.model, density=given)
    assert lines_of(again) == lines_of(result)
    with pytest.raises(ValueError, match=rf"{name}: expected a .*, got nothing.*load\(\.\.\., {asked_for}\)"):
        load(tmp_path / "result.pt", kept.model)


def test_a_guide_is_given_again_with_the_model_and_checked(tmp_path):
    save(CASES["ba"][0](), tmp_path / "result.pt")
    for given in ({"model": kept.model}, {"density": kept.posterior_guide}, {}):
        with pytest.raises(ValueError, match=r"guide tests\.kept\.posterior_guide.*Give both"):
            load(tmp_path / "result.pt", **given)

    def other(observations):
        pyro.sample("theta", dist.Normal(pyro.param("place", torch.tensor(0.0)), 1.0))

    with pytest.raises(ValueError, match=r"parameters \['slope', 'spread'\], the one given \['place'\]"):
        load(tmp_path / "result.pt", kept.model, density=other)


# --- files ----------------------------------------------------------------------------------------------------------


def test_files_hold_no_code_and_say_what_wrote_them(path):
    content = torch.load(path, weights_only=True)
    assert set(content["versions"]) == {"pyro_voed", "torch", "pyro"}
    assert content["versions"]["torch"] == torch.__version__


def test_a_failure_leaves_the_old_file_and_nothing_else(path, tmp_path, monkeypatch):
    def fail(content, file):
        file.write(b"half")
        raise OSError("no space left")

    target = tmp_path / "result.pt"
    target.write_bytes(path.read_bytes())
    result = load(path)
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space"):
        save(result, target)
    assert os.listdir(tmp_path) == ["result.pt"]
    assert target.read_bytes() == path.read_bytes()


def test_other_files_and_results_are_refused(path, tmp_path):
    (tmp_path / "pickle").write_bytes(pickle.dumps(Fresh()))
    torch.save({"weights": torch.zeros(2)}, tmp_path / "weights")
    (tmp_path / "empty").write_bytes(b"")
    for name in ("pickle", "weights", "empty"):
        with pytest.raises(ValueError, match=r"expected a file that pyro_voed\.save wrote"):
            load(tmp_path / name)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "format": 99}, tmp_path / "later")
    with pytest.raises(ValueError, match=r"format 99.*reads format 1"):
        load(tmp_path / "later")
    content["result"]["learned"]["density"]["state"].popitem()
    torch.save(content, tmp_path / "damaged")
    with pytest.raises(ValueError, match=r"written by .*, and is read by"):
        load(tmp_path / "damaged")
    with pytest.raises(TypeError, match=r"Type-check error|expected an EIGResult"):
        save(1.0, tmp_path / "number")


def test_precision_and_device_are_kept(tmp_path):
    def model():
        theta = pyro.sample("theta", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0))

    summary = FeedForwardSummary(1, 2)
    result = eig_flow(model, "y", summary=summary, training=TRAINED, num_samples=50, **QUIET)
    save(result, tmp_path / "result.pt")
    again = load(tmp_path / "result.pt", model)
    assert {weight.dtype for weight in again.density.parameters()} == {torch.float64}
    assert lines_of(again) == lines_of(result)
    elsewhere = load(tmp_path / "result.pt", map_location="meta")
    assert elsewhere.eig.device == torch.device("meta")
    assert {weight.device.type for weight in elsewhere.density.parameters()} == {"meta"}
    with pytest.raises(ValueError, match=r"on meta and the model's on cpu. Load with map_location='cpu'"):
        load(tmp_path / "result.pt", model, map_location="meta")
