"""Exact values by name: functions that return the expected information gain in nats and its error.

None of them knows of Pyro or of the library.
"""

from importlib import import_module

from tests.suite.catalogue import FAMILIES

EXACT = {
    name: function
    for family in FAMILIES
    for name, function in import_module(f"tests.suite.exact.{family}").EXACT.items()
}
