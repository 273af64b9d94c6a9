"""What an entry of the suite holds: a model as a practitioner writes it, and its exact information gain."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SuiteModel:
    """One experiment with a known expected information gain.

    Attributes:
        name: Name of the model, also that of its twin and of its exact value.
        family: Kind of model, the name of its file.
        model: A Pyro program without arguments; its designs, if any, are `pyro.param`.
        observation_labels: Outcome sites.
        target_labels: Sites to learn about.
        exact: Expected information gain, nats.
        error: Numerical or statistical error of `exact`, nats.
        how: How `exact` was computed.
    """

    name: str
    family: str
    model: Callable[[], Any]
    observation_labels: tuple[str, ...]
    target_labels: tuple[str, ...]
    exact: float
    error: float
    how: str
