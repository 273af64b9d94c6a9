"""Two-sided intervals, what choosing by them may cost, and what bounds leave open of a density's divergence."""

from pyro_voed.certificates.certificate import certify, max_regret
from pyro_voed.certificates.gap import BoundGap, bound_gap

__all__ = ["BoundGap", "bound_gap", "certify", "max_regret"]
