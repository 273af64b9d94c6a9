"""Each study of the paper's cases runs from start to end in tiny sizes, goes on where it stopped, writes figures."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What a study is split into, and what all share, has no main part.
STUDIES = sorted(path for path in (ROOT / "benchmarks" / "paper").glob("*.py") if "__main__" in path.read_text())
# Under a minute each on a quiet machine, several times that on a busy one.
pytestmark = pytest.mark.timeout(900)


def run(script, folder):
    surroundings = {
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, script, "--quick", "--out", folder]
    started = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, env=os.environ | surroundings, cwd=folder, capture_output=True, text=True)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr[-4000:]
    return done, ended.ru_utime + ended.ru_stime - started.ru_utime - started.ru_stime


@pytest.mark.parametrize("script", STUDIES, ids=lambda path: path.stem)
def test_study_runs_quickly_and_is_taken_up_again(script, tmp_path):
    first, seconds = run(script, tmp_path)
    assert seconds < 60, "a --quick run takes more than a minute of processor time"
    assert "| " in first.stdout, "no table was printed"
    figures = [Path(name) for name in re.findall(r"^figure: (.+)$", first.stdout, flags=re.MULTILINE)]
    assert figures
    assert all(figure.stat().st_size > 10_000 for figure in figures), "a figure is nearly empty"
    parts = list(tmp_path.glob("*_quick/*.pt"))
    assert parts
    second, _ = run(script, tmp_path)
    assert " ...\n" not in second.stderr, "a part that was kept is made again"
    assert second.stdout == first.stdout
