"""Every tutorial runs from start to end, with tiny sizes, and writes the figures that it says it writes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TUTORIALS = sorted((ROOT / "tutorials").glob("*.py"))
# Half a minute each on a quiet machine, several times that on a busy one.
pytestmark = pytest.mark.timeout(900)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def test_tutorials_are_found():
    assert {"demo.py", "01_michaelis_menten.py"} <= {path.name for path in TUTORIALS}


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_runs_and_writes_its_figures(tutorial, tmp_path):
    surroundings = {
        "PYRO_VOED_SMOKE": "1",
        "PYRO_VOED_FIGURES": str(tmp_path / "figures"),
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    run = subprocess.run(
        [sys.executable, tutorial], env=os.environ | surroundings, cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-4000:]
    written = {Path(name) for name in re.findall(r"^figure written: (.+)$", run.stdout, flags=re.MULTILINE)}
    assert written == set((tmp_path / "figures").iterdir())
    assert len(written) >= 4
    for figure in written:
        data = figure.read_bytes()
        assert data.startswith(PNG_SIGNATURE)
        # A figure of these sizes with nothing but empty axes on it is smaller.
        assert len(data) > 10_000, f"{figure.name} is nearly empty"
