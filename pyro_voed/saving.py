"""Results in files that hold numbers and no code.

A file is what `torch.save` makes of plain data: tensors, numbers, words, lists and dicts. Densities are described by
how they were built, with their weights beside (`densities.rebuilding`); of the experiment there is a fingerprint, since
the model itself is code, which the user has and gives again. So reading a file runs nothing that came with it
(`torch.load(..., weights_only=True)`), and a file outlives changes of the model's module or of the library's layout.

What is not a class of this library (a user's own density, summary or Pyro guide) is not described; its weights are
saved, and it is given again too.
"""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_voed.densities.rebuilding import describe, rebuild
from pyro_voed.estimators.amortised import AmortisedEIG
from pyro_voed.estimators.guide import GuideDensity
from pyro_voed.estimators.proposals import GuideProposal, LaplaceProposal
from pyro_voed.experiment.caller_state import isolated
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.sites import Site
from pyro_voed.results import Certificate, CollapseCheck, DesignResult, EIGResult, FitHistory, Learned, WeightCheck

FORMAT = 1
"""Raised when what a file holds changes."""

Result = EIGResult | DesignResult | AmortisedEIG

_RECORDS: dict[str, type] = {
    record.__name__: record
    for record in (
        *(AmortisedEIG, Certificate, CollapseCheck, DesignResult, EIGResult, FitHistory, Learned, WeightCheck),
        *(GuideProposal, LaplaceProposal),
    )
}
_KIND = "<kind>"
"""Key that tells an object from a dict; no site can have this name."""


def save(result: Result, path: str | os.PathLike[str]) -> None:
    """Write a result to a file, without pickled code.

    The file is complete or not there: it is written beside its place and then moved to it.

    Args:
        result: What an estimator, a search over designs or `amortise_eig` returned.
        path: Where to write; a file that is there is replaced.

    Example:
        >>> import tempfile
        >>> from pyro_voed import eig_nmc
        >>> from pyro_voed.problems.finite import finite
        >>> result = eig_nmc(finite(), "y", num_outer_samples=100, seed=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(result, f"{folder}/result.pt")
        ...     load(f"{folder}/result.pt", model=finite()).eig == result.eig
        tensor(True)
    """
    if not isinstance(result, EIGResult | DesignResult | AmortisedEIG):
        raise TypeError(f"result: expected an EIGResult, DesignResult or AmortisedEIG, got {type(result).__name__}.")
    content = {
        "format": FORMAT,
        "versions": _versions(),
        "experiment": None if result.experiment is None else _traits(result.experiment),
        "result": _packed(result),
    }
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            unfinished.unlink()


def load(
    path: str | os.PathLike[str],
    model: Callable[..., Any] | Experiment | None = None,
    *,
    map_location: Any = None,
    density: Any = None,
) -> Result:
    """Read a result from a file that `save` wrote.

    Args:
        path: The file.
        model: The model of the result: the Pyro program, with the labels that the file holds, or an `Experiment`, which
            is needed where there were arguments or a replaced prior. Without it the numbers, labels and the density are
            there, and what asks for simulations (posteriors, certificates, other designs) is refused.
        map_location: Device for the tensors, as in `torch.load`; default: the one they were on.
        density: What is not a class of this library, as it was given to the estimator: a density, factory or Pyro
            guide. For a summary or a part of one a mapping from its name, such as "summary", to it.

    Returns:
        A result of the same kind, with the same numbers; an example is in `save`.

    Raises:
        ValueError: If the file is none of `save`'s or of a later version; if the model is not the one that the result
            was saved with, naming both sides; if it is on another device; if a density or guide must be given.
    """
    content = _read(path, map_location)
    given = dict(density) if isinstance(density, Mapping) else {} if density is None else {"density": density}
    experiment = None if model is None else _experiment(model, content["experiment"])
    try:
        return _Unpacking(experiment, given)(content["result"])
    except (KeyError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{path}: {error}. It was written by {content['versions']}, and is read by {_versions()}: where these "
            "differ, load it with what wrote it."
        ) from error


def _read(path: str | os.PathLike[str], map_location: Any) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except (pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path}: expected a file that pyro_voed.save wrote, got another.") from error
    if not isinstance(content, dict) or "format" not in content:
        raise ValueError(f"{path}: expected a file that pyro_voed.save wrote, got another.")
    if content["format"] != FORMAT:
        raise ValueError(
            f"{path}: it has format {content['format']}, written by {content['versions']}; this version reads format "
            f"{FORMAT}. Load it with the version that wrote it."
        )
    return content


def _versions() -> dict[str, str]:
    try:
        own = version("pyro_voed")
    except PackageNotFoundError:  # run from its source
        own = "unknown"
    return {"pyro_voed": own, "torch": str(torch.__version__), "pyro": version("pyro-ppl")}


# --- from objects to plain data -------------------------------------------------------------------------------------


def _traits(experiment: Experiment) -> dict[str, Any]:
    """Return what an experiment is made again from, and what it is checked against."""
    return {
        "fingerprint": _fingerprint(experiment),
        "observation_labels": list(experiment.observation_labels),
        "target_labels": list(experiment.target_labels),
        "design_labels": list(experiment.design_labels),
        "prior_entropy": experiment.prior_entropy,
        "failures": experiment.failures,
        "surveyed_at": None if experiment.surveyed_at is None else _packed(experiment.surveyed_at),
        "runs_together": experiment.runs_together,
        "arguments": bool(experiment.model_args or experiment.model_kwargs),
        "prior": experiment.prior is not None,
    }


def _fingerprint(experiment: Experiment) -> dict[str, str]:
    """Return a text for each site, design and trait that must be the same.

    A learned density knows targets and outcomes by their packed coordinates alone, so with sites of other names,
    shapes, types or supports it would answer wrongly. Devices and present values of the designs do not count.
    """
    sites = (*experiment.targets, *experiment.observations, *experiment.nuisance)
    found = {f"site '{site.name}'": _described(site) for site in sites}
    for design in experiment.designs:
        shape, dtype = tuple(design.value.shape), design.value.dtype
        found[f"design '{design.name}'"] = f"of shape {shape}, {dtype}, in {design.support}"
    found["order of the targets"] = ", ".join(experiment.target_labels)
    found["order of the outcomes"] = ", ".join(experiment.observation_labels)
    found["prior"] = "the model's own" if experiment.prior is None else "replaced by a guide (prior=)"
    found["prior_entropy"] = str(experiment.prior_entropy)
    found["failures"] = experiment.failures
    found["run"] = "together" if experiment.runs_together else "one by one"
    return found


def _check_same(saved: dict[str, str], experiment: Experiment) -> None:
    """Raise ValueError, naming both sides, where an experiment is not the one that a result was saved with."""
    own = _fingerprint(experiment)
    pairs = {name: (saved.get(name, "none"), own.get(name, "none")) for name in {**saved, **own}}
    different = [f"{name}: saved {one}, given {other}" for name, (one, other) in pairs.items() if one != other]
    if different:
        raise ValueError(
            f"model: it is not the one that the result was saved with. {'; '.join(different)}. Give the same model, as "
            "an Experiment(...) where labels, arguments or a prior were given."
        )


def _described(site: Site) -> str:
    values = "" if site.support_values is None else f" with values {site.support_values.tolist()}"
    measured = "" if site.measured is None else f", measured {site.measured.int().tolist()}"
    measured += "" if site.fill is None else ", elements flagged"
    return f"{site.role} of shape {tuple(site.shape)}, {site.dtype}, in {site.support}{values}{measured}"


def _packed(value: Any) -> Any:
    """Return a value as plain data."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Experiment):
        singletons = value.program.design_singletons
        layout = None if singletons is None else dict(singletons)
        place = torch.empty(0, device=value.device)
        fills = {site.name: _packed(site.fill) for site in value.observations if site.fill is not None}
        return {
            _KIND: "experiment",
            "designs": _packed(value.design_values),
            "layout": layout,
            "fills": fills,
            "place": place,
        }
    if isinstance(value, GuideDensity):
        return _packed_guide(value)
    if isinstance(value, nn.Module):
        return {_KIND: "module", "description": describe(value), "state": dict(value.state_dict())}
    if _RECORDS.get(type(value).__name__) is type(value):
        return {_KIND: type(value).__name__, **{name: _packed(own) for name, own in vars(value).items()}}
    if isinstance(value, Mapping):
        return {name: _packed(entry) for name, entry in value.items()}
    if isinstance(value, tuple):
        return tuple(_packed(entry) for entry in value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return {_KIND: "given", "class": _name_of(type(value))}


def _packed_guide(density: GuideDensity) -> dict[str, Any]:
    module = density.guide if isinstance(density.guide, nn.Module) else None
    return {
        _KIND: "guide",
        "guide": _name_of(density.guide if module is None else type(module)),
        "of_targets": density.of_targets,
        "designs": _packed(density.designs),
        "names": list(density.names),
        "state": dict(density.state_dict()),
        # Buffers and frozen weights are in the module alone.
        "module": None if module is None else dict(module.state_dict()),
    }


def _name_of(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"


# --- and back -------------------------------------------------------------------------------------------------------


def _experiment(model: Callable[..., Any] | Experiment, saved: Mapping[str, Any] | None) -> Experiment:
    """Return the experiment of a model, checked against the one that was saved."""
    if saved is None:
        raise ValueError("model: the result was saved without an experiment, so leave the model out.")
    if isinstance(model, Experiment):
        experiment = model
    elif saved["prior"] or saved["arguments"]:
        missing = " and ".join(
            word for word, holds in (("prior=", saved["prior"]), ("the model's arguments", saved["arguments"])) if holds
        )
        raise ValueError(
            f"model: the result was made with {missing}, got the program alone. Give an Experiment(model, ...) with "
            f"{missing}."
        )
    else:
        experiment = Experiment(
            model,
            saved["observation_labels"],
            saved["target_labels"],
            design_labels=saved["design_labels"] or None,
            prior_entropy=saved["prior_entropy"],
            vectorize=saved["runs_together"],
            failures=saved["failures"],
            seed=0,  # nothing random comes out, so the caller's stream stays where it is
        )
    if saved["surveyed_at"] is not None:
        # One design after the other, for any model.
        experiment = experiment.in_layout(None, {}).surveyed(saved["surveyed_at"])
    _check_same(saved["fingerprint"], experiment)
    return experiment


@dataclass(frozen=True)
class _Unpacking:
    """Makes objects of plain data, around the model's experiment and with what the user `given`, by name."""

    experiment: Experiment | None
    given: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, value: Any) -> Any:
        """Return a value as it was before it was packed."""
        if isinstance(value, tuple):
            return tuple(self(entry) for entry in value)
        if not isinstance(value, dict):
            return value
        kind = value.get(_KIND)
        if kind is None:
            return {name: self(entry) for name, entry in value.items()}
        if kind in _RECORDS:
            return _RECORDS[kind](**{name: self(entry) for name, entry in value.items() if name != _KIND})
        return {"experiment": self._at, "module": self._module, "guide": self._guide, "given": self._given}[kind](value)

    def _at(self, saved: Mapping[str, Any]) -> Experiment | None:
        """Return the experiment at the designs and in the layout that the result had it in."""
        if self.experiment is None:
            return None
        device = saved["place"].device
        if device != self.experiment.device:
            raise ValueError(
                f"map_location: the saved tensors are on {device} and the model's on {self.experiment.device}. Load "
                f"with map_location='{self.experiment.device}'."
            )
        return self.experiment.at_designs(saved["designs"]).in_layout(saved["layout"], saved["fills"])

    def _module(self, saved: Mapping[str, Any]) -> nn.Module:
        state = saved["state"]
        module = rebuild(saved["description"], self.given)
        first = next(iter(state.values()), None)
        if first is not None:
            module.to(first.device)
        module.load_state_dict(state)
        return module

    def _guide(self, saved: Mapping[str, Any]) -> GuideDensity:
        if self.experiment is None or "density" not in self.given:
            raise ValueError(
                f"density: the result was made with the guide {saved['guide']}, whose code is not saved. Give both: "
                "load(path, model=model, density=guide)."
            )
        # Its checks draw, and the caller's stream stays where it is.
        with isolated(seed=0):
            density = GuideDensity(
                self.given["density"], self.experiment, saved["designs"], of_targets=saved["of_targets"], trained=False
            )
        if density.names != saved["names"]:
            raise ValueError(
                f"density: the saved guide has the parameters {saved['names']}, the one given {density.names}. Give "
                "the same guide."
            )
        density.load_state_dict(saved["state"])
        if saved["module"] is not None:
            density.guide.load_state_dict(saved["module"])  # type: ignore[attr-defined]
        return density.eval()

    def _given(self, saved: Mapping[str, Any]) -> Any:
        if "density" not in self.given:
            raise ValueError(
                f"density: expected the {saved['class']} that the result was made with, which is not saved. Give it: "
                "load(path, model=model, density=...)."
            )
        return self.given["density"]
