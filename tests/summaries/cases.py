"""The summaries that the laws are about, of vectors of `DIM` entries."""

import torch
from torch import nn

from pyro_voed.summaries import (
    ComposedSummary,
    ConvolutionalSummary,
    DeepSetSummary,
    FeedForwardSummary,
    RecurrentSummary,
    SetTransformerSummary,
)

DIM = 24

SETS = {
    "deep set": lambda **more: DeepSetSummary(3, 8, **more),
    "deep set, correlations": lambda **more: DeepSetSummary(3, 8, cross=True, **more),
    "deep set, no moments": lambda **more: DeepSetSummary(3, 8, moments=False, **more),
    "transformer": lambda **more: SetTransformerSummary(3, 8, hidden_dim=16, **more),
    "transformer, inducing": lambda **more: SetTransformerSummary(3, 8, hidden_dim=16, num_inducing=2, **more),
}
STACKABLE = SETS | {
    "feed forward": lambda: FeedForwardSummary(DIM, 8),
    "convolutional": lambda: ConvolutionalSummary(8, 3, 8),
    "composed": lambda: ComposedSummary([DeepSetSummary(2, 8)], [torch.arange(20)], dim=DIM, description="pairs"),
}
SUMMARIES = STACKABLE | {
    "LSTM": lambda: RecurrentSummary(8, 3, 8),
    "GRU, one way, last": lambda: RecurrentSummary(8, 3, 8, cell=nn.GRU, bidirectional=False, join="last"),
    "LSTM, two layers, last": lambda: RecurrentSummary(8, 3, 8, num_layers=2, join="last"),
}
