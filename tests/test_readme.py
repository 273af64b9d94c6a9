"""README's code runs as it stands, and prints what README says it prints."""

import re

import pytest
import torch

from tests.scripts import ROOT, run_script

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
PRINTED = re.findall(r"^```text\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
ESTIMATE = re.compile(r"EIG (\d+\.\d+) \+- (\d+\.\d+) nats \((lower bound|upper bound)")


# Two trainings, a minute together where the machine is not busy with something else.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def printed():
    """What the blocks print, each run as a script of its own."""
    return [run_script("-c", block).stdout for block in BLOCKS]


def test_every_block_says_what_it_prints(printed):
    assert len(BLOCKS) == len(PRINTED) == len(printed) >= 1


def test_estimates_are_those_quoted_within_their_errors(printed):
    for quoted, run in zip(PRINTED, printed, strict=True):
        ours, theirs = ESTIMATE.findall(quoted), ESTIMATE.findall(run)
        assert [side for _, _, side in ours] == [side for _, _, side in theirs]
        assert ours
        for (eig, error, _), (again, error_again, _) in zip(ours, theirs, strict=True):
            assert abs(float(eig) - float(again)) < 4 * (float(error) ** 2 + float(error_again) ** 2) ** 0.5
            assert abs(float(error) - float(error_again)) < 0.2 * float(error)


def test_quoted_exact_values_are_those_of_quadrature():
    sentence = r"(\d\.\d+) nats at 8 hours and (\d\.\d+) nats at the best time, (\d\.\d+) hours"
    at_start, at_best, best_time = map(float, re.search(sentence, README).groups())
    assert exact_eig(8.0) == pytest.approx(at_start, abs=1e-4)
    assert exact_eig(best_time) == pytest.approx(at_best, abs=1e-4)
    assert max(exact_eig(best_time - 0.1), exact_eig(best_time + 0.1)) < exact_eig(best_time)
    # What the flow is quoted with lies below, but for Monte Carlo error.
    for (eig, error, side), exact in zip(ESTIMATE.findall(PRINTED[0]), (at_start, at_best), strict=True):
        assert side == "lower bound"
        assert float(eig) < exact + 4 * float(error)


def test_other_numbers_are_those_quoted(printed):
    # 1,750 steps of 0.03 with noisy gradients settle within a few hundredths of the optimum in the design.
    assert number_after("time = [", PRINTED[0]) == pytest.approx(number_after("time = [", printed[0]), abs=0.15)
    assert number_after("rate: ", PRINTED[0]) == pytest.approx(number_after("rate: ", printed[0]), abs=0.02)


def test_figures_shown_exist_and_are_small():
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert shown
    for name in shown:
        assert (ROOT / name).stat().st_size <= 150_000


def exact_eig(time):
    """EIG of the model in README by the trapezoidal rule over the rate and over the outcome."""
    normal = torch.linspace(-6.0, 6.0, 1001, dtype=torch.double)
    weights = torch.softmax(-0.5 * normal**2, 0)
    means = torch.exp(-time * torch.exp(-1.0 + 0.5 * normal))
    outcomes = torch.linspace(-0.4, 1.4, 2001, dtype=torch.double)
    marginal = torch.distributions.Normal(means, 0.05).log_prob(outcomes.unsqueeze(-1)).exp() @ weights
    entropy = -torch.xlogy(marginal, marginal).sum() * (outcomes[1] - outcomes[0])
    return (entropy - torch.distributions.Normal(0.0, 0.05).entropy()).item()


def number_after(words, text):
    return float(re.search(re.escape(words) + r"(-?\d+\.\d+)", text).group(1))
