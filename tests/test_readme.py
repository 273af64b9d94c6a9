"""README's code runs as it stands, and prints what README says it prints."""

import contextlib
import io
import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
PRINTED = re.findall(r"^```text\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
EXACT_AT_START, EXACT_AT_BEST = 0.6310, 1.2293
ESTIMATE = re.compile(r"EIG (\d+\.\d+) \+- (\d+\.\d+) nats \((lower bound|upper bound)")


@pytest.fixture(scope="module")
def printed():
    """What the blocks print, each run in a namespace of its own."""
    outputs = []
    for block in BLOCKS:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
        outputs.append(out.getvalue())
    return outputs


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


def test_quoted_bounds_hold_for_the_exact_values():
    # Quadrature over the rate (4,001 points) and the outcome (4,001 points); converged to the digits given.
    for (eig, error, side), exact in zip(ESTIMATE.findall(PRINTED[0]), (EXACT_AT_START, EXACT_AT_BEST), strict=True):
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
        figure = Path(__file__).parent.parent / name
        assert figure.stat().st_size <= 150_000


def number_after(words, text):
    return float(re.search(re.escape(words) + r"(-?\d+\.\d+)", text).group(1))
