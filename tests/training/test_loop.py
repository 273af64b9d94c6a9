"""The one loop on objectives whose maximum is known."""

import signal
import threading
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from pyro_voed.training.ascent import Ascent
from pyro_voed.training.loop import fit_fresh, fit_pool

TARGET = torch.tensor([1.0, -2.0, 0.5])


def start():
    return nn.Parameter(torch.zeros(3))


def ascend(*parameters, lr=0.05, **options):
    return Ascent([{"params": list(parameters), "lr": lr}], **options)


def noisy_draw():
    return TARGET + 0.1 * torch.randn(64, 3)


def closeness(weight):
    """Log density of a unit Gaussian about the weight: the mean over draws is highest at their mean."""
    return lambda batch: -0.5 * (batch - weight).square().sum(-1)


QUIET = {"progress": False}


def fresh(weight, *, draw=noisy_draw, terms=None, lr=0.05, **options):
    """Ascend on fresh batches."""
    return fit_fresh(draw, terms or closeness(weight), ascend(weight, lr=lr), **QUIET, **options)


# --- fresh simulations ----------------------------------------------------------------------------------------------


def test_fresh_training_converges_and_says_so():
    weight = start()
    history = fresh(weight, window=50, cooldown_steps=100)
    assert history.stop_reason == "converged"
    assert history.converged
    assert history.num_steps < 2_000
    # Cooled down, the weight averages over at least fifty batches of 64 draws of deviation 0.1.
    assert (weight - TARGET).abs().max() < 5 * 0.1 / 50**0.5
    assert history.bound.shape == history.learning_rate.shape == (history.num_steps,)
    assert history.bound[-1] > history.bound[0]
    assert history.seconds > 0


def test_a_budget_that_is_exhausted_is_said_to_be():
    history = fresh(start(), lr=1e-4, max_steps=200, window=50, cooldown_steps=20)
    assert history.stop_reason == "budget"
    assert not history.converged
    assert history.num_steps == 200


def test_pure_noise_has_converged_at_once():
    weight = start()
    noise = lambda batch: batch + 0 * (weight * TARGET).sum()  # noqa: E731
    history = fresh(weight, draw=lambda: torch.randn(64), terms=noise, window=50, cooldown_steps=10)
    # Each look calls noise rising with probability 0.16 or so; ten in a row would be one in 10**8.
    assert history.converged
    assert history.num_steps <= 10 * 50 + 100 + 10


@pytest.mark.parametrize("num_steps", [1, 2, 7, 300])
def test_the_number_of_steps_is_exact(num_steps):
    draws, steps, cooling = [], [], []

    def draw():
        draws.append(1)
        return noisy_draw()

    cool = lambda: cooling.append(len(draws))  # noqa: E731
    options = {"num_steps": num_steps, "window": 20, "after_step": steps.append, "before_cooldown": cool}
    history = fresh(start(), draw=draw, **options)
    assert history.num_steps == len(draws) == num_steps
    assert steps == list(range(num_steps))
    assert len(cooling) <= 1


def test_the_rate_is_constant_then_falls_to_almost_nothing():
    weight, cooling = start(), []
    ascent = ascend(weight)
    cool = lambda: cooling.append(ascent.optimiser.param_groups[0]["lr"])  # noqa: E731
    options = {"num_steps": 400, "cooldown_steps": 100, "before_cooldown": cool, **QUIET}
    rates = fit_fresh(noisy_draw, closeness(weight), ascent, **options).learning_rate
    assert (rates[:300] == 1).all()
    assert (rates[300:].diff() < 0).all()
    assert 0 < rates[-1] < 1e-3
    assert cooling == [0.05]
    # Cooling takes at most half of a short run.
    assert (fresh(weight, num_steps=10).learning_rate == 1).sum() == 5


def test_terms_that_are_not_finite_stop_with_step_and_count_and_keep_the_weights():
    weight, count, kept = start(), [], []

    def draw():
        count.append(1)
        batch = noisy_draw()
        if len(count) == 8:
            kept.append(weight.detach().clone())
            batch[:5] = float("nan")
        return batch

    with pytest.raises(ArithmeticError, match=r"step 7: 5 of 64 terms are not finite. the reason"):
        fresh(weight, draw=draw, num_steps=20, explain=lambda batch: "the reason")
    assert torch.equal(weight.detach(), kept[0])
    assert weight.grad is None


@pytest.mark.parametrize("values", [[torch.inf], [-torch.inf], [torch.inf, -torch.inf]])
def test_infinite_terms_are_never_averaged_away(values):
    weight = start()
    terms = lambda batch: torch.cat([closeness(weight)(batch), torch.tensor(values)])  # noqa: E731
    with pytest.raises(ArithmeticError, match=f"{len(values)} of {64 + len(values)}"):
        fresh(weight, terms=terms, num_steps=3)


def test_a_gradient_that_is_not_finite_stops_before_the_weights_move():
    weight = start()
    with pytest.raises(ArithmeticError, match="step 0: the gradient is not finite"):
        fresh(weight, terms=lambda batch: batch.sum(-1) + weight.abs().sqrt().sum(), num_steps=3)
    assert torch.equal(weight.detach(), torch.zeros(3))
    assert weight.grad is None


def test_gradients_are_taken_for_the_given_parameters_alone():
    weight, other = start(), nn.Parameter(torch.ones(3))
    fresh(weight, terms=lambda batch: closeness(weight)(batch) + (other * batch).sum(-1), num_steps=5)
    assert other.grad is weight.grad is None
    assert torch.equal(other.detach(), torch.ones(3))


@pytest.mark.parametrize("through", [False, True])
def test_training_works_where_gradients_are_off(through):
    # A design is drawn through, so what `draw` makes must carry gradients too.
    weight = start()
    with torch.no_grad():
        if through:
            draw, terms = lambda: weight * torch.ones(4, 1), lambda batch: -(batch - TARGET).square().sum(-1)
            fresh(weight, draw=draw, terms=terms, num_steps=20)
        else:
            fresh(weight, num_steps=20)
    assert (weight.abs() > 0.1).all()


def test_each_group_has_its_own_rate_and_clip():
    fast, slow = start(), start()
    ascent = Ascent([{"params": [fast], "lr": 0.1}, {"params": [slow], "lr": 0.001}])
    terms = lambda batch: closeness(fast)(batch) + 1e6 * closeness(slow)(batch)  # noqa: E731
    fit_fresh(noisy_draw, terms, ascent, num_steps=10, **QUIET)
    assert (fast.abs() > 0.3).all()
    assert (slow.abs() <= 0.01 + 1e-6).all()
    assert (slow.abs() > 0).all()


def test_a_gradient_is_clipped_to_the_norm():
    weight = start()
    ascent = ascend(weight, lr=0.1, clip_norm=1e-3)
    ascent.step(1e4 * (weight * TARGET).sum())
    # Adam's first moment after one step is (1 - beta_1) times the gradient it was given.
    moment = ascent.optimiser.state[weight]["exp_avg"].norm().item()
    assert moment == pytest.approx(0.1 * 1e-3, rel=1e-3)
    # A gradient that is one number seen many times is clipped as well.
    weight = start()
    ascend(weight, lr=0.1).step(weight.sum())
    assert torch.allclose(weight.detach(), torch.full((3,), 0.1))


def test_parameters_that_share_a_gradient_are_clipped_once():
    # Autograd hands on one and the same tensor for both terms of a sum.
    first, second = start(), start()
    ascent = Ascent([{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.1}], clip_norm=1.0)
    ascent.step(10 * ((first + second) * TARGET).sum())
    for weight in (first, second):
        moment = ascent.optimiser.state[weight]["exp_avg"].norm().item()
        assert moment == pytest.approx(0.1, rel=1e-3)


def interrupting(at, times=1):
    """A draw that presses Ctrl-C at one of its calls."""
    count = []

    def draw():
        count.append(1)
        if len(count) == at:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return noisy_draw()

    return draw


@pytest.mark.parametrize("at", [3, 20])
def test_an_interruption_keeps_what_was_learnt_and_a_second_raises(at):
    weight, handler = start(), signal.getsignal(signal.SIGINT)
    history = fresh(weight, draw=interrupting(at), num_steps=1_000)
    assert history.stop_reason == "interrupted"
    assert not history.converged
    assert history.num_steps == at
    assert (weight.abs() > 0).all()
    assert signal.getsignal(signal.SIGINT) is handler
    with pytest.raises(KeyboardInterrupt):
        fresh(weight, draw=interrupting(at, times=2), num_steps=1_000)
    assert signal.getsignal(signal.SIGINT) is handler


def test_training_runs_outside_the_main_thread():
    histories = []
    thread = threading.Thread(target=lambda: histories.append(fresh(start(), num_steps=5)))
    thread.start()
    thread.join()
    assert histories[0].num_steps == 5


# --- a fixed budget -------------------------------------------------------------------------------------------------


@dataclass
class Rows:
    values: torch.Tensor

    @property
    def num_samples(self):
        return self.values.shape[0]

    def __getitem__(self, rows):
        return Rows(self.values[rows])


def pool_of(num):
    return Rows(TARGET + torch.randn(num, 3))


def on_pool(weight, size, *, terms=None, lr=0.05, **options):
    """Ascend on a pool; terms of its rows, or of a whole part."""
    of_rows = lambda part: closeness(weight)(part.values)  # noqa: E731
    return fit_pool(pool_of(size), terms or of_rows, ascend(weight, lr=lr), **QUIET, **options)


def test_training_on_a_pool_stops_early_at_the_best_weights():
    weight = start()
    history = on_pool(weight, 400, batch_size=50, patience=5)
    assert history.stop_reason == "early stopping"
    assert history.converged
    # 360 rows for training give an estimate of deviation 1 / sqrt(360) in each coordinate.
    assert (weight - TARGET).abs().max() < 5 / 360**0.5
    assert history.validation.shape[0] * 8 == history.num_steps  # 360 rows in batches of fifty are eight steps
    rates = history.learning_rate[::8]
    first = int((rates < 1.0).nonzero()[0])
    # Five epochs without a better bound, then the rate falls for as many epochs as there were, or half of them.
    assert first - history.validation[:first].argmax() == 6
    assert (rates[:first] == 1.0).all()
    assert (rates[first : first + max(5, first // 2)].diff() < 0.0).all()


def test_a_pool_learnt_by_heart_is_gone_over_once_more_at_a_tenth_of_the_rate():
    weight = nn.Parameter(torch.zeros(1))

    def terms(batch):
        # Every step of training makes the validation rows worse.
        slope = weight if torch.is_grad_enabled() else -weight
        return slope + 0.0 * batch.values.sum(-1)

    history = on_pool(weight, 40, terms=terms, batch_size=36, patience=4)
    rates = history.learning_rate.tolist()
    assert rates[:5] == [1.0] * 5
    assert all(0.0 < rate < 1.0 for rate in rates[5:])
    assert rates[-4:] == pytest.approx([0.1] * 4)
    assert len(rates) == 5 + 4 + 4
    assert history.stop_reason == "early stopping"
    assert weight.item() == pytest.approx(0.05)  # one step of Adam


def test_the_weights_put_back_are_those_of_the_best_validation_bound():
    weight, seen = start(), []

    def terms(batch):
        if not torch.is_grad_enabled():  # the look at the validation rows
            seen.append((closeness(weight)(batch.values).mean().item(), weight.detach().clone()))
        return closeness(weight)(batch.values)

    history = on_pool(weight, 60, terms=terms, lr=0.3, batch_size=8, patience=4)
    best = max(seen, key=lambda pair: pair[0])
    assert torch.equal(weight.detach(), best[1])
    assert max(history.validation.tolist()) == pytest.approx(best[0])
    assert len(seen) == history.validation.shape[0]


def test_validation_rows_are_never_trained_on():
    pool, weight = Rows(torch.arange(100.0).unsqueeze(-1)), nn.Parameter(torch.zeros(1))
    trained, validated, begun = set(), set(), []

    def terms(batch):
        (trained if torch.is_grad_enabled() else validated).update(batch.values.flatten().tolist())
        return closeness(weight)(batch.values)

    fit_pool(pool, terms, ascend(weight), validation_fraction=0.2, max_epochs=3, begin=begun.append, **QUIET)
    assert len(validated) == 20
    assert len(trained) == 80
    assert [set(part.values.flatten().tolist()) for part in begun] == [trained]
    assert not trained & validated


def test_a_pool_whose_epochs_run_out_says_so():
    history = on_pool(start(), 100, lr=1e-4, max_epochs=3)
    assert history.stop_reason == "budget"
    assert history.validation.shape == (3,)


def test_a_pool_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match=r"pool of 10 .* too small"):
        on_pool(start(), 10)


@pytest.mark.parametrize("where", ["training", "validation"])
def test_a_pool_with_a_row_that_is_not_finite_stops_with_step_and_count(where):
    weight = start()

    def terms(batch):
        values = closeness(weight)(batch.values)
        return values / 0.0 if (where == "training") == torch.is_grad_enabled() else values

    options = {"batch_size": 30, "explain": lambda batch: "the reason", "max_epochs": 2}
    with pytest.raises(ArithmeticError, match=r"step \d+: (20|30) of (20|30) terms .* the reason"):
        on_pool(weight, 200, terms=terms, **options)


def test_an_interruption_keeps_the_best_weights_of_the_pool():
    weight, calls = start(), []

    def terms(batch):
        calls.append(1)
        if len(calls) == 20:
            signal.raise_signal(signal.SIGINT)
        return closeness(weight)(batch.values)

    history = on_pool(weight, 200, terms=terms)
    assert history.stop_reason == "interrupted"
    assert (weight.abs() > 0).all()
    assert len(history.validation) >= 1
