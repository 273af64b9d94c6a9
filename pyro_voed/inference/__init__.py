"""Posteriors of one outcome: NUTS, SMC and ABC as references, the trained flow as the fast answer."""

from pyro_voed.inference.flow import FlowGuide, flow_guide, flow_posterior
from pyro_voed.inference.reference.abc import abc_posterior
from pyro_voed.inference.reference.nuts import nuts_posterior
from pyro_voed.inference.reference.smc import smc_posterior

__all__ = ["FlowGuide", "abc_posterior", "flow_guide", "flow_posterior", "nuts_posterior", "smc_posterior"]
