"""Imports only go down, and what touches what: laws of the layers, read from the source.

Each law gathers all its breaches, so that one failure names every file that is in the way.
"""

import ast
import sys
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "pyro_voed"
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]

LAYERS = {
    # Names of modules and packages under pyro_voed, the lowest layer first; equals may not import each other, but for
    # those in BESIDE.
    "checks": 0,
    "doubts": 0,
    "monte_carlo": 0,
    "posterior_sample": 0,
    "printing": 0,
    "censored": 0,
    "results": 0,
    "experiment": 1,
    "bounds": 1,
    "densities": 1,
    "summaries": 1,
    "training": 1,
    "certificates": 2,
    "estimators": 3,
    "inference": 3,
    "design": 4,
    "diagnostics": 4,
    "compare": 5,
    "saving": 5,
    "plots": 6,
}
BESIDE = {
    ("summaries", "densities"),
    ("results", "printing"),
    ("doubts", "monte_carlo"),
    ("posterior_sample", "printing"),
    ("posterior_sample", "results"),
}
FOUNDATIONS = {name for name, layer in LAYERS.items() if layer == 0}
TORCH_SIDE = {"bounds", "densities", "summaries", "training"}
PROGRAMS = ("poutine", "infer", "nn", "param", "sample", "plate", "primitives")
"""Parts of Pyro that a file of the torch side may not import; distributions are torch objects."""
PRIMITIVES = {"param", "sample", "plate", "poutine", "get_param_store", "module", "deterministic"}
"""And attributes of `pyro` that it may not reach."""


def part_of(path):
    """First name under the package: `densities` for densities/coupling.py, `checks` for checks.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def nodes_of(path):
    return list(ast.walk(ast.parse(path.read_text())))


@cache
def imports_of(path):
    """Every absolute module name that a file imports anywhere in it, type checking blocks included."""
    names = set()
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they point"
            own = [] if node.module == "pyro_voed" else [node.module]
            names |= {*own, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def parts_imported(path):
    """Which other parts of the package a file imports."""
    return {name.split(".")[1] for name in imports_of(path) if name.startswith("pyro_voed.")} - {part_of(path)}


def breaches(rule, *parts):
    """What a rule finds in the files of some parts, of all where none is named: nothing where it holds."""
    files = [path for path in FILES if not parts or part_of(path) in parts]
    return [f"{path.relative_to(PACKAGE)}: {found}" for path in files for found in rule(path)]


def test_every_part_has_a_layer():
    assert {part_of(path) for path in FILES} - {"problems"} <= set(LAYERS)


def test_imports_only_go_down():
    def rule(path):
        own = part_of(path)
        lower = {name for name in LAYERS if LAYERS[name] < LAYERS[own] or (own, name) in BESIDE}
        return parts_imported(path) - lower

    assert breaches(rule, *LAYERS) == []


def test_problems_stand_alone():
    allowed = {*sys.stdlib_module_names, "__future__", "pyro", "torch", "numpy", "jaxtyping", "pyro_voed"}
    assert breaches(lambda path: parts_imported(path), "problems") == []
    assert breaches(lambda path: {name.split(".")[0] for name in imports_of(path)} - allowed, "problems") == []
    assert breaches(lambda path: parts_imported(path) & {"problems"}, *LAYERS) == []


def test_densities_and_training_know_nothing_of_pyro_programs():
    def rule(path):
        forbidden = tuple(f"pyro.{name}" for name in PROGRAMS)
        reached = {
            node.attr
            for node in nodes_of(path)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pyro"
        }
        return [
            *(parts_imported(path) - TORCH_SIDE - FOUNDATIONS),
            *(name for name in imports_of(path) if name.startswith(forbidden)),
            *(reached & PRIMITIVES),
        ]

    assert breaches(rule, *TORCH_SIDE) == []


def test_the_pyro_side_has_no_networks():
    networks = ("torch.nn", "torch.optim", "pyro.nn")
    assert breaches(lambda path: parts_imported(path) & TORCH_SIDE, "experiment") == []
    assert breaches(lambda path: [name for name in imports_of(path) if name.startswith(networks)], "experiment") == []


def test_poutine_stays_where_it_belongs():
    uses = breaches(lambda path: [name for name in imports_of(path) if name.startswith("pyro.poutine")])
    assert [use for use in uses if not use.startswith(("experiment/", "inference/", "estimators/"))] == []


def test_only_the_keeper_of_the_callers_state_seeds_its_streams():
    def rule(path):
        for node in nodes_of(path):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                seeds = node.func.attr in ("set_rng_seed", "manual_seed", "manual_seed_all", "seed")
                # A generator of its own is nobody else's stream.
                own = isinstance(node.func.value, ast.Call) and getattr(node.func.value.func, "attr", "") == "Generator"
                if seeds and not own:
                    yield f"line {node.lineno} seeds; use `isolated` or `common_stream`"

    assert [found for found in breaches(rule) if not found.startswith("experiment/caller_state.py:")] == []


@cache
def import_graph():
    """Which modules of the package each of them names in its imports."""
    names = {
        ".".join(("pyro_voed", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in [*FILES, PACKAGE / "__init__.py"]
    }
    return {name: imports_of(path) & set(names) - {name} for name, path in names.items()}


def test_nested_monte_carlo_reaches_no_network():
    reached, found = set(), {"pyro_voed.estimators.nmc"}
    while found:
        reached |= found
        found = set().union(*(import_graph()[name] for name in found)) - reached
    networks = ("pyro_voed.densities", "pyro_voed.summaries", "pyro_voed.training")
    assert [name for name in sorted(reached) if name.startswith(networks)] == []


def test_no_import_circles():
    graph = dict(import_graph())
    while leaves := [name for name, imported in graph.items() if not imported]:
        graph = {name: imported - set(leaves) for name, imported in graph.items() if name not in leaves}
    assert graph == {}, f"import circle among {sorted(graph)}"


def test_nothing_of_zuko_is_imported():
    # Its import turns argument validation off in the whole process.
    assert breaches(lambda path: [name for name in imports_of(path) if name.split(".")[0] == "zuko"]) == []
