"""Training: one loop for everything that learns, and the two ways to feed it."""

from pyro_voed.training.settings import Fresh, Pool

__all__ = ["Fresh", "Pool"]
