"""Every tutorial runs from start to end, with tiny sizes, and writes the figures that it says it writes."""

import re
from pathlib import Path

import pytest

from tests.scripts import ROOT, run_script

TUTORIALS = sorted((ROOT / "tutorials").glob("*.py"))
# Half a minute each on a quiet machine, several times that on a busy one.
pytestmark = pytest.mark.timeout(1_800)


def test_tutorials_are_found():
    assert {"demo.py", "01_michaelis_menten.py"} <= {path.name for path in TUTORIALS}


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_runs_and_writes_its_figures(tutorial, tmp_path):
    figures = tmp_path / "figures"
    run = run_script(tutorial, cwd=tmp_path, PYRO_VOED_SMOKE="1", PYRO_VOED_FIGURES=str(figures))
    written = {Path(name) for name in re.findall(r"^figure written: (.+)$", run.stdout, flags=re.MULTILINE)}
    assert written == set(figures.iterdir())
    assert len(written) >= 4
    for figure in written:
        data = figure.read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        # A figure of these sizes with nothing but empty axes on it is smaller.
        assert len(data) > 10_000, f"{figure.name} is nearly empty"
