"""Posteriors of one outcome: NUTS as the reference, the trained flow as the fast answer."""

from pyro_voed.inference.flow import FlowGuide, flow_guide, flow_posterior
from pyro_voed.inference.nuts import nuts_posterior

__all__ = ["FlowGuide", "flow_guide", "flow_posterior", "nuts_posterior"]
