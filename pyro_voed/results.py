"""What the library gives back: frozen records, whose type never depends on a flag.

Every number comes with its standard error, the direction of its bias, and what it cost. All information is in nats.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

Bound = Literal["lower", "upper", "consistent", "neither"]
"""Which way an estimate errs. "consistent": biased at any finite size, exact in the limit (the docstring of the
estimator says to which side); "neither": no side is guaranteed."""

StopReason = Literal["converged", "budget", "early stopping", "interrupted", "not trained"]


@dataclass(frozen=True)
class FitHistory:
    """What happened in training.

    Attributes:
        bound: Mean of the terms of each step's minibatch, in nats, `(num_steps,)`.
        validation: Mean of the terms on the validation simulations, one entry an epoch; None for fresh simulations.
        learning_rate: Factor on the learning rates at each step, in [0, 1].
        stop_reason: Why training ended. "budget" means that the fit was still improving.
        seconds: Wall time.
    """

    bound: Float[Tensor, " num_steps"]
    learning_rate: Float[Tensor, " num_steps"]
    stop_reason: StopReason
    seconds: float
    validation: Float[Tensor, " num_epochs"] | None = None

    @property
    def num_steps(self) -> int:
        """Gradient steps taken."""
        return self.bound.shape[0]

    @property
    def converged(self) -> bool:
        """Whether the fit had stopped improving by more than its noise when training ended."""
        return self.stop_reason in ("converged", "early stopping")

    def __str__(self) -> str:
        # What improves may be a lower bound that rises, an upper one that falls, or neither.
        improving = " (the fit was still improving)" if self.stop_reason == "budget" else ""
        return f"training: {self.num_steps} steps, stopped by {self.stop_reason}{improving}"


@dataclass(frozen=True)
class Certificate:
    """A two-sided interval and what it rests on.

    Attributes:
        interval: `[lower - z se, upper + z se]` in nats, `(2, *design_batch)`; over several designs all hold together.
        confidence: Probability with which it holds the truth.
        lower: Lower bound (ACE), nats.
        lower_standard_error: Its standard error.
        upper: Upper bound (VNMC), nats.
        upper_standard_error: Its standard error.
        pareto_k: Tail index of the terms.
        certified: Whether every tail index allows the standard errors to be trusted.
        width_reached: Whether the width asked for was reached within the budget.
        num_flow_samples: Draws of the first level, the flow's own terms, at each design.
        num_outer_samples: Draws of the second level at each design.
        num_inner_samples: Proposal draws for each of them at each design.
        num_simulations: Experiments simulated.
        seconds: Wall time.
    """

    interval: Tensor
    confidence: float
    lower: Tensor
    lower_standard_error: Tensor
    upper: Tensor
    upper_standard_error: Tensor
    pareto_k: Tensor
    certified: bool
    width_reached: bool
    num_flow_samples: tuple[int, ...]
    num_outer_samples: tuple[int, ...]
    num_inner_samples: tuple[int, ...]
    num_simulations: int
    seconds: float

    def __str__(self) -> str:
        word = "certified" if self.certified else "uncertified"
        low, high = self.interval
        one = low.numel() == 1
        ends = f"[{low.item():.4f}, {high.item():.4f}]" if one else f"{shortened(low)} to {shortened(high)}"
        return f"{word} {self.confidence:.0%} interval {ends} nats"


@dataclass(frozen=True)
class CollapseCheck:
    """What a learned posterior knows of each target coordinate, beside what a plain regression does.

    Attributes:
        columns: Names of the packed target coordinates.
        contraction: One less the mean posterior variance over the prior variance, `(theta_dim,)`; never clamped.
        contraction_standard_error: Its standard error.
        recovered: Share of the prior variance that the posterior mean explains; negative where it does harm.
        recovered_standard_error: Its standard error.
        probed: Share that a ridge regression on plain features of the outcome explains, on held-out experiments.
        probed_standard_error: Its standard error.
        collapsed: Coordinates of which the probe finds something and the posterior knows less than half of that.
    """

    columns: tuple[str, ...]
    contraction: Float[Tensor, " theta_dim"]
    contraction_standard_error: Float[Tensor, " theta_dim"]
    recovered: Float[Tensor, " theta_dim"]
    recovered_standard_error: Float[Tensor, " theta_dim"]
    probed: Float[Tensor, " theta_dim"]
    probed_standard_error: Float[Tensor, " theta_dim"]
    collapsed: tuple[str, ...]

    def __str__(self) -> str:
        width = max(len(name) for name in self.columns)
        rows = zip(self.columns, self.contraction.tolist(), self.recovered.tolist(), self.probed.tolist(), strict=True)
        return "\n".join(
            f"{name:<{width}s}  contraction {contraction:+.3f}, explained by posterior {recovered:+.3f}, by probe "
            f"{probed:+.3f}" + ("  COLLAPSED" if name in self.collapsed else "")
            for name, contraction, recovered, probed in rows
        )


@dataclass(frozen=True)
class Learned:
    """What was learned on the way to an estimate.

    Attributes:
        density: The trained conditional density (or pair of densities, or critic).
        of_targets: Whether it is a density of the targets given the outcome: a posterior.
        attains: Whether the estimate is this density's own Barber-Agakov bound, so that what it lacks is the density's
            expected divergence from the posterior.
        history: Training record; None where the density was used as it was.
        outcome_range: Smallest and largest packed outcome in the simulations, `(2, y_dim)`.
        learning_rate: The rate chosen, at each design of an ensemble, where several were given.
        collapse: What the density knows of each target, where that was checked.
    """

    density: Any = field(repr=False)
    of_targets: bool = False
    attains: bool = False
    history: FitHistory | None = None
    outcome_range: Float[Tensor, "2 y_dim"] | None = field(default=None, repr=False)
    learning_rate: Tensor | None = None
    collapse: CollapseCheck | None = field(default=None, repr=False)

    @property
    def summary(self) -> str | None:
        """What makes learned statistics of the outcome, in words; None where the density sees it as it is."""
        module = getattr(self.density, "summary", None)
        return None if module is None else getattr(module, "description", type(module).__name__)

    def __str__(self) -> str:
        lines = [] if self.summary is None else [f"summary: {self.summary}"]
        if self.collapse is not None and self.collapse.collapsed:
            lines.append(f"hardly learned: {', '.join(self.collapse.collapsed)}")
        if self.history is not None:
            lines.append(str(self.history))
        return "\n".join(lines)


@dataclass(frozen=True)
class WeightCheck:
    """Whether averages of exponentials can be trusted.

    Attributes:
        passed: Whether the checks allow the standard error to be trusted; None where no side rests on them.
        pareto_k: Tail index of the terms, `(*design_batch)`: above 0.7 a mean's standard error cannot be trusted.
        effective_sample_size: Effective number of draws behind an exponential average.
    """

    passed: bool | None
    pareto_k: Tensor | None = None
    effective_sample_size: float | None = None


@dataclass(frozen=True)
class EIGResult:
    """An estimate of the expected information gain at one design, or at each of a batch.

    Attributes:
        eig: Estimate in nats, of the shape of the design batch. Never clamped: it may be negative.
        standard_error: Monte Carlo standard error of `eig` in nats, same shape.
        bound: Which way the estimate errs.
        estimator: Name of the function that made it.
        num_simulations: Experiments simulated, the checks and pilots included.
        num_samples: Independent terms behind each entry of `eig`.
        seconds: Wall time.
        designs: Design values it holds for, `(*design_batch, *shape)` each.
        target_labels: Sites the information is about.
        observation_labels: Sites that are observed.
        nuisance_labels: Random sites that are neither.
        experiment: What was read from the model.
        learned: What was learned on the way; None where nothing was.
        weights: Whether exponential averages can be trusted; None where there are none.
        certificate: Two-sided interval; None where it was not asked for.
        references: Other estimates at the same designs, as asked for.
    """

    eig: Float[Tensor, "*design_batch"]
    standard_error: Float[Tensor, "*design_batch"]
    bound: Bound
    estimator: str
    num_simulations: int
    num_samples: int
    seconds: float
    designs: Mapping[str, Tensor]
    target_labels: tuple[str, ...]
    observation_labels: tuple[str, ...]
    nuisance_labels: tuple[str, ...] = ()
    experiment: Any = field(default=None, repr=False)
    learned: Learned | None = None
    weights: WeightCheck | None = None
    certificate: Certificate | None = None
    references: tuple[EIGResult, ...] = ()

    @property
    def density(self) -> Any:
        """What was learned; None where nothing was."""
        return None if self.learned is None else self.learned.density

    @property
    def history(self) -> FitHistory | None:
        """Training record; None where nothing was trained."""
        return None if self.learned is None else self.learned.history

    @property
    def interval(self) -> Tensor | None:
        """Two-sided interval in nats, `(2, *design_batch)`; None where it was not asked for."""
        return None if self.certificate is None else self.certificate.interval

    def __repr__(self) -> str:
        return f"<{_estimate_line(self)}{_where(self)}>"

    def __str__(self) -> str:
        lines = [_estimate_line(self) + _where(self), *(_estimate_line(other) for other in self.references)]
        if self.certificate is not None:
            lines.append(str(self.certificate))
        lines.append(_about(self))
        if self.learned is not None and str(self.learned):
            lines.append(str(self.learned))
        lines.append(_cost(self))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = [("design", _where(self).removeprefix(" at ") or "none")]
        rows += [_estimate_row(estimate) for estimate in (self, *self.references)]
        if self.certificate is not None:
            rows.append(("interval", str(self.certificate)))
        rows.append(("about", _about(self)))
        if self.history is not None:
            rows.append(("training", str(self.history).removeprefix("training: ")))
        return html_table([*rows, ("cost", _cost(self))])


@dataclass(frozen=True)
class DesignResult:
    """The best design found and its expected information gain.

    Attributes:
        final: The estimate at the best design, on simulations that took no part in the search.
        num_simulations: Experiments simulated in all.
        seconds: Wall time.
        path: Designs during the search of the winning start, `(num_records, *shape)` each; None where candidates were
            compared and nothing climbed.
        path_steps: Number of steps taken when each entry of the path was recorded, zero at the start.
        history: Training record of the winning start; None where nothing climbed.
        start_eigs: Selection estimate of every start in nats, `(num_starts,)`; None where nothing climbed.
        candidates: The estimates that candidates were compared by, one entry a candidate, which `plot_eig_surface` and
            its relatives draw. The largest of them errs upwards. None where designs climbed.
        initial: The estimate at the starting design, where it was asked for or made on the way.
        interrupted: The search was ended by Ctrl-C; the best of what was complete by then is given.
    """

    final: EIGResult
    num_simulations: int
    seconds: float
    path: Mapping[str, Tensor] | None = field(default=None, repr=False)
    path_steps: Tensor | None = field(default=None, repr=False)
    history: FitHistory | None = None
    start_eigs: Tensor | None = None
    candidates: EIGResult | None = field(default=None, repr=False)
    initial: EIGResult | None = None
    interrupted: bool = False

    @property
    def designs(self) -> Mapping[str, Tensor]:
        """Best design, one entry a design label, as in the parameter store."""
        return self.final.designs

    @property
    def eig(self) -> Tensor:
        """Estimate in nats at the best design."""
        return self.final.eig

    @property
    def standard_error(self) -> Tensor:
        """Its Monte Carlo standard error in nats."""
        return self.final.standard_error

    @property
    def bound(self) -> Bound:
        """Which way the estimate errs."""
        return self.final.bound

    @property
    def density(self) -> Any:
        """What was learned along with the best design; None where nothing was."""
        return self.final.density

    @property
    def experiment(self) -> Any:
        """What was read from the model, at the best design."""
        return self.final.experiment

    def __repr__(self) -> str:
        return f"<best{_where(self.final, most=4)}: {_estimate_line(self.final)}>"

    def __str__(self) -> str:
        lines = []
        if self.initial is not None:
            lines.append("at the start:  " + _estimate_line(self.initial))
        lines.append("at the best:   " + _estimate_line(self.final))
        lines += [f"  {name} = {shortened(value)}" for name, value in self.designs.items()]
        return "\n".join([*lines, f"{self._search()}; {_cost(self)}"])

    def _repr_html_(self) -> str:
        rows = [] if self.initial is None else [("at the start", _estimate_row(self.initial)[1])]
        rows.append(("at the best", _estimate_row(self.final)[1]))
        rows += [(name, shortened(value)) for name, value in self.designs.items()]
        return html_table([*rows, ("search", self._search()), ("cost", _cost(self))])

    def _search(self) -> str:
        words = [] if self.history is None else [str(self.history).removeprefix("training: ")]
        if self.candidates is not None:
            values, errors = self.candidates.eig, self.candidates.standard_error
            best = int(values.argmax())
            words.append(f"best of {len(values)} candidates, where it had {values[best]:.4f} +- {errors[best]:.4f}")
        if self.interrupted and (self.history is None or self.history.stop_reason != "interrupted"):
            words.append("interrupted")
        return "; ".join(words)


MOST_ROWS = 40
"""Columns of a posterior that are shown."""


@dataclass(frozen=True, repr=False)
class PosteriorSample:
    """Draws from the posterior of one outcome, whatever made them.

    Attributes:
        values: Draws of each site, `(num_chains, num_draws, *shape)`.
        observations: The outcome conditioned on.
        method: "NUTS", "SMC", "ABC" or "flow".
        seconds: Wall time.
        r_hat: Split R-hat of each site (SMC: R-hat between runs), `(*shape)`; None for independent draws.
        effective_sample_size: Effective number of draws of each site, `(*shape)`.
        num_divergences: Divergent transitions; None where there are none by construction.
        inference_data: The same as an ArviZ `InferenceData`.
        log_evidence: Log of p(y at the design), nats, the outcome in its own coordinates; None where not estimated.
        log_evidence_error: Its standard error, nats.
        acceptance_rate: Share of proposals (SMC) or simulations (ABC) accepted, one tensor a chain with one entry a
            temperature or population.
        temperatures: Powers of the likelihood that SMC went through, one tensor a chain, the last entry 1.
        tolerance: Largest distance accepted by ABC, in standardised statistics.
        num_simulations: Runs of the model, in experiments; None where they are not counted.
    """

    values: Mapping[str, Tensor]
    observations: Mapping[str, Tensor]
    method: str
    seconds: float
    effective_sample_size: Mapping[str, Tensor]
    r_hat: Mapping[str, Tensor] | None = None
    num_divergences: int | None = None
    inference_data: Any = field(default=None, repr=False)
    log_evidence: float | None = None
    log_evidence_error: float | None = None
    acceptance_rate: tuple[Tensor, ...] | None = field(default=None, repr=False)
    temperatures: tuple[Tensor, ...] | None = field(default=None, repr=False)
    tolerance: float | None = None
    num_simulations: int | None = None

    def flat(self, name: str) -> Tensor:
        """Return the draws of one site with the chains joined, `(num_chains * num_draws, *shape)`."""
        return self.values[name].flatten(0, 1)

    def matrix(self) -> Float[Tensor, "num_draws dim"]:
        """Return all sites side by side, flattened, in the order of `values`."""
        return torch.cat([self.flat(name).unsqueeze(-1).flatten(1) for name in self.values], dim=-1)

    @property
    def columns(self) -> list[str]:
        """Names of the columns of `matrix`, such as `theta[0]`."""
        return [element for name, draws in self.values.items() for element in element_names(name, draws.shape[2:])]

    def __repr__(self) -> str:
        num_chains, num_draws = next(iter(self.values.values())).shape[:2]
        sites = ", ".join(f"{name} {tuple(draws.shape[2:])}" for name, draws in self.values.items())
        return f"<{self.method} posterior of {sites}: {num_chains} x {num_draws:,} draws>"

    def __str__(self) -> str:
        rows = self._table()
        widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.rjust, row[1:], widths[1:])) for row in rows]
        named = [f"{row[0]:<{widths[0]}}  {line}" for row, line in zip(rows, lines, strict=True)]
        return "\n".join([repr(self)[1:-1], *named, *self._notes()])

    def _repr_html_(self) -> str:
        header, *rows = self._table()
        lines = [f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in header)}</tr>"]
        lines += [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
        return f"<p>{escape(repr(self)[1:-1])}</p><table>{''.join(lines)}</table><p>{'<br>'.join(self._notes())}</p>"

    def _table(self) -> list[tuple[str, ...]]:
        """Return a header and a row for each of the first columns, as text."""
        diagnostics = [("ESS", ".0f", self.effective_sample_size)]
        diagnostics += [] if self.r_hat is None else [("R-hat", ".3f", self.r_hat)]
        rows = [("", "mean", "sd", "5 %", "50 %", "95 %", *(name for name, _, _ in diagnostics))]
        by_column = [torch.cat([found[name].flatten() for name in self.values]) for _, _, found in diagnostics]
        for index, (name, draws) in enumerate(zip(self.columns[:MOST_ROWS], self.matrix().double().T, strict=False)):
            moments = (draws.mean(), draws.std(), *draws.quantile(draws.new_tensor([0.05, 0.5, 0.95])))
            own = (f"{found[index]:{style}}" for (_, style, _), found in zip(diagnostics, by_column, strict=True))
            rows.append((name, *(f"{value:.4g}" for value in moments), *own))
        return rows

    def _notes(self) -> list[str]:
        more = len(self.columns) - MOST_ROWS
        notes = [f"and {more} more columns"] if more > 0 else []
        if self.num_divergences is not None:
            notes.append(f"{self.num_divergences} divergent transitions")
        if self.log_evidence is not None:
            notes.append(f"log evidence {self.log_evidence:.4f} +- {self.log_evidence_error:.4f} nats")
        if self.tolerance is not None:
            notes.append(f"tolerance {self.tolerance:.4g}")
        calls = "" if self.num_simulations is None else f"{self.num_simulations:,} simulated experiments, "
        return [*notes, f"{calls}{self.seconds:.1f} s"]


def experiment_of(result: Any) -> Any:
    """Return what was read from the model of a result.

    Raises:
        ValueError: If the result was loaded without its model.
    """
    if result.experiment is None:
        raise ValueError(
            "result: it holds no experiment, which this needs. If it was saved, load it with model=, as in "
            "load(path, model=model)."
        )
    return result.experiment


def element_names(name: str, shape: torch.Size) -> list[str]:
    """Return the names of a site's elements, `theta[0]`, `theta[1]`, ..., or the bare name of a scalar."""
    indices = itertools.product(*(range(size) for size in shape))
    return [f"{name}[{','.join(map(str, index))}]" if shape else name for index in indices]


def html_table(rows: Iterable[tuple[str, str]]) -> str:
    """Return a small table for a notebook, a heading and a text in each row."""
    cells = (f"<tr><th style='text-align:left'>{escape(a)}</th><td>{escape(b)}</td></tr>" for a, b in rows)
    return f"<table>{''.join(cells)}</table>"


def shortened(value: Tensor, most: int = 12) -> str:
    """Return the first entries of a tensor as text."""
    shown = ", ".join(f"{x:.4g}" for x in value.detach().flatten()[:most].tolist())
    return f"[{shown}, ...]" if value.numel() > most else f"[{shown}]"


_SIDES = {"lower": "lower bound", "upper": "upper bound", "consistent": "consistent", "neither": "no guaranteed side"}


def _estimate_row(result: EIGResult) -> tuple[str, str]:
    value = (
        f"{result.eig.item():.4f} +- {result.standard_error.item():.4f}"
        if result.eig.numel() == 1
        else f"{shortened(result.eig)} +- {shortened(result.standard_error)}"
    )
    return result.estimator, f"EIG {value} nats ({_SIDES[result.bound]})"


def _estimate_line(result: EIGResult) -> str:
    name, text = _estimate_row(result)
    return f"{text.removesuffix(')')}, {name})"


def _where(result: EIGResult, most: int = 3) -> str:
    """Say at which design an estimate holds, or how many."""
    if not result.designs:
        return ""
    if result.eig.dim():
        return f" at {result.eig.numel()} designs ({', '.join(result.designs)})"
    return " at " + ", ".join(f"{name} = {shortened(value, most)}" for name, value in result.designs.items())


def _about(result: EIGResult) -> str:
    about = f"targets {list(result.target_labels)}, outcomes {list(result.observation_labels)}"
    return about + (f", nuisance {list(result.nuisance_labels)}" if result.nuisance_labels else "")


def _cost(result: EIGResult | DesignResult) -> str:
    return f"{result.num_simulations:,} simulated experiments, {result.seconds:.1f} s"
