"""What the scripts of the paper's cases share: parts that are kept on disk as they end, and figures.

A study is a list of named parts. Each part's result is written to the folder of parts as soon as it is there, together
with the settings it was made with; called again, the script reads what is there and goes on with what is missing. A
part whose settings have changed is made anew. Delete the folder, or give `--fresh`, to start over.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure


class Study:
    """Run the parts of one case, keep their results, write its figures.

    Args:
        case: Name of the case, the folder of its parts.
        description: First line of what `--help` prints.
        parts: Names of the parts that may be chosen with `--only`.
    """

    def __init__(self, case: str, description: str, parts: Sequence[str]) -> None:
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--quick", action="store_true", help="tiny sizes, under a minute; the numbers mean nothing")
        parser.add_argument("--only", nargs="+", choices=parts, default=list(parts), help="only these parts")
        parser.add_argument("--fresh", action="store_true", help="forget the parts that are kept")
        parser.add_argument("--out", type=Path, default=Path("figures/paper"), help="folder of parts and figures")
        parser.add_argument("--figures", type=Path, help="folder of figures; without it they lie in that of --out")
        options = parser.parse_args()
        torch.set_num_threads(1)
        self.quick: bool = options.quick
        self.chosen: list[str] = options.only
        self.case = case
        # A smoke run's numbers must never be taken for a study's.
        self.folder = options.out / (f"{case}_quick" if self.quick else case)
        self.figures = options.figures or options.out
        if options.fresh:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.figures.mkdir(parents=True, exist_ok=True)

    def size(self, full: int, quick: int) -> int:
        """Return the size of the study, or that of the smoke run."""
        return quick if self.quick else full

    @property
    def passes(self) -> dict[str, int]:
        """Settings of a training on a pool, which the study ends where it no longer improves, the smoke run at once."""
        return {"max_epochs": 2} if self.quick else {}

    def part(self, name: str, compute: Callable[..., Any], **settings: Any) -> Any:
        """Return `compute(**settings)`, read from disk where it was made with the same settings before.

        Args:
            name: Of the part, a file name.
            compute: Gives numbers, strings, tensors, and lists, tuples and dictionaries of these.
            settings: Its arguments, of the same kinds.
        """
        path = self.folder / f"{name}.pt"
        if path.exists():
            kept = torch.load(path, weights_only=True)
            if kept["settings"] == settings:
                self._say(f"{name}: kept, {kept['seconds']:.0f} s when it was made")
                return kept["result"]
        self._say(f"{name} ...")
        started = time.perf_counter()
        result = compute(**settings)
        seconds = time.perf_counter() - started
        # Renamed when whole, so that a run cut off while writing leaves no half of a part.
        unfinished = path.with_suffix(".unfinished")
        torch.save({"settings": settings, "seconds": seconds, "result": result}, unfinished)
        unfinished.rename(path)
        self._say(f"{name}: {seconds:.0f} s")
        return result

    def save(self, figure: Figure, name: str) -> None:
        """Write a figure as `<case>_<name>.png` and say where."""
        path = self.figures / f"{self.case}_{name}.png"
        figure.savefig(path, dpi=110)
        print(f"figure: {path}")

    def _say(self, message: str) -> None:
        print(f"[{self.case}] {message}", file=sys.stderr, flush=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table in Markdown, ready for a page of the documentation."""
    print(f"\n{title}\n")
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)
