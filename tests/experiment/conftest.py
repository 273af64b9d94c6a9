"""Fixtures for the laws of experiments."""

import pyro
import pytest
import torch


@pytest.fixture
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def unvalidated(clean_process):
    """As in every estimator: with validation torch refuses to score what lies outside a support."""
    with pyro.validation_enabled(False):
        yield
