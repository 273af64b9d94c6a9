"""What the comparisons share: sides run in turn, medians and ratios, peak memory, and one table in two formats.

Two sides are run alternately, A B A B ..., so that a machine whose speed drifts slows both; the ratio is taken pair by
pair and its median reported. Memory is that of a fresh process each, as the operating system saw it.
"""

import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import pyro_voed


def describe(*packages: str) -> str:
    """Return the machine in words and the versions of what is compared."""
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in ("torch", *packages))
    threads = f"{torch.get_num_threads()} torch thread{'s' * (torch.get_num_threads() > 1)}"
    return (
        f"{os.cpu_count()}-core {platform.machine()} CPU, {threads}; Python {platform.python_version()}, {versions}, "
        f"pyro_voed {pyro_voed.__version__}"
    )


def timed(call: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """Return what a call gives and its seconds."""
    started = time.perf_counter()
    result = call(*arguments)
    return result, time.perf_counter() - started


def alternate(sides: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Run every side in turn, `repeats` times after uncounted rounds, and return their seconds.

    Args:
        sides: What to run, by name.
        repeats: Counted rounds.
        warmup: Rounds before them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warmup + repeats):
        for name, call in sides.items():
            _, taken = timed(call)
            if number >= warmup:
                seconds[name].append(taken)
    return seconds


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Return the median of the pairs' ratios."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def in_fresh_process(script: str, *arguments: Any) -> dict[str, Any]:
    """Run a script that ends by printing one JSON object, in a new interpreter, and return that object."""
    command = [sys.executable, script, *map(str, arguments)]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{' '.join(map(str, arguments))} failed: {run.stderr.strip()[-2_000:]}")
    return json.loads(run.stdout.strip().splitlines()[-1])


def peak_mebibytes() -> float:
    """Return the most memory this process has held so far (Linux).

    Not `getrusage`: its maximum is handed down from the process that started this one.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise OSError("this system does not state a process's peak memory")


def write_table(rows: Sequence[Mapping[str, Any]], path: str | None = None) -> str:
    """Return rows as a markdown table, floats to four digits; with a path, write all digits there as CSV."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if path:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell(row.get(column, "")) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def verdict(name: str, value: float, bar: float, *, at_most: bool) -> str:
    """Say whether a figure meets its bar."""
    met = value <= bar if at_most else value >= bar
    return f"{name}: {value:.4g} (bar: {'at most' if at_most else 'at least'} {bar:.4g}, {'met' if met else 'MISSED'})"


def note(message: str) -> None:
    """Say on the error stream what is going on, one line."""
    print(message, file=sys.stderr, flush=True)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
