"""What of an experiment a saved result rests on, in words: its sites, their supports, its designs and its prior.

A learned density knows the targets and outcomes by their packed coordinates alone, so with a model whose sites have
other names, shapes, types or supports it would go on to answer, wrongly. What is compared does not depend on devices,
nor on the values that the designs have at the moment.
"""

from __future__ import annotations

from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.sites import Site


def fingerprint(experiment: Experiment) -> dict[str, str]:
    """Return a text for each site, design and trait that must be the same.

    Args:
        experiment: The experiment.

    Example:
        >>> from pyro_voed.problems.finite import finite
        >>> fingerprint(Experiment(finite(), "y"))["site 'theta'"]
        'target of shape (), torch.float32, in Boolean with values [0.0, 1.0]'
    """
    sites = (*experiment.targets, *experiment.observations, *experiment.nuisance)
    found = {f"site '{site.name}'": _site(site) for site in sites}
    for design in experiment.designs:
        shape, dtype = tuple(design.value.shape), design.value.dtype
        found[f"design '{design.name}'"] = f"of shape {shape}, {dtype}, in {design.support}"
    found["order of the targets"] = ", ".join(experiment.target_labels)
    found["order of the outcomes"] = ", ".join(experiment.observation_labels)
    found["prior"] = "the model's own" if experiment.prior is None else "replaced by a guide (prior=)"
    found["prior_entropy"] = str(experiment.prior_entropy)
    found["run"] = "together" if experiment.runs_together else "one by one"
    return found


def check_same(saved: dict[str, str], experiment: Experiment) -> None:
    """Check that an experiment is the one that a result was saved with.

    Raises:
        ValueError: If it is not, naming what differs and both sides.
    """
    own = fingerprint(experiment)
    pairs = {name: (saved.get(name, "none"), own.get(name, "none")) for name in {**saved, **own}}
    different = [f"{name}: saved {one}, given {other}" for name, (one, other) in pairs.items() if one != other]
    if different:
        raise ValueError(
            f"model: it is not the one that the result was saved with. {'; '.join(different)}. Give the same model, as "
            "an Experiment(...) where labels, arguments or a prior were given."
        )


def _site(site: Site) -> str:
    values = "" if site.support_values is None else f" with values {site.support_values.tolist()}"
    measured = "" if site.measured is None else f", measured {site.measured.int().tolist()}"
    return f"{site.role} of shape {tuple(site.shape)}, {site.dtype}, in {site.support}{values}{measured}"
