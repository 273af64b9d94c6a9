"""A Pyro guide as a learnt density: an ordinary program that samples the sites it is to score.

The guide samples sites under the model's own names. It describes either the outcome, and is then called with the
model's arguments, or the targets given the outcome, and is then called with a dict of outcome values in front of them;
`eig_ba` says how outcomes come to it and what becomes of its parameters. It is run in the same outer plate as the model
and scored at simulated values, so nothing is drawn from it in training and its sites may be discrete. A small run is
checked against single runs when the density is made.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import FunctionType
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor
from torch.distributions import constraints, transform_to

from pyro_voed.checks import as_site_values, check_callable, check_picklable
from pyro_voed.estimators.guide_checks import check_sites, warn_unregistered
from pyro_voed.experiment.caller_state import param_store_kept
from pyro_voed.experiment.designs import unpack_designs
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.packing import JointSample, pack_run
from pyro_voed.experiment.programs import Program, ProgramRun, is_deterministic, run_rows, sample_nodes
from pyro_voed.experiment.sites import Site

CHECK_SIZE = 3


class GuideDensity(torch.nn.Module):
    """The density that a Pyro guide describes, of the outcome or, with `of_targets`, of the targets given the outcome.

    `designs` are put in where the guide reads them by `pyro.param`. A guide that is `trained` must have something to
    learn.
    """

    def __init__(
        self,
        guide: Callable[..., Any],
        experiment: Experiment,
        designs: Mapping[str, Tensor],
        *,
        of_targets: bool = False,
        trained: bool = True,
    ):
        super().__init__()
        check_callable(guide, "guide")
        # In a tuple, so that frozen weights of a guide that is a module do not become parameters of this one.
        self._guide = (copy.deepcopy(guide) if isinstance(guide, torch.nn.Module) else guide,)
        self.experiment = experiment
        self.scored: tuple[Site, ...] = experiment.targets if of_targets else experiment.observations
        self.of_targets = of_targets
        with torch.no_grad():
            simulated = run_rows(experiment.program, CHECK_SIZE, experiment.shapes, designs=experiment.design_values)
            sample = pack_run(experiment, simulated, torch.Size([CHECK_SIZE]), likelihood=False)
            self.layouts = _layouts(experiment, simulated)
            single = {site.name: _seen(site, sample.values[site.name][0]) for site in experiment.observations}
        params, nodes = self._first_run(single)
        self.designs = {name: value for name, value in designs.items() if name in params}
        if trained and not any(True for _ in self.parameters()):
            raise ValueError("guide: it has no pyro.param besides the designs, so there is nothing to learn.")
        self.program = self._program(nodes)
        own = {name: experiment.design_values[name] for name in self.designs}
        self._check_rows(sample, own)

    def __getstate__(self) -> dict[str, Any]:
        check_picklable(self.guide, "guide")
        if isinstance(self.guide, FunctionType) and len(self.weights):
            raise pickle.PicklingError(
                f"guide: {self.guide.__qualname__} trains networks in place, and a pickled function is only its name. "
                "Make the guide a PyroModule, whose weights are pickled with it, or use pyro_voed.save."
            )
        return dict(vars(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> GuideDensity:
        memo[id(self)] = other = type(self).__new__(type(self))
        vars(other).update(copy.deepcopy(vars(self), memo))
        return other

    @property
    def guide(self) -> Callable[..., Any]:
        """The guide; where it is a module, the trained copy of it."""
        return self._guide[0]

    def train(self, mode: bool = True) -> GuideDensity:
        """Put the density, and a guide that is a module, into training or evaluation mode."""
        super().train(mode)
        if isinstance(self.guide, torch.nn.Module):
            self.guide.train(mode)
        return self

    def values(self) -> dict[str, Tensor]:
        """Return the guide's explicit parameters in their constraints, by name, as the parameter store has them.

        To carry them over to the store: `for name, value in density.values().items(): pyro.get_param_store()[name] =
        value`.
        """
        found = zip(self.names, self.constraints, self.unconstrained, strict=True)
        return {name: transform_to(constraint)(leaf) for name, constraint, leaf in found}

    def log_prob(self, sample: JointSample) -> Tensor:
        """Return the guide's log density of the packed outcomes (or targets), nats, `(num_samples, *design_batch)`."""
        leading = sample.y.shape[:-1]
        rows = {
            name: value.reshape(leading.numel(), *self.experiment.shapes[name]) for name, value in sample.values.items()
        }
        # Over a batch of designs every simulated experiment has its own.
        if sample.designs is None or not self.designs:
            log_prob = self._score(rows, self.designs)
        elif self.program.design_singletons is not None:
            packed = sample.designs.expand(*leading, -1).reshape(leading.numel(), -1)
            log_prob = self._score(rows, {}, self._unpack_designs(packed))
        else:
            log_prob = self._score_in_turn(rows, sample.designs, leading)
        log_det = sample.log_det if self.of_targets else sample.outcome_log_det
        return log_prob.reshape(leading) + log_det

    def draw(self, observations: Mapping[str, Tensor], designs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return one draw of every target given each outcome, `(num_rows, *shape)` each, without gradients."""
        with torch.no_grad():
            run = self._run(observations, designs, {})
            return {site.name: run.value(site.name) for site in self.scored}

    def score(self, rows: Mapping[str, Tensor], designs: Mapping[str, Tensor]) -> Tensor:
        """Return log densities of given values, nats, `(num_rows,)`, -inf outside the guide's support."""
        run = self._run(rows, designs, {})
        return torch.stack([run.log_prob(site.name, on_support=True) for site in self.scored]).sum(0)

    def condition_on(
        self, observations: Tensor | Mapping[str, Any], designs: Mapping[str, Tensor] | None = None
    ) -> Callable[..., Any]:
        """Return the fitted posterior of one outcome as a Pyro program.

        It ignores its arguments, so that it serves as `guide=` of `pyro.infer.Predictive` and `Importance`, and as
        `prior=` of the next experiment. The outcome has the shape of one experiment: a dict by site, or a tensor where
        there is one. `designs` it was observed at are by default the result's, where there was one design.
        """
        if not self.of_targets:
            raise ValueError("this guide describes the outcome, not the targets given the outcome.")
        given = as_site_values(observations, self.experiment.observation_labels, "observations")
        for name, value in given.items():
            if value.shape != self.experiment.shapes[name]:
                raise ValueError(
                    f"observations['{name}']: expected one experiment's shape {tuple(self.experiment.shapes[name])}, "
                    f"got {tuple(value.shape)}. For several outcomes call once for each."
                )
        given = {site.name: _seen(site, given[site.name]) for site in self.experiment.observations}
        own = {**self.designs, **{name: value for name, value in (designs or {}).items() if name in self.designs}}
        for site in self.experiment.designs:
            if site.name in own and own[site.name].shape != site.value.shape:
                raise ValueError(
                    f"designs: the guide was fitted over a batch of '{site.name}'; give the one, of shape "
                    f"{tuple(site.value.shape)}, that the outcome was observed at."
                )
        fixed = {**own, **{name: value.detach().clone() for name, value in self.values().items()}}

        return ConditionedGuide(self, given, fixed)

    def call(self, observations: Mapping[str, Tensor]) -> Any:
        """Run the guide as it stands, given an outcome where it is of the targets."""
        given = (dict(observations),) if self.of_targets else ()
        with _without_namesakes(self.guide):
            return self.guide(*given, *self.experiment.model_args, **self.experiment.model_kwargs)

    def _first_run(self, observations: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Run the guide for one experiment; return its parameter nodes and sites, checked and registered."""
        store = pyro.get_param_store()
        with param_store_kept(), torch.no_grad():
            # The guide may read designs by name alone, and they need not be in the caller's store.
            for site in self.experiment.designs:
                store.setdefault(site.name, site.value.clone(), site.constraint)
            with poutine.trace() as recorder:
                self.call(observations)
            trace = recorder.trace
            nodes = {name: node for name, node in sample_nodes(trace).items() if not is_deterministic(node)}
            check_sites(nodes, self.scored, self.of_targets)
            params = {name: node for name, node in trace.nodes.items() if node["type"] == "param"}
            self._register(params)
        return params, nodes

    def _register(self, params: Mapping[str, Any]) -> None:
        """Make leaves of the parameters: private copies of explicit ones, networks' weights as they are."""
        weights = list(self.guide.parameters()) if isinstance(self.guide, torch.nn.Module) else []
        owned = {id(weight) for weight in weights}
        explicit = {}
        for name, node in params.items():
            initial = node["args"][1] if len(node["args"]) > 1 else None
            leaf = node["value"].unconstrained() if hasattr(node["value"], "unconstrained") else None
            if name in self.experiment.design_labels or id(initial) in owned or id(leaf) in owned:
                continue
            if isinstance(initial, torch.nn.Parameter):
                weights.append(initial)
                owned.add(id(initial))
            else:
                explicit[name] = node
        store = pyro.get_param_store()
        self.names = list(explicit)
        self.constraints = [
            store._constraints.get(name, node["kwargs"].get("constraint") or constraints.real)
            for name, node in explicit.items()
        ]
        self.unconstrained = torch.nn.ParameterList(
            transform_to(constraint).inv(node["value"]).detach().clone()
            for constraint, node in zip(self.constraints, explicit.values(), strict=True)
        )
        self.weights = torch.nn.ParameterList(weight for weight in weights if weight.requires_grad)

    def _program(self, nodes: Mapping[str, Any]) -> Program:
        model = self.experiment.program
        nesting = max(
            [model.max_plate_nesting, *(len(node["fn"].batch_shape) for node in nodes.values())]
            + [-frame.dim for node in nodes.values() for frame in node["cond_indep_stack"] if frame.vectorized]
        )
        # Plates of the guide's own push the outer plate further to the left.
        self.further_plates = nesting - model.max_plate_nesting
        singletons = model.design_singletons
        if singletons is not None:
            singletons = {name: number + self.further_plates for name, number in singletons.items()}
        return Program(_nothing, nesting, model.vectorised, singletons)

    def _score(
        self, rows: Mapping[str, Tensor], designs: Mapping[str, Tensor], row_designs: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        run = self._run(rows, designs, row_designs or {})
        scores = [run.log_prob(site.name, on_support=True) for site in self.scored]
        for site, score in zip(self.scored, scores, strict=True):
            outside = int(torch.isneginf(score).sum())
            if outside:
                raise ArithmeticError(
                    f"guide: {outside} of {score.numel()} simulated values of site '{site.name}' lie outside the "
                    "support of the guide's distribution, where its log density is -inf, and so is the bound. Change "
                    "the guide's family to one whose support covers the model's."
                )
        return torch.stack(scores).sum(0)

    def _run(
        self, rows: Mapping[str, Tensor], designs: Mapping[str, Tensor], row_designs: Mapping[str, Tensor]
    ) -> ProgramRun:
        num_rows = next(iter(rows.values())).shape[0]
        values = {site.name: rows[site.name] for site in self.scored if site.name in rows}
        given = {site.name: _seen(site, rows[site.name]) for site in self.experiment.observations}
        shapes = {site.name: site.shape for site in self.scored}
        constants = self.values()
        if self.program.vectorised:
            ones = (1,) * self.further_plates
            laid_out = {name: value.reshape(num_rows, *ones, *self.layouts[name]) for name, value in given.items()}
            program = replace(self.program, call=partial(self.call, laid_out), constants=constants)
            return run_rows(program, num_rows, shapes, designs=designs, row_designs=row_designs, row_values=values)
        traces: list[Any] = []
        for row in range(num_rows):
            own = {name: value[row] for name, value in given.items()}
            program = replace(self.program, call=partial(self.call, own), constants=constants)
            put = {name: value[row : row + 1] for name, value in values.items()}
            own_designs = {name: value[row : row + 1] for name, value in row_designs.items()}
            run = run_rows(program, 1, shapes, designs=designs, row_designs=own_designs, row_values=put)
            traces += run.traces
        return ProgramRun(tuple(traces), 1, shapes)

    def _score_in_turn(self, rows: Mapping[str, Tensor], designs: Tensor, leading: torch.Size) -> Tensor:
        """Score a batch of designs one member after the other, where rows cannot have designs of their own."""
        members = self._unpack_designs(designs.reshape(-1, designs.shape[-1]))
        scores = []
        for member in range(leading[1:].numel()):
            own = {name: value.unflatten(0, (leading[0], -1))[:, member] for name, value in rows.items()}
            scores.append(self._score(own, {name: value[member] for name, value in members.items()}))
        return torch.stack(scores, -1)

    def _unpack_designs(self, packed: Tensor) -> dict[str, Tensor]:
        return {name: value for name, value in unpack_designs(self.experiment, packed).items() if name in self.designs}

    def _check_rows(self, sample: JointSample, designs: Mapping[str, Tensor]) -> None:
        """Raise where scoring rows together and one by one differ; warn of weights that nobody trains."""
        advice = "Index dimensions from the right, or pass vectorize=False."
        rows = sample.values
        with torch.enable_grad(), pyro.validation_enabled(False):
            try:
                run = self._run(rows, designs, {})
                together = torch.stack([run.log_prob(site.name) for site in self.scored]).sum(0)
            except (RuntimeError, ValueError, IndexError) as error:
                raise ValueError(
                    f"guide: run for {CHECK_SIZE} experiments at once it raised {type(error).__name__}: {error}. "
                    f"{advice}"
                ) from error
        warn_unregistered(together, self.parameters())
        if not self.program.vectorised or isinstance(self.guide, torch.nn.Module) or self.weights:
            # Dropout and batch norm make networks differ from run to run by intention.
            return
        vectorised, self.program = self.program, replace(self.program, vectorised=False)
        with torch.no_grad(), pyro.validation_enabled(False):
            run = self._run(rows, designs, {})
            alone = torch.stack([run.log_prob(site.name) for site in self.scored]).sum(0)
        self.program = vectorised
        if not torch.allclose(together, alone, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise ValueError(
                f"guide: log densities of {CHECK_SIZE} experiments scored together, {together.tolist()}, differ from "
                f"those scored one by one, {alone.tolist()}: it mixes experiments. {advice}"
            )


def _nothing() -> None:
    """Stand for a guide's call until it is bound to outcomes."""


@dataclass(frozen=True)
class ConditionedGuide:
    """A fitted guide at one outcome as a Pyro program, its parameters and designs `fixed`."""

    density: GuideDensity
    observations: Mapping[str, Tensor]
    fixed: Mapping[str, Tensor]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the guide; arguments are taken and ignored."""
        with poutine.substitute(data=dict(self.fixed)):
            return self.density.call(self.observations)


@contextmanager
def _without_namesakes(guide: Callable[..., Any]) -> Iterator[None]:
    """Hide what a `PyroModule` left in the caller's store, which a copy of it would take for its own parameters."""
    if not isinstance(guide, PyroModule):
        yield
        return
    store = pyro.get_param_store()
    prefix = f"{guide._pyro_name}." if guide._pyro_name else ""
    with param_store_kept():
        for name, _ in guide.named_parameters():
            if (own := prefix + name.removesuffix("_unconstrained")) in store:
                del store[own]
        yield


def _seen(site: Site, value: Tensor) -> Tensor:
    """Return an outcome with zeros where the model's mask says that nothing was measured."""
    return value if site.measured is None else torch.where(site.measured, value, torch.zeros_like(value))


def _layouts(experiment: Experiment, run: ProgramRun) -> dict[str, torch.Size]:
    """Return the shape that each outcome has behind the row dimension in a vectorised run of the model."""
    if not experiment.program.vectorised:
        return {site.name: site.shape for site in experiment.observations}
    nodes = run.traces[0].nodes
    values = {site.name: nodes[site.name]["value"] for site in experiment.observations}
    return {
        site.name: site.shape if values[site.name].shape == site.shape else values[site.name].shape[1:]
        for site in experiment.observations
    }
