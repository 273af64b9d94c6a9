"""A Pyro guide as a learnt density: an ordinary program that samples the sites it is to score.

The guide samples sites under the model's own names and holds its parameters in `pyro.param`. It is called with the
model's arguments, in the same outer plate as the model, and scored at simulated values. Its parameters are fitted in a
copy, so the caller's store is left alone; `parameters()` gives them to an optimiser.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints, transform_to

from pyro_voed.programs import Program, run_rows, sample_nodes
from pyro_voed.simulate import JointSample
from pyro_voed.sites import Sites


class GuideDensity(torch.nn.Module):
    """The outcome density that a Pyro guide describes.

    Args:
        guide: Samples every outcome site of the model, and nothing else.
        sites: The resolved model.
        args: Positional arguments of model and guide.
        kwargs: Keyword arguments of model and guide.
        designs: Designs to evaluate; those that the guide reads are put in.

    Raises:
        ValueError: If the guide's sites are not the outcome sites, or it has no parameter to learn.
    """

    def __init__(
        self,
        guide: Callable[..., Any],
        sites: Sites,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        designs: Mapping[str, Tensor],
    ):
        super().__init__()
        self.sites = sites
        with poutine.trace() as recorder:
            guide(*args, **kwargs)
        nodes = sample_nodes(recorder.trace)
        if set(nodes) != set(sites.observation_labels):
            raise ValueError(
                f"guide: expected it to sample the outcome sites {list(sites.observation_labels)} and nothing else, it "
                f"samples {list(nodes)}."
            )
        params = {name: node for name, node in recorder.trace.nodes.items() if node["type"] == "param"}
        own = {name: node for name, node in params.items() if name not in sites.design_labels}
        if not own:
            raise ValueError("guide: it has no pyro.param besides the designs, so there is nothing to learn.")
        self.names = list(own)
        self.constraints = [node["kwargs"].get("constraint", constraints.real) for node in own.values()]
        self.unconstrained = torch.nn.ParameterList(
            transform_to(constraint).inv(node["value"]).detach().clone()
            for constraint, node in zip(self.constraints, own.values(), strict=True)
        )
        self.designs = {name: value for name, value in designs.items() if name in params}
        nesting = max(
            [0, *(len(node["fn"].batch_shape) for node in nodes.values())]
            + [-frame.dim for node in nodes.values() for frame in node["cond_indep_stack"] if frame.vectorized]
        )
        self.program = Program(
            lambda: guide(*args, **kwargs),
            max(nesting, sites.program.max_plate_nesting),
            sites.program.vectorised,
            sites.program.design_singletons,
        )

    def values(self) -> dict[str, Tensor]:
        """Return the guide's parameters in their constraints."""
        return {
            name: transform_to(constraint)(leaf)
            for name, constraint, leaf in zip(self.names, self.constraints, self.unconstrained, strict=True)
        }

    def log_prob(self, sample: JointSample) -> Tensor:
        """Return the guide's log density of the packed outcomes, nats, `(num_samples, *design_batch)`."""
        leading = sample.y.shape[:-1]
        rows = {
            name: sample.values[name].reshape(leading.numel(), *self.sites.shapes[name])
            for name in self.sites.observation_labels
        }
        program = replace(self.program, constants=self.values())
        shapes = {name: self.sites.shapes[name] for name in self.sites.observation_labels}
        # Over a batch of designs every simulated experiment has its own.
        shared = self.designs if sample.designs is None else {}
        own = {} if sample.designs is None else self._row_designs(sample.designs, leading)
        run = run_rows(program, leading.numel(), shapes, designs=shared, row_designs=own, row_values=rows)
        log_prob = torch.stack([run.log_prob(name) for name in self.sites.observation_labels]).sum(0)
        return log_prob.reshape(leading) + sample.outcome_log_det

    def _row_designs(self, packed: Tensor, leading: torch.Size) -> dict[str, Tensor]:
        rows = packed.expand(*leading, -1).reshape(leading.numel(), -1)
        coordinates = [site.transform.inv(site.value) for site in self.sites.designs]
        pieces = rows.split([own.numel() for own in coordinates], -1)
        return {
            site.name: site.transform(piece.reshape(-1, *own.shape))
            for site, piece, own in zip(self.sites.designs, pieces, coordinates, strict=True)
            if site.name in self.designs
        }
