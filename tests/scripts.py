"""Scripts run as a user runs them: in a process of their own, without the shape checks of the tests."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_script(*command, cwd=ROOT, **environment):
    """Run Python with these arguments and return the finished process, which must have ended well."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    surroundings = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"} | environment
    finished = subprocess.run([sys.executable, *command], env=surroundings, cwd=cwd, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return finished
