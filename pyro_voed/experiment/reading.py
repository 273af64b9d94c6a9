"""Read a program: what its labels mean, and every check that needs one look at its trace.

The program is run a few times without changing anything. What cannot have a defined information gain is refused here,
before any bulk of simulations; the probes that follow need more than one look (`probes`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch.distributions import constraints

from pyro_voed.checks import check_known
from pyro_voed.experiment.parameters import naming_sites
from pyro_voed.experiment.probes import probe
from pyro_voed.experiment.programs import (
    Assign,
    Meter,
    Program,
    Release,
    base_distribution,
    has_discrete_support,
    is_deterministic,
    is_plate,
    sample_nodes,
    support_transform,
)
from pyro_voed.experiment.sites import DesignSite, Failures, Role

Names = tuple[str, ...] | None


def read(
    call: Callable[[], Any],
    observation_names: Names,
    target_names: Names,
    design_names: Names,
    prior: Callable[[], Any] | None,
    *,
    vectorize: bool,
    failures: Failures,
) -> dict[str, Any]:
    """Return what an experiment is made of, by the names of its fields; inside `isolated`."""
    may_fail = failures != "error"
    with pyro.validation_enabled(False) if may_fail else nullcontext():
        return _read(call, observation_names, target_names, design_names, prior, vectorize=vectorize, failures=failures)


def _read(
    call: Callable[[], Any],
    observation_names: Names,
    target_names: Names,
    design_names: Names,
    prior: Callable[[], Any] | None,
    *,
    vectorize: bool,
    failures: Failures,
) -> dict[str, Any]:
    may_fail = failures != "error"
    # The model's own prior also gives the supports of a replaced one, whose sites may be mere Deltas.
    own = _trace_once(call, may_fail=may_fail)
    _check_undefined_information(own)
    roles = _roles(own, observation_names, target_names, with_prior=prior is not None)
    designs = _design_sites(own, design_names)
    released, prototype = _released(call, prior, roles, own), own
    if prior is not None:
        prototype = _trace_once(released, may_fail=may_fail)
        _check_undefined_information(prototype)
        _check_handed_on(prototype, own, _trace_once(call, may_fail=may_fail))
    program = Program(
        released,
        _max_plate_nesting(prototype),
        constants=_constants(own, designs),
        may_fail=may_fail,
        meter=Meter(1 if prior is None else 3),
    )
    every = {name: roles.get(name, "auxiliary") for name in sample_nodes(prototype)}
    return probe(program, prototype, own, every, designs, vectorize=vectorize, failures=failures)


@dataclass(frozen=True)
class ReleasedProgram:
    """A program whose outcomes are drawn; the data of the sites `kept`, history that a prior accounts for, stay."""

    call: Callable[[], Any]
    kept: tuple[str, ...]

    def __call__(self) -> Any:
        """Run the program."""
        with Release(self.kept):
            return self.call()


@dataclass(frozen=True)
class ProgramWithPrior:
    """A released program whose `latent` sites a guide draws; outcomes and computed targets (`shown`) are its own."""

    released: ReleasedProgram
    prior: Callable[[], Any]
    latent: tuple[str, ...]
    shown: frozenset[str]

    def __call__(self) -> Any:
        """Run the guide, then the program at its draws."""
        with poutine.trace() as recorder:
            self.prior()
        drawn = {name: node["value"] for name, node in sample_nodes(recorder.trace).items()}
        missing = [name for name in self.latent if name not in drawn]
        if missing:
            raise ValueError(
                f"prior: the guide draws {list(drawn)}, but the model's latent sites {missing} are missing."
            )
        # The latents are already in the trace, drawn by the prior; the model must not draw or score them again.
        hidden = poutine.block(hide_fn=lambda msg: msg["type"] == "sample" and msg["name"] not in self.shown)
        with hidden, poutine.condition(data={name: value for name, value in drawn.items() if name in self.latent}):
            return self.released()


def _released(
    call: Callable[[], Any], prior: Callable[[], Any] | None, roles: Mapping[str, Role], own: poutine.Trace
) -> ReleasedProgram | ProgramWithPrior:
    released = ReleasedProgram(call, tuple(name for name, role in roles.items() if role == "history"))
    if prior is None:
        return released
    computed = {name for name, node in sample_nodes(own).items() if is_deterministic(node)}
    latent = [name for name, role in roles.items() if role in ("target", "nuisance") and name not in computed]
    shown = {name for name, role in roles.items() if role == "observation" or (role == "target" and name in computed)}
    return ProgramWithPrior(released, prior, tuple(latent), frozenset(shown))


def _trace_once(call: Callable[[], Any], *, may_fail: bool) -> poutine.Trace:
    def run() -> poutine.Trace:
        draws = Assign({}, may_fail=True) if may_fail else nullcontext()
        with poutine.trace() as recorder, draws, _RefuseImproper(), Release():
            call()
        return recorder.trace

    return naming_sites(run, may_fail=may_fail)


class _RefuseImproper(Messenger):
    # An improper prior cannot be drawn from, so it must be refused before its site is reached.
    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(base_distribution(msg["fn"]), dist.ImproperUniform):
            raise ValueError(
                f"site '{msg['name']}' has an improper prior, which no experiment can be simulated from. "
                "Give it a proper distribution."
            )


def _check_undefined_information(trace: poutine.Trace) -> None:
    for name, node in trace.nodes.items():
        if node["type"] != "sample":
            continue
        if is_plate(node):
            size = node["fn"].size
            if size >= 0 and len(node["value"]) < size:
                raise ValueError(
                    f"plate '{name}' subsamples {len(node['value'])} of {size}: log densities would be scaled though "
                    "simulations are not. Run the plate without subsampling."
                )
            continue
        if isinstance(base_distribution(node["fn"]), dist.Unit):
            raise ValueError(
                f"pyro.factor('{name}') adds to the log density what simulations cannot see, so the expected "
                "information gain is undefined. Write the term as a sample site, or leave it out."
            )
        if not isinstance(node["scale"], (int, float)) or node["scale"] != 1.0:
            raise ValueError(
                f"site '{name}' is under poutine.scale ({node['scale']}): densities would be scaled though "
                "simulations are not. Remove the scale."
            )


def _roles(
    trace: poutine.Trace,
    observation_names: tuple[str, ...] | None,
    target_names: tuple[str, ...] | None,
    with_prior: bool,
) -> dict[str, Role]:
    nodes = sample_nodes(trace)
    released = [name for name, node in nodes.items() if node["infer"].get("was_observed")]
    latent = [name for name, node in nodes.items() if not is_deterministic(node) and name not in released]
    if observation_names is None:
        if not released:
            raise ValueError(
                "observation_labels: the model has no site with obs=, so the outcome must be named. "
                f"Its sites are {list(nodes)}."
            )
        observation_names = tuple(released)
    check_known(observation_names, nodes, "observation_labels", "site")
    both = sorted(set(target_names or ()) & set(observation_names))
    if both:
        raise ValueError(f"sites {both} are named as target and as outcome. A site can be only one of them.")
    history = [name for name in released if name not in observation_names]
    if history and not with_prior:
        raise ValueError(
            f"sites {history} hold data with obs= but are not the outcome {list(observation_names)}: history belongs "
            "in the prior. Condition on it first and pass the posterior as prior=, or add the sites to "
            "observation_labels."
        )
    if target_names is None:
        if any(is_deterministic(nodes[name]) for name in observation_names):
            raise ValueError(
                f"target_labels: the outcome {list(observation_names)} is deterministic given all latents, so about "
                f"all of them together its information is infinite. Name the targets among {latent}."
            )
        target_names = tuple(name for name in latent if name not in observation_names)
        if not target_names:
            raise ValueError("target_labels: the model has no latent site besides the outcome, nothing to learn about.")
    check_known(target_names, nodes, "target_labels", "site")
    roles: dict[str, Role] = {}
    for name, node in nodes.items():
        if name in target_names:
            roles[name] = "target"
        elif name in observation_names:
            roles[name] = "observation"
        elif name in history:
            roles[name] = "history"
        else:
            roles[name] = "auxiliary" if is_deterministic(node) else "nuisance"
    return roles


def _design_sites(trace: poutine.Trace, names: tuple[str, ...] | None) -> tuple[DesignSite, ...]:
    nodes = {name: node for name, node in trace.nodes.items() if node["type"] == "param"}
    weights = [name for name, node in nodes.items() if _is_weight(name, node)]
    if names is None:
        names = tuple(name for name in nodes if name not in weights)
        if weights and names:
            raise ValueError(
                f"design_labels: the model also traces network weights {weights[:4]}, so the designs must be named. "
                f"Its parameters are {list(nodes)}."
            )
    check_known(names, nodes, "design_labels", "pyro.param site")
    store = pyro.get_param_store()
    sites = []
    for name in names:
        value = nodes[name]["value"]
        leaf = value.unconstrained() if hasattr(value, "unconstrained") else None
        in_store = leaf is not None and store._params.get(name) is leaf
        # A PyroParam read back from the store does not repeat its constraint in the message.
        constraint = store._constraints[name] if in_store else nodes[name]["kwargs"].get("constraint", constraints.real)
        if not value.dtype.is_floating_point:
            raise ValueError(f"design '{name}' has dtype {value.dtype}: designs are floating-point tensors.")
        sites.append(DesignSite(name, value.detach().clone(), constraint, leaf, in_store))
    return tuple(sites)


def _check_handed_on(prototype: poutine.Trace, own: poutine.Trace, again: poutine.Trace) -> None:
    """Refuse Delta sites of a guide where the model's support moves, since a Delta does not tell where it stands."""
    for name, node in sample_nodes(prototype).items():
        delta = isinstance(base_distribution(node["fn"]), dist.Delta) and not is_deterministic(node)
        if not delta or name not in own.nodes or has_discrete_support(own.nodes[name]["fn"]):
            continue
        first, second = (support_transform(trace.nodes[name]["fn"]) for trace in (own, again))
        zero = torch.zeros_like(first.inv(own.nodes[name]["value"]))
        if not torch.allclose(first(zero), second(zero)):
            raise NotImplementedError(
                f"prior: the guide hands on site '{name}' as a Delta, and the model's support of it depends on other "
                "latent sites, which a Delta does not show. Sample the site in the guide from a distribution with its "
                "own support."
            )


def _constants(trace: poutine.Trace, designs: tuple[DesignSite, ...]) -> dict[str, torch.Tensor]:
    # Network weights stay out: pyro.module would copy substituted values into the user's module.
    names = {site.name for site in designs}
    return {
        name: node["value"].detach()
        for name, node in trace.nodes.items()
        if node["type"] == "param" and name not in names and not _is_weight(name, node)
    }


def _is_weight(name: str, node: Mapping[str, Any]) -> bool:
    return "$$$" in name or (len(node["args"]) > 1 and isinstance(node["args"][1], torch.nn.Parameter))


def _max_plate_nesting(trace: poutine.Trace) -> int:
    nesting = 0
    for node in sample_nodes(trace).values():
        frames = [-frame.dim for frame in node["cond_indep_stack"] if frame.vectorized]
        # Batch dimensions outside any plate are independent draws too, so they count like plates.
        nesting = max([nesting, len(getattr(node["fn"], "batch_shape", ())), *frames])
    return nesting
