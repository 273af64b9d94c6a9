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


# --- fresh simulations ----------------------------------------------------------------------------------------------


def test_fresh_training_converges_and_says_so():
    weight = start()
    history = fit_fresh(noisy_draw, closeness(weight), ascend(weight), window=50, cooldown_steps=100, **QUIET)
    assert history.stop_reason == "converged"
    assert history.converged
    assert history.num_steps < 2_000
    # Cooled down, the weight averages over at least fifty batches of 64 draws of deviation 0.1.
    assert (weight - TARGET).abs().max() < 5 * 0.1 / 50**0.5
    assert history.bound.shape == history.learning_rate.shape == (history.num_steps,)
    assert history.bound[-1] > history.bound[0]
    assert history.seconds > 0


def test_a_budget_that_is_exhausted_is_said_to_be():
    weight = start()
    history = fit_fresh(
        noisy_draw, closeness(weight), ascend(weight, lr=1e-4), max_steps=200, window=50, cooldown_steps=20, **QUIET
    )
    assert history.stop_reason == "budget"
    assert not history.converged
    assert history.num_steps == 200


def test_pure_noise_has_converged_at_once():
    weight = start()
    history = fit_fresh(
        lambda: torch.randn(64),
        lambda batch: batch + 0 * (weight * TARGET).sum(),
        ascend(weight),
        window=50,
        cooldown_steps=10,
        **QUIET,
    )
    # Each look calls noise rising with probability 0.16 or so; ten in a row would be one in 10**8.
    assert history.converged
    assert history.num_steps <= 10 * 50 + 100 + 10


@pytest.mark.parametrize("num_steps", [1, 2, 7, 300])
def test_the_number_of_steps_is_exact(num_steps):
    weight, draws, steps, cooling = start(), [], [], []

    def draw():
        draws.append(1)
        return noisy_draw()

    history = fit_fresh(
        draw,
        closeness(weight),
        ascend(weight),
        num_steps=num_steps,
        window=20,
        after_step=steps.append,
        before_cooldown=lambda: cooling.append(len(draws)),
        **QUIET,
    )
    assert history.num_steps == len(draws) == num_steps
    assert steps == list(range(num_steps))
    assert len(cooling) <= 1


def test_the_rate_is_constant_then_falls_to_almost_nothing():
    weight, cooling = start(), []
    ascent = ascend(weight)
    history = fit_fresh(
        noisy_draw,
        closeness(weight),
        ascent,
        num_steps=400,
        cooldown_steps=100,
        before_cooldown=lambda: cooling.append(ascent.optimiser.param_groups[0]["lr"]),
        **QUIET,
    )
    rates = history.learning_rate
    assert (rates[:300] == 1).all()
    assert (rates[300:].diff() < 0).all()
    assert 0 < rates[-1] < 1e-3
    assert cooling == [0.05]


def test_cooling_takes_at_most_half_of_a_short_run():
    weight = start()
    history = fit_fresh(noisy_draw, closeness(weight), ascend(weight), num_steps=10, **QUIET)
    assert (history.learning_rate == 1).sum() == 5


def test_terms_that_are_not_finite_stop_with_step_and_count_and_keep_the_weights():
    weight, count = start(), []

    def draw():
        count.append(1)
        batch = noisy_draw()
        if len(count) == 8:
            kept.append(weight.detach().clone())
            batch[:5] = float("nan")
        return batch

    kept = []
    with pytest.raises(ArithmeticError, match=r"step 7: 5 of 64 terms are not finite. the reason"):
        fit_fresh(draw, closeness(weight), ascend(weight), num_steps=20, explain=lambda batch: "the reason", **QUIET)
    assert torch.equal(weight.detach(), kept[0])
    assert weight.grad is None


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_infinite_terms_are_never_averaged_away(value):
    weight = start()

    def terms(batch):
        return torch.cat([closeness(weight)(batch), torch.tensor([value])])

    with pytest.raises(ArithmeticError, match="1 of 65"):
        fit_fresh(noisy_draw, terms, ascend(weight), num_steps=3, **QUIET)


def test_infinities_of_both_signs_do_not_cancel():
    weight = start()

    def terms(batch):
        return torch.cat([closeness(weight)(batch), torch.tensor([float("inf"), -float("inf")])])

    with pytest.raises(ArithmeticError, match="2 of 66"):
        fit_fresh(noisy_draw, terms, ascend(weight), num_steps=3, **QUIET)


def test_a_gradient_that_is_not_finite_stops_before_the_weights_move():
    weight = start()
    terms = lambda batch: batch.sum(-1) + weight.abs().sqrt().sum()  # noqa: E731
    with pytest.raises(ArithmeticError, match="step 0: the gradient is not finite"):
        fit_fresh(noisy_draw, terms, ascend(weight), num_steps=3, **QUIET)
    assert torch.equal(weight.detach(), torch.zeros(3))
    assert weight.grad is None


def test_gradients_are_taken_for_the_given_parameters_alone():
    weight, other = start(), nn.Parameter(torch.ones(3))
    terms = lambda batch: closeness(weight)(batch) + (other * batch).sum(-1)  # noqa: E731
    fit_fresh(noisy_draw, terms, ascend(weight), num_steps=5, **QUIET)
    assert other.grad is None
    assert weight.grad is None
    assert torch.equal(other.detach(), torch.ones(3))


def test_training_works_where_gradients_are_off():
    weight = start()
    with torch.no_grad():
        fit_fresh(noisy_draw, closeness(weight), ascend(weight), num_steps=20, **QUIET)
    assert (weight.abs() > 0.1).all()


def test_draws_with_gradients_work_where_gradients_are_off():
    # A design is drawn through, so what `draw` makes must carry gradients too.
    weight = start()
    with torch.no_grad():
        fit_fresh(
            lambda: weight * torch.ones(4, 1), lambda batch: -(batch - TARGET).square().sum(-1), ascend(weight),
            num_steps=20, **QUIET,
        )  # fmt: skip
    assert (weight.abs() > 0.1).all()


def test_each_group_has_its_own_rate_and_clip():
    fast, slow = start(), start()
    ascent = Ascent([{"params": [fast], "lr": 0.1}, {"params": [slow], "lr": 0.001}])
    terms = lambda batch: closeness(fast)(batch) + 1e6 * closeness(slow)(batch)  # noqa: E731
    fit_fresh(noisy_draw, terms, ascent, num_steps=10, **QUIET)
    assert (fast.abs() > 0.3).all()
    assert (slow.abs() <= 0.01 + 1e-6).all()
    assert (slow.abs() > 0).all()


def test_a_gradient_that_is_one_number_seen_many_times_is_clipped():
    weight = start()
    Ascent([{"params": [weight], "lr": 0.1}]).step(weight.sum())
    assert torch.allclose(weight.detach(), torch.full((3,), 0.1))


def test_a_gradient_is_clipped_to_the_norm():
    weight = start()
    ascent = Ascent([{"params": [weight], "lr": 0.1}], clip_norm=1e-3)
    ascent.step(1e4 * (weight * TARGET).sum())
    # Adam's first moment after one step is (1 - beta_1) times the gradient it was given.
    moment = ascent.optimiser.state[weight]["exp_avg"].norm().item()
    assert moment == pytest.approx(0.1 * 1e-3, rel=1e-3)


def test_parameters_that_share_a_gradient_are_clipped_once():
    # Autograd hands on one and the same tensor for both terms of a sum.
    first, second = start(), start()
    ascent = Ascent([{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.1}], clip_norm=1.0)
    ascent.step(10 * ((first + second) * TARGET).sum())
    for weight in (first, second):
        moment = ascent.optimiser.state[weight]["exp_avg"].norm().item()
        assert moment == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("at", [3, 20])
def test_an_interruption_keeps_what_was_learnt(at):
    weight, count = start(), []

    def draw():
        count.append(1)
        if len(count) == at:
            signal.raise_signal(signal.SIGINT)
        return noisy_draw()

    handler = signal.getsignal(signal.SIGINT)
    history = fit_fresh(draw, closeness(weight), ascend(weight), num_steps=1_000, **QUIET)
    assert history.stop_reason == "interrupted"
    assert not history.converged
    assert history.num_steps == at
    assert (weight.abs() > 0).all()
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_interruption_raises():
    weight = start()

    def draw():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return noisy_draw()

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit_fresh(draw, closeness(weight), ascend(weight), num_steps=1_000, **QUIET)
    assert signal.getsignal(signal.SIGINT) is handler


def test_training_runs_outside_the_main_thread():
    weight, histories = start(), []

    def run():
        histories.append(fit_fresh(noisy_draw, closeness(weight), ascend(weight), num_steps=5, **QUIET))

    thread = threading.Thread(target=run)
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


def of_rows(terms):
    return lambda batch: terms(batch.values)


def test_training_on_a_pool_stops_early_at_the_best_weights():
    weight, pool = start(), pool_of(400)
    history = fit_pool(pool, of_rows(closeness(weight)), ascend(weight), batch_size=50, patience=5, **QUIET)
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

    history = fit_pool(pool_of(40), terms, ascend(weight), batch_size=36, patience=4, **QUIET)
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

    history = fit_pool(pool_of(60), terms, ascend(weight, lr=0.3), batch_size=8, patience=4, **QUIET)
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
    weight = start()
    history = fit_pool(pool_of(100), of_rows(closeness(weight)), ascend(weight, lr=1e-4), max_epochs=3, **QUIET)
    assert history.stop_reason == "budget"
    assert history.validation.shape == (3,)


def test_a_pool_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match=r"pool of 10 .* too small"):
        fit_pool(pool_of(10), of_rows(closeness(weight := start())), ascend(weight), **QUIET)


@pytest.mark.parametrize("where", ["training", "validation"])
def test_a_pool_with_a_row_that_is_not_finite_stops_with_step_and_count(where):
    weight = start()

    def terms(batch):
        values = closeness(weight)(batch.values)
        return values / 0.0 if (where == "training") == torch.is_grad_enabled() else values

    with pytest.raises(ArithmeticError, match=r"step \d+: (20|30) of (20|30) terms .* the reason"):
        fit_pool(
            pool_of(200),
            terms,
            ascend(weight),
            batch_size=30,
            explain=lambda batch: "the reason",
            max_epochs=2,
            **QUIET,
        )


def test_an_interruption_keeps_the_best_weights_of_the_pool():
    weight, calls = start(), []

    def terms(batch):
        calls.append(1)
        if len(calls) == 20:
            signal.raise_signal(signal.SIGINT)
        return closeness(weight)(batch.values)

    history = fit_pool(pool_of(200), terms, ascend(weight), **QUIET)
    assert history.stop_reason == "interrupted"
    assert (weight.abs() > 0).all()
    assert len(history.validation) >= 1
