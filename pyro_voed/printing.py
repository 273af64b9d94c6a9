"""Results as text, and as small tables for notebooks."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

import torch
from torch import Tensor

SURE = 4.0
"""Standard errors beyond which a bound is taken to lie outside its interval."""

MOST_ROWS = 40
"""Columns of a posterior that are shown."""

SIDES = {
    "exact": "exact",
    "lower": "lower bound",
    "upper": "upper bound",
    "consistent": "consistent",
    "neither": "no guaranteed side",
}


def shortened(value: Tensor, most: int = 12) -> str:
    """Return the first entries of a tensor as text."""
    shown = ", ".join(f"{x:.4g}" for x in value.detach().flatten()[:most].tolist())
    return f"[{shown}, ...]" if value.numel() > most else f"[{shown}]"


def where(result: Any, most: int = 3) -> str:
    """Say at which design an estimate holds, or how many."""
    if not result.designs:
        return ""
    if result.eig.dim():
        return f" at {result.eig.numel()} designs ({', '.join(result.designs)})"
    return " at " + ", ".join(f"{name} = {shortened(value, most)}" for name, value in result.designs.items())


def estimate_line(result: Any) -> str:
    """Return an estimate, its side and the name of its estimator in one line."""
    name, text = _estimate_row(result)
    return f"{text.removesuffix(')')}, {name})"


def estimate_text(result: Any) -> str:
    """Return an estimate and what goes along with it, line by line."""
    lines = [estimate_line(result) + where(result), *(estimate_line(other) for other in result.references)]
    if result.certificate is not None:
        lines.append(str(result.certificate))
    if result.weights is not None and result.weights.open_nats is not None:
        lines.append(f"inner draws leave open: {shortened(result.weights.open_nats)} nats")
    lines += [_ranking(result), *(f"doubt: {doubt}" for doubt in result.doubts), _about(result)]
    if result.learned is not None:
        lines += [str(result.learned), _looseness(result)]
    return "\n".join([*filter(None, lines), _cost(result)])


def estimate_html(result: Any) -> str:
    """Return an estimate as a table."""
    rows = [("design", where(result).removeprefix(" at ") or "none")]
    rows += [_estimate_row(estimate) for estimate in (result, *result.references)]
    if result.certificate is not None:
        rows.append(("interval", str(result.certificate)))
    rows += [("doubt", doubt) for doubt in result.doubts]
    rows.append(("about", _about(result)))
    if result.history is not None:
        rows.append(("training", str(result.history).removeprefix("training: ")))
        rows.append(("looseness", _looseness(result).removeprefix("looseness: ")))
    return _table([*rows, ("cost", _cost(result))])


def search_text(result: Any) -> str:
    """Return the result of a search over designs, line by line."""
    lines = [] if result.initial is None else ["at the start:  " + estimate_line(result.initial)]
    lines.append("at the best:   " + estimate_line(result.final))
    lines += [f"  {name} = {shortened(value)}" for name, value in result.designs.items()]
    lines += [f"  {name} {value}" for name, value in _worth_rows(result)]
    lines += [f"doubt: {doubt}" for doubt in result.doubts]
    return "\n".join([*lines, f"{_search(result)}; {_cost(result)}"])


def search_html(result: Any) -> str:
    """Return the result of a search over designs as a table."""
    rows = [] if result.initial is None else [("at the start", _estimate_row(result.initial)[1])]
    rows.append(("at the best", _estimate_row(result.final)[1]))
    rows += [(name, shortened(value)) for name, value in result.designs.items()]
    rows += [*_worth_rows(result), *(("doubt", doubt) for doubt in result.doubts)]
    return _table([*rows, ("search", _search(result)), ("cost", _cost(result))])


def posterior_text(posterior: Any) -> str:
    """Return the first columns of a posterior as a table of plain text."""
    rows = _posterior_rows(posterior)
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.rjust, row[1:], widths[1:])) for row in rows]
    named = [f"{row[0]:<{widths[0]}}  {line}" for row, line in zip(rows, lines, strict=True)]
    return "\n".join([repr(posterior)[1:-1], *named, *_posterior_notes(posterior)])


def posterior_html(posterior: Any) -> str:
    """Return the first columns of a posterior as a table."""
    header, *rows = _posterior_rows(posterior)
    lines = [f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in header)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    notes = "<br>".join(_posterior_notes(posterior))
    return f"<p>{escape(repr(posterior)[1:-1])}</p><table>{''.join(lines)}</table><p>{notes}</p>"


def _table(rows: Iterable[tuple[str, str]]) -> str:
    cells = (f"<tr><th style='text-align:left'>{escape(a)}</th><td>{escape(b)}</td></tr>" for a, b in rows)
    return f"<table>{''.join(cells)}</table>"


def _estimate_row(result: Any) -> tuple[str, str]:
    value = (
        f"{result.eig.item():.4f} +- {result.standard_error.item():.4f}"
        if result.eig.numel() == 1
        else f"{shortened(result.eig)} +- {shortened(result.standard_error)}"
    )
    return result.estimator, f"EIG {value} nats ({SIDES[result.bound]})"


def _ranking(result: Any) -> str:
    """Say which design of a batch has the largest estimate, and how many are not clearly below."""
    if result.eig.numel() < 2:
        return ""
    best, others = int(result.eig.argmax()), int(result.near_best.sum()) - 1
    near = f"{others} of the others not clearly below" if others else "all others clearly below"
    return f"largest at index {best}, {near}"


def _looseness(result: Any) -> str:
    """Say what is known of how far a trained lower bound lies below the exact value: that it converged says nothing."""
    if result.history is None or not result.learned.attains or result.bound != "lower":
        return ""
    eig, error, certificate = result.eig.flatten(), result.standard_error.flatten(), result.certificate
    if certificate is None:
        uppers = [other for other in result.references if other.bound == "upper"]
        if not uppers:
            return "looseness: unknown, whatever ended training; certify(result) tells, where the outcome has a density"
        gap, source = min(((other.eig.flatten() - eig).max().item(), other.estimator) for other in uppers)
        return f"looseness: at most about {max(gap, 0.0):.3f} nats, by {source}"
    below = eig - SURE * torch.hypot(error, certificate.lower_standard_error.flatten())
    above = eig + SURE * torch.hypot(error, certificate.upper_standard_error.flatten())
    lower, upper = certificate.lower.flatten(), certificate.upper.flatten()
    if bool((below > upper).any()):
        excess = (eig - upper).max().item()
        return f"looseness: none; the bound lies {excess:.3f} nats above the interval, so one of them is wrong"
    if bool((lower > above).any()):
        loose = (0.5 * (lower + upper) - eig).max().item()
        return f"looseness: the bound lies about {loose:.3f} nats below the exact value, by the certificate"
    return f"looseness: at most about {max((upper - eig).max().item(), 0.0):.3f} nats, by the certificate"


def _about(result: Any) -> str:
    failed = ""
    if result.failed_share is not None:
        share = result.failed_share
        failed = f"; failed runs: {share.item():.2%}" if share.numel() == 1 else f"; failed runs: {shortened(share)}"
    about = f"targets {list(result.target_labels)}, outcomes {list(result.observation_labels)}"
    about += f", nuisance {list(result.nuisance_labels)}" if result.nuisance_labels else ""
    return about + failed


def _cost(result: Any) -> str:
    calls = "" if result.num_simulations is None else f"{result.num_simulations:,} simulated experiments, "
    return f"{calls}{result.seconds:.1f} s"


def _worth_rows(result: Any) -> list[tuple[str, str]]:
    if result.cost is None:
        return []
    return [("cost", f"{result.cost.item():.4g}"), ("maximised", f"{result.worth.item():.4f}")]


def _search(result: Any) -> str:
    words = [] if result.history is None else [str(result.history).removeprefix("training: ")]
    if result.candidates is not None:
        values, errors = result.candidates.eig, result.candidates.standard_error
        best = int((values if result.candidate_worth is None else result.candidate_worth).argmax())
        words.append(f"best of {len(values)} candidates, where it had {values[best]:.4f} +- {errors[best]:.4f}")
    if result.interrupted and (result.history is None or result.history.stop_reason != "interrupted"):
        words.append("interrupted")
    return "; ".join(words)


def _posterior_rows(posterior: Any) -> list[tuple[str, ...]]:
    """Return a header and a row for each of the first columns."""
    diagnostics = [("ESS", ".0f", posterior.effective_sample_size)]
    diagnostics += [] if posterior.r_hat is None else [("R-hat", ".3f", posterior.r_hat)]
    rows = [("", "mean", "sd", "5 %", "50 %", "95 %", *(name for name, _, _ in diagnostics))]
    by_column = [torch.cat([found[name].flatten() for name in posterior.values]) for _, _, found in diagnostics]
    columns = zip(posterior.columns[:MOST_ROWS], posterior.matrix().double().T, strict=False)
    for index, (name, draws) in enumerate(columns):
        moments = (draws.mean(), draws.std(), *draws.quantile(draws.new_tensor([0.05, 0.5, 0.95])))
        own = (f"{found[index]:{style}}" for (_, style, _), found in zip(diagnostics, by_column, strict=True))
        rows.append((name, *(f"{value:.4g}" for value in moments), *own))
    return rows


def _posterior_notes(posterior: Any) -> list[str]:
    more = len(posterior.columns) - MOST_ROWS
    notes = [f"and {more} more columns"] if more > 0 else []
    if posterior.num_divergences is not None:
        notes.append(f"{posterior.num_divergences} divergent transitions")
    if posterior.log_evidence is not None:
        notes.append(f"log evidence {posterior.log_evidence:.4f} +- {posterior.log_evidence_error:.4f} nats")
    if posterior.tolerance is not None:
        notes.append(f"tolerance {posterior.tolerance:.4g}")
    return [*notes, _cost(posterior)]
