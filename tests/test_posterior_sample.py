"""How a posterior sample shows itself: short, in full, and as a table in a notebook."""

import torch

from pyro_voed.posterior_sample import PosteriorSample
from pyro_voed.printing import MOST_ROWS


def sample(values, r_hat=None, **fields):
    effective = {name: torch.full(draws.shape[2:], 123.0) for name, draws in values.items()}
    return PosteriorSample(values, {}, "NUTS", 1.5, effective, r_hat, **fields)


def test_a_posterior_shows_moments_quantiles_and_diagnostics_of_every_column():
    draws = torch.arange(101.0).expand(2, 101)
    values = {"theta": torch.stack([draws, -draws], -1), "sigma": draws + 1000.0}
    shown = sample(values, {"theta": torch.tensor([1.0, 1.25]), "sigma": torch.tensor(1.5)}, num_divergences=3)
    assert repr(shown) == "<NUTS posterior of theta (2,), sigma (): 2 x 101 draws>"
    lines = str(shown).splitlines()
    assert lines[0] == repr(shown)[1:-1]
    assert lines[1].split() == ["mean", "sd", "5", "%", "50", "%", "95", "%", "ESS", "R-hat"]
    assert [line.split() for line in lines[2:5]] == [
        ["theta[0]", "50", "29.23", "5", "50", "95", "123", "1.000"],
        ["theta[1]", "-50", "29.23", "-95", "-50", "-5", "123", "1.250"],
        ["sigma", "1050", "29.23", "1005", "1050", "1095", "123", "1.500"],
    ]
    assert lines[5:] == ["3 divergent transitions", "1.5 s"]
    table = shown._repr_html_()
    assert "<tr><td>theta[1]</td><td>-50</td><td>29.23</td>" in table
    assert table.count("<tr>") == 4


def test_what_is_not_known_is_not_shown_and_long_tables_are_cut():
    shown = str(sample({"m": torch.randn(1, 50, MOST_ROWS + 2)}, log_evidence=-1.0, log_evidence_error=0.5))
    assert "R-hat" not in shown
    assert "divergent" not in shown
    assert "log evidence -1.0000 +- 0.5000 nats" in shown
    assert f"m[{MOST_ROWS - 1}]" in shown
    assert f"m[{MOST_ROWS}]" not in shown
    assert "and 2 more columns" in shown
