r"""Posterior of one outcome by the No-U-Turn sampler: the reference that flows are held against.

The sampler explores all latent sites in unconstrained coordinates u (`latents`), by the gradient of

.. math:: U(u) = -\log p(u, y \mid \xi) .

Chains run one after the other in this process, from draws of the prior, which is wider than the posterior as R-hat
wants its starting points. (Pyro's parallel chains fork or pickle the model, which closures often do not survive.)

References:
    M. D. Hoffman and A. Gelman (2014), The No-U-Turn sampler. Journal of Machine Learning Research 15.
    A. Gelman et al. (2013), Bayesian data analysis, 3rd edition, section 11.4 (split R-hat, effective sample size).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from jaxtyping import Bool, Float
from pyro.infer import MCMC, NUTS
from torch import Tensor

from pyro_voed.checks import Labels, check_count, check_share, warn
from pyro_voed.experiment.caller_state import common_stream, isolated
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.inference.reference.conditioned import conditioned, mixing, mixing_faults
from pyro_voed.inference.reference.latents import Latents, latents_of
from pyro_voed.posterior_sample import PosteriorSample


def nuts_posterior(
    model: Callable[..., Any] | Experiment,
    observations: Tensor | Mapping[str, Any],
    observation_labels: Labels = None,
    target_labels: Labels = None,
    *,
    designs: Mapping[str, Any] | None = None,
    num_samples: int = 1000,
    num_warmup: int = 500,
    num_chains: int = 2,
    target_accept_prob: float = 0.8,
    jit_compile: bool = False,
    seed: int | None = None,
    progress: bool | None = None,
) -> PosteriorSample:
    """Draw from the posterior of one outcome with NUTS.

    All latent sites are sampled, the targets are returned. Warns, naming the sites, where R-hat exceeds 1.05, an
    effective sample size falls below 100, or a transition diverged.

    Args:
        model: A Pyro program of one experiment, or an `Experiment` with labels, prior and the rest.
        observations: The outcome, of one experiment's shape: a dict by site, or a tensor where there is one site.
        observation_labels: Outcome sites; default: the sites given with `obs=`, whose own data are ignored.
        target_labels: Sites to return, deterministic ones too; default: all latent sites.
        designs: The design of the outcome, one value a label; default: the store's, else the model's initial one. The
            store is not touched.
        num_samples: Draws kept of each chain, at least 4.
        num_warmup: Draws of each chain that adapt the sampler and are dropped.
        num_chains: Chains, run one after the other.
        target_accept_prob: Acceptance that the step size is adapted to, in (0, 1); raise it where transitions diverge.
        jit_compile: Compile the log density with the JIT, about twice as fast for models without Python control flow.
        seed: Seed; None draws one from the global generator. Equal seeds give equal draws.
        progress: Show a progress bar for each chain; None shows them on a terminal only.

    Returns:
        Draws `(num_chains, num_samples, *shape)` of each target, with diagnostics.

    Raises:
        ValueError: If labels, designs, sizes or the outcome's shape are wrong, or a measured value is not finite.
        NotImplementedError: If the outcome has no density or a latent site is discrete.

    Example:
        >>> from pyro_voed.problems.linear_gaussian import linear_gaussian
        >>> outcome = torch.tensor([1.0, 2.0, 4.0])
        >>> posterior = nuts_posterior(linear_gaussian(), outcome, "y", num_samples=150, num_warmup=100, seed=0)
        >>> posterior.values["theta"].shape, posterior.num_divergences
        (torch.Size([2, 150, 2]), 0)
    """
    check_count(num_samples, "num_samples", minimum=4)
    check_count(num_warmup, "num_warmup")
    check_count(num_chains, "num_chains")
    check_share(target_accept_prob, "target_accept_prob")
    with isolated(seed):
        # Chains never run rows together, so a model need not be batch-friendly for its reference posterior.
        case = conditioned(
            model, observations, observation_labels, target_labels, designs, scored_by="NUTS", vectorize=False
        )
        show = sys.stderr.isatty() if progress is None else progress
        chains, flags = [], []
        with torch.no_grad(), pyro.validation_enabled(False):
            latents = latents_of(case)
            for chain_seed in torch.randint(2**31 - 1, (num_chains,)).tolist():
                with common_stream(chain_seed):
                    start = latents.coordinates(latents.run(1))[0]
                    potential = _potential(latents, start if jit_compile else None)
                    kernel = NUTS(potential_fn=potential, target_accept_prob=target_accept_prob)
                    theta, diverging = _run_chain(kernel, start, num_samples, num_warmup, disable_bar=not show)
                    chains.append(latents.targets(theta))
                    flags.append(diverging)
        draws = {name: torch.stack([chain[name] for chain in chains]) for name in case.experiment.target_labels}
        diverging = torch.stack(flags)
        num_divergences = int(diverging.sum())
        r_hat, effective = mixing(draws)
        found = mixing_faults(effective, r_hat)
        if num_divergences:
            found.append(f"{num_divergences} transitions of sites {list(draws)} diverged")
        if found:
            warn(
                f"NUTS did not mix well, so its draws are no reference: {'; '.join(found)}. Raise num_samples and "
                "num_warmup, raise target_accept_prob against divergences, or reparametrise the model."
            )
        return case.sample("NUTS", draws, effective, diverging, r_hat=r_hat, num_divergences=num_divergences)


def _potential(
    latents: Latents, example: Float[Tensor, " dim"] | None
) -> Callable[[Mapping[str, Tensor]], Float[Tensor, ""]]:
    """Return minus the log density of latent coordinates u and outcome, compiled where there is an example."""

    def potential(u: Float[Tensor, " dim"]) -> Float[Tensor, ""]:
        run = latents.run(1, u.unsqueeze(0))
        log_density = sum(latents.log_priors(run).values(), latents.log_likelihood(run))
        return -log_density.squeeze(0).to(u.dtype)

    compiled = potential
    if example is not None:
        with warnings.catch_warnings():
            # Tracing warns of branches, which at one experiment are the same at every point.
            warnings.simplefilter("ignore")
            compiled = torch.jit.trace(potential, (example,), check_trace=False)
    return lambda point: compiled(point["u"])


def _run_chain(
    kernel: NUTS, start: Float[Tensor, " dim"], num_samples: int, num_warmup: int, *, disable_bar: bool
) -> tuple[Float[Tensor, "num_samples dim"], Bool[Tensor, " num_samples"]]:
    """Return a chain's draws, and which transitions diverged."""
    sampler = MCMC(kernel, num_samples, num_warmup, initial_params={"u": start}, disable_progbar=disable_bar)
    with torch.enable_grad():
        sampler.run()
    diverging = torch.zeros(num_samples, dtype=torch.bool)
    diverging[list(sampler.diagnostics()["divergences"]["chain 0"])] = True
    return sampler.get_samples()["u"].detach(), diverging
