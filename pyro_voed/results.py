"""What the library gives back: frozen records, whose type never depends on a flag.

Every number comes with its standard error, the direction of its bias, and what it cost. All information is in nats.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pyro_voed.printing import (
    estimate_html,
    estimate_line,
    estimate_text,
    search_html,
    search_text,
    shortened,
    where,
)

Bound = Literal["exact", "lower", "upper", "consistent", "neither"]
"""Which way an estimate errs. "consistent": biased at any finite size, exact in the limit (the docstring of the
estimator says to which side); "neither": no side is guaranteed."""

StopReason = Literal["converged", "budget", "early stopping", "interrupted", "not trained"]


@dataclass(frozen=True)
class FitHistory:
    """What happened in training.

    Attributes:
        bound: Mean of the terms of each step's minibatch, in nats.
        learning_rate: Factor on the learning rates at each step, in [0, 1].
        stop_reason: Why training ended. "budget" means that the fit was still improving.
        validation: The same on the validation simulations, one entry an epoch; None for fresh simulations.
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
        ends = {"converged": ", until it improved no more", "budget": ", stopped by budget (still improving)"}
        return f"training: {self.num_steps} steps" + ends.get(self.stop_reason, f", stopped by {self.stop_reason}")


@dataclass(frozen=True)
class Certificate:
    """A two-sided interval and what it rests on; all in nats.

    Attributes:
        interval: `[lower - z se, upper + z se]`, `(2, *design_batch)`; over several designs all hold together.
        confidence: Probability with which it holds the truth.
        lower, lower_standard_error: Lower bound (ACE) and its standard error.
        upper, upper_standard_error: Upper bound (VNMC) and its standard error.
        pareto_k: Tail index of the terms.
        certified: Whether every tail index allows the standard errors to be trusted, and nothing says that the model's
            draws do not follow the densities it states.
        width_reached: Whether the width asked for was reached within the budget.
        num_flow_samples, num_outer_samples: Draws of the first level, the flow's own terms, and of the second.
        num_inner_samples: Proposal draws for each of the second level.
        num_simulations, seconds: What it cost.
        disagreement: In what draws and stated densities clearly disagree; empty where nothing was found.
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
    disagreement: str = ""

    def __str__(self) -> str:
        word = "certified" if self.certified else "uncertified"
        low, high = self.interval
        one = low.numel() == 1
        ends = f"[{low.item():.4f}, {high.item():.4f}]" if one else f"{shortened(low)} to {shortened(high)}"
        why = f": {self.disagreement}" if self.disagreement else ""
        return f"{word} {self.confidence:.0%} interval {ends} nats{why}"


@dataclass(frozen=True)
class CollapseCheck:
    """What a learned posterior knows of each packed target coordinate, beside what a plain regression does.

    Attributes:
        columns: Names of the coordinates.
        contraction: One less the mean posterior variance over the prior variance; never clamped.
        recovered: Share of the prior variance that the posterior mean explains; negative where it does harm.
        probed: Share that a ridge regression on plain features of the outcome explains, on held-out experiments.
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
        nuisance: Density of the packed nuisance sites given outcome, designs where there are several, and targets, for
            a certificate; None where it was not asked for.
    """

    density: Any = field(repr=False)
    of_targets: bool = False
    attains: bool = False
    history: FitHistory | None = None
    outcome_range: Float[Tensor, "2 y_dim"] | None = field(default=None, repr=False)
    learning_rate: Tensor | None = None
    collapse: CollapseCheck | None = field(default=None, repr=False)
    nuisance: Any = field(default=None, repr=False)

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
        open_nats: What inner averages leave open, `(*design_batch)`: how far the other side of the same draws lies off.
    """

    passed: bool | None
    pareto_k: Tensor | None = None
    effective_sample_size: float | None = None
    open_nats: Tensor | None = None


@dataclass(frozen=True)
class EIGResult:
    """An estimate of the expected information gain at one design, or at each of a batch.

    Attributes:
        eig: Estimate in nats. Never clamped: it may be negative.
        standard_error: Monte Carlo standard error of `eig` in nats.
        bound: Which way the estimate errs.
        estimator: Name of the function that made it.
        num_simulations, seconds: What it cost, the checks and pilots included.
        num_samples: Independent terms behind each entry of `eig`.
        designs: Design values it holds for, `(*design_batch, *shape)` each.
        target_labels, observation_labels: Sites the information is about, and sites that are observed.
        nuisance_labels: Random sites that are neither.
        experiment: What was read from the model.
        learned: What was learned on the way; None where nothing was.
        weights: Whether exponential averages can be trusted; None where there are none.
        certificate: Two-sided interval; None where it was not asked for.
        difference_error: Standard error of the difference between the estimates at any two designs of the batch,
            flattened; None at one design, or at more than 1,000.
        references: Other estimates at the same designs, as asked for.
        failed_share: Share of the runs behind `eig` that failed, `(*design_batch)`; None where none may.
        doubts: What speaks against the estimate, each in one line with the remedy; also warned of.
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
    difference_error: Float[Tensor, "num_designs num_designs"] | None = field(default=None, repr=False)
    references: tuple[EIGResult, ...] = ()
    failed_share: Float[Tensor, "*design_batch"] | None = None
    doubts: tuple[str, ...] = ()

    @property
    def near_best(self) -> Bool[Tensor, "*design_batch"]:
        """Designs whose estimates are not clearly below the largest, at 95 % for all of them together.

        Where an estimate is a learned bound this is about the bounds, whose looseness may differ between designs.
        """
        eig, best = self.eig.double().reshape(-1), int(self.eig.argmax())
        error = self.standard_error.double().reshape(-1)
        own = self.difference_error
        apart = torch.hypot(error, error[best]) if own is None else own[best].double()
        level = torch.tensor(1.0 - 0.05 / max(1, len(eig) - 1), dtype=torch.float64, device=eig.device)
        return (eig[best] - eig <= torch.special.ndtri(level) * apart).reshape(self.eig.shape)

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
        return f"<{estimate_line(self)}{where(self)}>"

    def __str__(self) -> str:
        return estimate_text(self)

    def _repr_html_(self) -> str:
        return estimate_html(self)


@dataclass(frozen=True)
class DesignResult:
    """The best design found and its expected information gain.

    Attributes:
        final: The estimate at the best design, on simulations that took no part in the search.
        num_simulations, seconds: What the search cost in all.
        path: Designs during the search of the winning start, `(num_records, *shape)` each. This, its steps, `history`
            and `start_eigs` are None where candidates were compared and nothing climbed.
        path_steps: Number of steps taken when each entry of the path was recorded, zero at the start.
        history: Training record of the winning start.
        start_eigs: Selection estimate of every start in nats, `(num_starts,)`; what was maximised, where that is not
            information alone.
        candidates: The estimates that candidates were compared by, one entry a candidate, which `plot_eig_surface` and
            its relatives draw. The largest of them errs upwards. None where designs climbed.
        candidate_worth: What was maximised over the candidates, where that is not their information alone.
        cost: Cost of the best design; None where none was given.
        worth: What was maximised, at the best design: `eig` less the cost, or divided by it; None without a cost.
        initial: The estimate at the starting design, where it was asked for or made on the way.
        interrupted: The search was ended by Ctrl-C; the best of what was complete by then is given.
        doubts: What speaks against the choice, each in one line with the remedy; also warned of.
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
    doubts: tuple[str, ...] = ()
    candidate_worth: Tensor | None = field(default=None, repr=False)
    cost: Tensor | None = None
    worth: Tensor | None = None

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
        return f"<best{where(self.final, most=4)}: {estimate_line(self.final)}>"

    def __str__(self) -> str:
        return search_text(self)

    def _repr_html_(self) -> str:
        return search_html(self)


def experiment_of(result: Any) -> Any:
    """Return what was read from the model of a result, which one that was loaded without its model does not have."""
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
