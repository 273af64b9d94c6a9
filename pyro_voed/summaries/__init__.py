"""Networks that turn an outcome into learned statistics.

All take standardised outcomes packed into vectors, `(*batch, dim)`, and give `(*batch, summary_dim)`; any
`torch.nn.Module` that does so can stand in their place.
"""

from pyro_voed.summaries.composed import ComposedSummary
from pyro_voed.summaries.convolutional import ConvolutionalSummary
from pyro_voed.summaries.deep_set import DeepSetSummary
from pyro_voed.summaries.feed_forward import FeedForwardSummary
from pyro_voed.summaries.moments import row_moments
from pyro_voed.summaries.recurrent import RecurrentSummary
from pyro_voed.summaries.set_transformer import SetTransformerSummary

__all__ = [
    "ComposedSummary",
    "ConvolutionalSummary",
    "DeepSetSummary",
    "FeedForwardSummary",
    "RecurrentSummary",
    "SetTransformerSummary",
    "row_moments",
]
