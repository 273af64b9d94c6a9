"""Estimators that a user may write, known exactly but for their noise."""

import pytest
import torch

from pyro_voed import Experiment
from pyro_voed.results import EIGResult, FitHistory, Learned


@pytest.fixture
def own_estimator():
    """Make an estimator of a model: a height at its designs with normal noise, for 7 simulations each.

    `calls` takes the designs of every call; of call number `interrupted` Ctrl-C ended the training.
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
