r"""Outcomes as a network sees them: bent where their tails are heavy, then whitened.

*Set apart.* Values of an entry that come again and again among others that do not (a detector's limits, the zeros of
rain) are moved away from the rest, by :math:`\operatorname{sign}(x - v)` standard deviations (by the quartiles) for
each such value v: a smooth function can then tell a reading at the limit from one just below.

*Bent.* Where the largest of the simulated values of an entry lies far outside the bulk, :math:`\operatorname{arsinh}`
of its distance from the median in quartile ranges replaces it: linear in the bulk, logarithmic in the tails. Otherwise
a few extreme values would set the scale, and all others would look alike.

*Whitened.* With correlation matrix :math:`P` of the standardised entries, :math:`z = P^{-1/2} (x - \mu) / \sigma`. The
symmetric root keeps each entry as close as possible to what it was, so that a threshold in one entry stays one. Where
outcomes are strongly correlated, the directions in which they differ little are often those that tell most; with
standardised entries a network sees them at a thousandth of the size of the others. Beyond `FAR` standard deviations z
grows like a logarithm: outcomes that the pilot has not seen do not drive a network to extremes.

Entries stand in *rows*: a vector without rows is one row, a set has many, whose columns share scale and correlations,
so that permuting the rows still changes nothing. Sums are taken in double precision, in which small directions survive.
Directions whose variance is rounding are dropped. Where the pilot is short for a row, :math:`P` is shrunk towards the
identity by the weight of least expected squared error.

All of this is monotone in each entry or linear, taken from a pilot, and of what is seen, never of what is scored.

References:
    Kessy, Lewin and Strimmer (2018), "Optimal whitening and decorrelation", The American Statistician 72.
    Ledoit and Wolf (2004), "A well-conditioned estimator for large-dimensional covariance matrices", Journal of
    Multivariate Analysis 88.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pyro_voed.checks import check_count
from pyro_voed.densities.rebuilding import rebuildable
from pyro_voed.densities.standardise import InDouble, Standardise

MAX_ROW = 256
"""Longest row that is whitened: a pilot of a thousand knows no more correlations."""

ENOUGH = 4
"""Simulated rows for each column from which correlations are taken as they are."""

HEAVY = 20.0
"""Distance from the median, in standard deviations by the quartiles, beyond which an entry has heavy tails."""

LIGHT = 5.0
"""Distance, measured alike, within which an entry that was bent is no longer."""

FAR = 8.0

MOST_TIES = 2
"""Values of an entry, those that come most often, that can be set apart."""

TIED, STILL_TIED = 0.03, 0.003
"""Shares of the simulated values from which, and down to which, one value is set apart."""

LOOSE = 0.1
"""Share of the values that must come only once: where all come again and again they are counts or labels."""

Layout = tuple[Int[Tensor, " dim"], Int[Tensor, " dim"]]
"""Row and column of every entry of a vector. Entries of one column share a scale, those of column -1 have none."""


@rebuildable
class Whitening(InDouble):
    """Bend and standardise vectors and whiten their rows; the identity until fitted.

    Args:
        dim: Dimension of the vectors.
        rows: Row of each entry; rows of equal columns share correlations. Default: all in one row.
        columns: Column of each entry, see `Layout`. Default: each its own.

    Example:
        >>> x = torch.randn(2_000, 1) + 0.01 * torch.randn(2_000, 2)
        >>> z = Whitening(2).fit_(x)(x)
        >>> torch.allclose(torch.cov(z.mT), torch.eye(2).double(), atol=1e-3)
        True
    """

    median: Tensor
    spread: Tensor
    bent: Tensor
    ties: Tensor
    jumps: Tensor
    rest: Tensor
    order: Tensor

    def __init__(self, dim: int, rows: Sequence[int] | None = None, columns: Sequence[int] | None = None) -> None:
        super().__init__()
        self.dim = check_count(dim, "dim", minimum=0)
        rows = [0] * dim if rows is None else rows
        columns = range(dim) if columns is None else columns
        self.register_buffer("median", torch.zeros(dim, dtype=torch.double))
        self.register_buffer("spread", torch.ones(dim, dtype=torch.double))
        self.register_buffer("bent", torch.zeros(dim, dtype=torch.bool))
        self.register_buffer("ties", torch.zeros(MOST_TIES, dim, dtype=torch.double))
        self.register_buffer("jumps", torch.zeros(MOST_TIES, dim, dtype=torch.double))
        self.scaling = Standardise(dim, columns).double()
        blocks = _equal_rows(rows, columns)
        self.num_blocks = len(blocks)
        for number, entries in enumerate(blocks):
            self.register_buffer(f"entries_{number}", entries, persistent=False)
            self.register_buffer(f"matrix_{number}", torch.eye(entries.shape[1], dtype=torch.double))
        whitened = torch.cat([torch.zeros(0, dtype=torch.long), *(entries.flatten() for entries in blocks)])
        rest = torch.ones(dim, dtype=torch.bool).index_fill_(0, whitened, False).nonzero().flatten()
        self.register_buffer("rest", rest, persistent=False)
        self.register_buffer("order", torch.cat([whitened, rest]).argsort(), persistent=False)

    @torch.no_grad()
    def fit_(self, x: Float[Tensor, "num dim"]) -> Whitening:
        """Take all from at least two simulations, in place and without gradient; errors as of `Standardise.fit_`."""
        self._fit_bend(x.double())
        bent = self._bend(x.double())
        self.scaling.fit_(bent, x.dtype)
        z = self.scaling(bent)
        # What rounding leaves of an entry, in its own standard deviations.
        rounding = 4.0 * torch.finfo(x.dtype).eps * (bent / self.scaling.scale).abs().amax(0)
        for number in range(self.num_blocks):
            entries = self.get_buffer(f"entries_{number}")
            root = _inverse_root(z[:, entries].flatten(0, 1), rounding[entries].max())
            self.get_buffer(f"matrix_{number}").copy_(root)
        return self

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Return z, in double precision."""
        z = self.scaling(self._bend(x.double()))
        parts = []
        for number in range(self.num_blocks):
            entries = self.get_buffer(f"entries_{number}")
            own = z.index_select(-1, entries.flatten()).unflatten(-1, entries.shape)
            parts.append((own @ self.get_buffer(f"matrix_{number}")).flatten(-2))
        if parts:
            z = torch.cat([*parts, z.index_select(-1, self.rest)], -1).index_select(-1, self.order)
        return _drawn_in(z)

    def _bend(self, x: Tensor) -> Tensor:
        apart = x + (self.jumps * torch.sign(x.unsqueeze(-2) - self.ties)).sum(-2)
        return torch.where(self.bent, torch.asinh((apart - self.median) / self.spread), apart)

    def _fit_ties(self, own: Tensor, values: Float[Tensor, " num"], jump: Tensor) -> None:
        """Find the values of a column that come again and again among others that do not."""
        found, counts = values.unique(return_counts=True)
        known = (found[:, None] == self.ties[:, own][:, 0]).logical_and(self.jumps[:, own][:, 0] > 0.0).any(-1)
        share = counts / len(values)
        apart = (share >= TIED) | (known & (share >= STILL_TIED))
        apart &= (counts == 1).sum() >= LOOSE * len(values)
        chosen = torch.where(apart, counts, 0).topk(min(MOST_TIES, len(found))).indices
        chosen = chosen[apart[chosen]]
        self.ties[:, own], self.jumps[:, own] = 0.0, 0.0
        self.ties[: len(chosen), own] = found[chosen].unsqueeze(-1)
        self.jumps[: len(chosen), own] = jump

    def _fit_bend(self, x: Tensor) -> None:
        """Find ties, and the entries with heavy tails, those of one column together."""
        if x.ndim != 2 or len(x) < 2 or not x.isfinite().all():
            return  # `Standardise.fit_` says what is wrong
        groups = self.scaling.groups
        for group in groups[groups >= 0].unique().tolist():
            own = groups == group
            values = x[:, own].flatten()
            values = values[:: max(1, len(values) // 100_000)]
            low, median, high = values.quantile(values.new_tensor([0.25, 0.5, 0.75]))
            spread = (high - low) / 1.349
            self._fit_ties(own, values, spread if spread > 0.0 else values.std())
            # Once bent it stays so while tails are anywhere near: where designs move, a map that comes and goes would
            # throw the density back each time.
            limit = LIGHT if self.bent[own].all() else HEAVY
            heavy = spread > 0.0 and (values - median).abs().max() > limit * spread
            self.bent[own], self.median[own], self.spread[own] = bool(heavy), median, spread if heavy else 1.0


def layout_of(summary: nn.Module | None, dim: int) -> Layout:
    """Return rows and columns of what a summary sees: one row without a summary, rows of one where it does not say.

    Example:
        >>> from pyro_voed.summaries import DeepSetSummary
        >>> layout_of(DeepSetSummary(row_dim=2), 4)  # two rows of two
        (tensor([0, 0, 1, 1]), tensor([0, 1, 0, 1]))
    """
    places = torch.arange(dim)
    if summary is None or isinstance(summary, nn.Identity):
        return torch.zeros_like(places), places
    own = getattr(summary, "layout", None)
    return (places, places) if own is None else own(dim)


def context_layout(summary: nn.Module | None, context_dim: int, *, num_designs: int) -> tuple[list[int], list[int]]:
    """Return rows and columns of outcomes followed by designs, each of which is a row and a column of its own."""
    rows, columns = layout_of(summary, context_dim - num_designs)
    own = torch.arange(num_designs) + 1
    first_row, first_column = (int(part.max()) if len(part) else -1 for part in (rows, columns))
    return [*rows.tolist(), *(own + first_row).tolist()], [*columns.tolist(), *(own + first_column).tolist()]


def fixed_features_of(
    summary: nn.Module | None, z: Float[Tensor, "*batch dim"]
) -> Float[Tensor, "*batch num_features"]:
    """Return what is known of whitened outcomes without any weights: what the summary says, else they themselves."""
    own = getattr(summary, "fixed_features", None)
    if own is not None:
        return own(z)
    return z if z.shape[-1] <= MAX_ROW else z[..., :0]


def _drawn_in(z: Tensor) -> Tensor:
    beyond = (z.abs() - FAR).clamp(min=0.0)
    return torch.where(beyond > 0.0, z.sign() * (FAR + beyond.log1p()), z)


def _equal_rows(rows: Sequence[int], columns: Sequence[int]) -> list[Int[Tensor, "num_rows row_dim"]]:
    """Return the entries of rows of several columns, together where the columns are the same."""
    places: dict[int, list[int]] = {}
    for entry, (row, column) in enumerate(zip(rows, columns, strict=True)):
        if column >= 0:
            places.setdefault(row, []).append(entry)
    found: dict[tuple[int, ...], list[list[int]]] = {}
    for entries in places.values():
        if 1 < len(entries) <= MAX_ROW:
            own = sorted(entries, key=lambda entry: columns[entry])
            found.setdefault(tuple(columns[entry] for entry in own), []).append(own)
    return [torch.tensor(entries) for entries in found.values()]


def _inverse_root(z: Float[Tensor, "num dim"], rounding: Tensor) -> Float[Tensor, "dim dim"]:
    """Return the symmetric inverse root of the covariance of draws, without directions of rounding."""
    num, dim = z.shape
    z = z - z.mean(0)
    covariance = z.mT @ z / num
    if num < ENOUGH * dim:
        covariance = torch.lerp(covariance, covariance.diagonal().diag(), _shrinkage(z, covariance))
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > dim * rounding.square()
    return (vectors * torch.where(kept, values, torch.inf).rsqrt()) @ vectors.mT


def _shrinkage(z: Tensor, covariance: Tensor) -> Tensor:
    """Return the weight of the diagonal at which the squared error of a covariance matrix is expected to be least."""
    squares = z.square()
    noise = (squares.mT @ squares / len(z) - covariance.square()).sum() / len(z)
    distance = (covariance - covariance.diagonal().diag()).square().sum()
    return (noise / distance.clamp(min=torch.finfo(z.dtype).tiny)).clamp(0.0, 1.0)
