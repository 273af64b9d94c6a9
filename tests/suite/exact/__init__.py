"""Exact values by name: functions that return the expected information gain in nats and its error.

None of them knows of Pyro or of the library.
"""

from tests.suite.exact import counts, glm, regression, tails

EXACT = {**regression.EXACT, **glm.EXACT, **tails.EXACT, **counts.EXACT}
