"""All models of the suite by name, and their twins."""

from importlib import import_module

FAMILIES = (
    "regression", "glm", "survival", "processes", "hierarchies", "counts", "choices", "tails", "mixtures", "discrete",
    "science",
)  # fmt: skip
MODELS = {entry.name: entry for family in FAMILIES for entry in import_module(f"tests.suite.{family}").MODELS}
TWINS = {name: twin for family in FAMILIES for name, twin in import_module(f"tests.suite.twins.{family}").TWINS.items()}
