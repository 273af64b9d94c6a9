"""Laws of replayed training steps: they are the steps themselves, or training runs without and says why.

There is a recorder for CUDA alone. Here a step is recorded by `make_fx` instead, as the list of tensor operations that
it started: like a CUDA graph it holds no Python, freezes what Python computed, and cannot be made of a step that asks
the device for a value. What only a card can show (that its driver takes the recording) is not tested.
"""

import random
import warnings
from functools import partial

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_voed import amortise_eig, eig_flow, marginal_saddle, optimise_design, prior_contrastive
from pyro_voed.ascent import Ascent
from pyro_voed.captured import Capture, CapturedSteps, NotReplayable, captured_or_none, check_replays, recorder
from pyro_voed.densities import AffineCouplingFlow
from pyro_voed.estimators import learning
from pyro_voed.training import fit_fresh

NUM_STEPS = 60


def record_operations(step):
    # Once before, so that the optimiser has its memory.
    step()
    operations = make_fx(lambda: step())()

    def replay():
        # Gradients are operations of the recording.
        with torch.no_grad():
            return operations()

    return replay


@pytest.fixture
def records(monkeypatch):
    """Recorder of operations in place of the device's; counts its recordings."""
    made = []

    def record(step):
        recording = record_operations(step)
        made.append(recording)
        return recording

    monkeypatch.setattr(learning, "recorder", lambda device: record)
    return made


def small_flow(theta_dim, context_dim):
    return AffineCouplingFlow(theta_dim, context_dim, num_transforms=2, hidden_dim=8)


def slope():
    return pyro.param("xi", torch.tensor(0.5), constraint=constraints.interval(0.0, 2.0))


def line():
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    bias = pyro.sample("bias", dist.Normal(0.0, 0.1))
    return pyro.sample("y", dist.Normal(slope().unsqueeze(-1) * theta + bias.unsqueeze(-1), 0.5).to_event(1))


def counts():
    theta = pyro.sample("theta", dist.Gamma(2.0, 1.0))
    with pyro.plate("times", 3):
        return pyro.sample("y", dist.Poisson(slope() * theta))


COMMON = {"num_steps": NUM_STEPS, "num_samples": 200, "batch_size": 64, "seed": 4, "progress": False}
SMALL = {**COMMON, "density": small_flow}
DESIGNS = {"xi": torch.tensor([0.5, 1.0, 1.5])}
RUNS = {
    "one design": lambda capture: eig_flow(line, "y", "theta", capture=capture, **SMALL),
    "a design batch": lambda capture: eig_flow(line, "y", "theta", designs=DESIGNS, capture=capture, **SMALL),
    "an ensemble": lambda capture: eig_flow(
        line, "y", "theta", designs=DESIGNS, ensemble=True, capture=capture, **SMALL
    ),
    "several rates": lambda capture: eig_flow(
        line, "y", "theta", capture=capture, **{**SMALL, "learning_rate": [1e-3, 1e-2]}
    ),
    "a given entropy": lambda capture: eig_flow(line, "y", "theta", prior_entropy=2.8379, capture=capture, **SMALL),
    "a search": lambda capture: optimise_design(line, "y", "theta", capture=capture, **SMALL),
    "a projected search": lambda capture: optimise_design(
        line, "y", "theta", projection=lambda d: {"xi": d["xi"].clamp_max(1.0)}, capture=capture, **SMALL
    ),
    "several starts": lambda capture: optimise_design(line, "y", "theta", num_starts=2, capture=capture, **SMALL),
    "scores of counts": lambda capture: optimise_design(counts, "y", capture=capture, **SMALL),
    "contrasts": lambda capture: optimise_design(
        line, "y", ["theta", "bias"], objective=prior_contrastive, capture=capture, **COMMON
    ),
}


def parts_of(result):
    final = getattr(result, "final", result)
    parts = [final.eig, final.standard_error, result.history.bound, result.history.learning_rate]
    parts += [final.designs[name] for name in sorted(final.designs)] + list(getattr(result, "path", {}).values())
    if final.density is not None:
        parts += [weight.detach() for weight in final.density.parameters()]
    return parts


@pytest.mark.parametrize("name", RUNS)
def test_replayed_training_is_training(name, records):
    pyro.clear_param_store()
    plain = RUNS[name](False)
    pyro.clear_param_store()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="capture")
        captured = RUNS[name](True)
    assert len(records) == 1, "nothing was recorded"
    for one, other in zip(parts_of(plain), parts_of(captured), strict=True):
        assert torch.equal(one, other)
    # What was simulated to compare replays with is paid for as well.
    assert captured.num_simulations > plain.num_simulations


def test_an_amortised_curve_is_replayed(records):
    def train(capture):
        settings = {key: value for key, value in SMALL.items() if key != "num_samples"}
        return amortise_eig(line, "y", "theta", capture=capture, **settings)

    plain, captured = train(False), train(True)
    assert len(records) == 1
    assert torch.equal(plain.history.bound, captured.history.bound)


def line_that_asks():
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    if not torch.isfinite(theta).all():
        raise ValueError("no such line")
    return pyro.sample("y", dist.Normal(slope() * theta, 1.0))


def test_a_model_that_asks_for_a_value_is_not_recorded(records):
    with pytest.warns(UserWarning, match="capture: the step could not be recorded"):
        captured = eig_flow(line_that_asks, "y", capture=True, **SMALL)
    assert torch.equal(captured.history.bound, eig_flow(line_that_asks, "y", **SMALL).history.bound)


def test_experiments_one_by_one_are_not_recorded(records):
    settings = {**SMALL, "num_steps": 3, "batch_size": 4, "vectorize": False}
    with pytest.warns(UserWarning, match="capture: experiments of this model are run one by one"):
        eig_flow(line, "y", "theta", capture=True, **settings)
    assert not records


def test_on_the_cpu_training_runs_as_it_is():
    with pytest.warns(UserWarning, match="capture: steps are recorded on CUDA devices only"):
        captured = RUNS["one design"](True)
    assert torch.equal(captured.eig, RUNS["one design"](False).eig)
    assert recorder(torch.device("cpu")) is None
    assert recorder(torch.device("cuda", 0)) is not None


def test_a_saddle_point_is_searched_without(records):
    with pytest.warns(UserWarning, match="capture: .*saddle"):
        optimise_design(line, "y", ["theta", "bias"], objective=marginal_saddle(), capture=True, **COMMON)
    assert not records


# Steps of plain tensors.


class Hill:
    """Steps up a parabola, drawn with noise; broken in the step with a given number."""

    def __init__(self, broken_at=None):
        self.place = torch.zeros(3, requires_grad=True)
        self.clock = torch.zeros((), dtype=torch.long)
        self.broken_at = -1 if broken_at is None else broken_at
        self.ascent = Ascent([{"params": [self.place], "lr": 1e-2}], replayable=True)

    def draw(self):
        return {"noise": torch.randn(100, 3)}

    def terms(self, batch):
        terms = -((self.place - 1.0 + batch["noise"]) ** 2).sum(-1)
        # A count of steps on the device, as a recording has no other.
        broken = self.clock == self.broken_at
        self.clock.add_(1)
        return torch.where(broken & (torch.arange(100) < 7), torch.nan, terms)

    def capture(self, record=record_operations):
        return Capture(record, lambda batch: batch)

    def fit(self, num_steps, capture=True):
        return fit_fresh(
            self.draw,
            self.terms,
            self.ascent,
            num_steps=num_steps,
            capture=self.capture() if capture else None,
            progress=False,
        )


def test_nothing_is_learnt_or_drawn_while_a_step_is_recorded():
    hill = Hill()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    steps = CapturedSteps(hill.capture(), hill.draw, hill.terms, hill.ascent)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(hill.place.detach(), torch.zeros(3))
    assert all(not value.any() for state in hill.ascent.optimiser.state.values() for value in state.values())
    assert steps.bounds == []


def test_a_term_that_is_not_finite_names_its_step_and_puts_back_what_was_learnt():
    # Steps before training also move the clock: 40 fresh draws' worth of replays, one run and one recording.
    hill, plain = Hill(), Hill()
    steps = captured_or_none(hill.capture(), hill.draw, hill.terms, hill.ascent)
    hill.broken_at = int(hill.clock) + 73
    del steps

    hill = Hill(broken_at=hill.broken_at)
    torch.manual_seed(1)
    with pytest.raises(
        ArithmeticError, match=r"steps 50 to 99, .*in step 73 7 of 100 terms are not finite.*before step 50"
    ):
        hill.fit(200)
    torch.manual_seed(1)
    plain.ascent.scale_rates(1.0)
    for _ in range(50):
        with torch.enable_grad():
            assert plain.ascent.step(plain.terms(plain.draw()).mean())
    assert torch.equal(hill.place, plain.place)
    assert all(
        torch.equal(hill.ascent.optimiser.state[hill.place][key], value)
        for key, value in plain.ascent.optimiser.state[plain.place].items()
    )


def test_a_gradient_that_is_not_finite_is_named():
    hill = Hill()
    hill.terms = lambda batch: batch["noise"].sum(-1) + hill.place.sum().abs().sqrt()
    with pytest.raises(ArithmeticError, match="in step 0 the gradient is not finite"):
        hill.fit(10)
    assert torch.equal(hill.place.detach(), torch.zeros(3))


def test_bounds_of_a_part_of_a_window_are_read():
    captured, plain = Hill(), Hill()
    torch.manual_seed(2)
    replayed = captured.fit(73)
    torch.manual_seed(2)
    assert torch.equal(replayed.bound, plain.fit(73, capture=False).bound)
    assert replayed.num_steps == 73


def test_training_stops_where_it_would_have_stopped():
    captured, plain = Hill(), Hill()
    torch.manual_seed(2)
    replayed = captured.fit(None)
    torch.manual_seed(2)
    run = plain.fit(None, capture=False)
    assert replayed.stop_reason == run.stop_reason == "converged"
    assert torch.equal(replayed.bound, run.bound)


def test_experiments_of_replays_are_counted():
    hill, calls = Hill(), [0]

    def draw():
        calls[0] += 100
        return hill.draw()

    steps = CapturedSteps(Capture(record_operations, lambda batch: batch, calls), draw, hill.terms, hill.ascent)
    before = calls[0]
    for _ in range(7):
        steps.take()
    assert calls[0] - before == 700


GENERATOR, OWN = numpy.random.default_rng(0), torch.Generator()
OTHER_GENERATORS = {
    "Python's": lambda: torch.full((100, 3), random.gauss(0.0, 1.0)),
    "NumPy's": lambda: torch.from_numpy(numpy.random.normal(size=(100, 3))),  # noqa: NPY002
    "NumPy's, of one's own": lambda: torch.from_numpy(GENERATOR.normal(size=(100, 3))),
    "torch's, of one's own": lambda: torch.randn(100, 3, generator=OWN),
}


@pytest.mark.parametrize("numbers", OTHER_GENERATORS)
def test_numbers_of_other_generators_are_not_recorded(numbers):
    hill = Hill()

    def draw():
        return {"noise": torch.randn(100, 3) + OTHER_GENERATORS[numbers]().float()}

    with pytest.raises(NotReplayable, match="'noise' draws from another generator"):
        CapturedSteps(hill.capture(), draw, hill.terms, hill.ascent)


def test_a_recording_that_stands_still_is_refused():
    hill = Hill()
    with pytest.raises(NotReplayable, match="'noise' varies between simulations, but not from replay to replay"):
        CapturedSteps(hill.capture(lambda step: partial(dict, step())), hill.draw, hill.terms, hill.ascent)


def test_a_recording_of_another_distribution_is_refused():
    def record(step):
        return lambda: {"noise": step()["noise"] * 1.3}

    hill = Hill()
    with pytest.raises(NotReplayable, match="'noise' is distributed otherwise"):
        CapturedSteps(hill.capture(record), hill.draw, hill.terms, hill.ascent)


def test_a_recorder_that_fails_is_done_without():
    def record(step):
        raise RuntimeError("operation not permitted when stream is capturing\nand a long trace")

    captured, plain = Hill(), Hill()
    captured.capture = lambda: Capture(record, lambda batch: batch)
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match=r"capture: .*stream is capturing\. Training runs without"):
        history = captured.fit(20)
    torch.manual_seed(3)
    assert torch.equal(history.bound, plain.fit(20, capture=False).bound)


def test_one_frozen_element_is_found():
    draws = [{"y": torch.randn(200, 3)} for _ in range(8)]
    for run in draws[4:]:
        run["y"][:, 1] = draws[4]["y"][:, 1]
    with pytest.raises(NotReplayable, match="site 'y' varies"):
        check_replays(draws[:4], draws[4:])


def test_equal_distributions_pass():
    """2,000 comparisons of 20 elements each at 1e-6 a comparison fail once in 500 runs."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(2_000):
        draws = [
            {"y": torch.randn(25, 10, generator=generator), "n": torch.rand(25, 10, generator=generator).round()}
            for _ in range(8)
        ]
        check_replays(draws[:4], draws[4:])


def test_what_never_varies_need_not_vary():
    draws = [{"constant": torch.ones(50, 1), "y": torch.randn(50, 1)} for _ in range(8)]
    check_replays(draws[:4], draws[4:])
