"""Estimators that a user may write, known exactly but for their noise."""

import pytest
import torch

from pyro_voed import Experiment
from pyro_voed.results import EIGResult, FitHistory, Learned


@pytest.fixture
def own_estimator():
    """A function that makes an estimator: of a model and a height at its designs, with normal noise.

    Each estimate costs 7 simulations, `calls` takes the designs of every call, and call number `interrupted` is an
    estimate whose training Ctrl-C ended.
    """

    def make(model, height, noise, *, calls=None, interrupted=None):
        experiment = Experiment(model, "y", "theta")
        calls = [] if calls is None else calls

        def estimator(designs):
            calls.append(designs)
            full = {**experiment.design_values, **designs}
            value = height(**full)
            cut = len(calls) == interrupted
            history = FitHistory(torch.zeros(5), torch.ones(5), "interrupted" if cut else "budget", 0.0)
            return EIGResult(
                eig=value + noise * torch.randn_like(value) + 100.0 * cut,
                standard_error=torch.full_like(value, noise),
                bound="neither",
                estimator="own",
                num_simulations=7 * value.numel(),
                num_samples=7,
                seconds=0.0,
                designs=full,
                target_labels=("theta",),
                observation_labels=("y",),
                experiment=experiment,
                learned=Learned("density", history=history),
            )

        return estimator

    return make
