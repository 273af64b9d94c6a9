"""Each study of the paper's cases runs from start to end in tiny sizes, goes on where it stopped, writes figures."""

import re
from pathlib import Path

import pytest

from tests.scripts import ROOT, run_script

# What a study is split into, and what all share, has no main part.
STUDIES = sorted(path for path in (ROOT / "benchmarks" / "paper").glob("*.py") if "__main__" in path.read_text())
# Each takes up to a minute of processor time even so: one by default.
BY_DEFAULT = ("electrocoating",)
# Under a minute each on a quiet machine, several times that on a busy one.
pytestmark = pytest.mark.timeout(900)


def studies():
    for path in STUDIES:
        yield pytest.param(path, id=path.stem, marks=[] if path.stem in BY_DEFAULT else [pytest.mark.slow])


@pytest.mark.parametrize("script", studies())
def test_study_runs_quickly_and_is_taken_up_again(script, tmp_path):
    first = run_script(script, "--quick", "--out", tmp_path, cwd=tmp_path)
    assert "| " in first.stdout, "no table was printed"
    figures = [Path(name) for name in re.findall(r"^figure: (.+)$", first.stdout, flags=re.MULTILINE)]
    assert figures
    assert all(figure.stat().st_size > 10_000 for figure in figures), "a figure is nearly empty"
    assert list(tmp_path.glob("*_quick/*.pt"))
    second = run_script(script, "--quick", "--out", tmp_path, cwd=tmp_path)
    assert " ...\n" not in second.stderr, "a part that was kept is made again"
    assert second.stdout == first.stdout
