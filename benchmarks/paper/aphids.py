"""Case 4 of the paper: when to count aphids, a model without a tractable likelihood.

The model is `pyro_voed.problems.aphids`: two rates, counts at one to four times. The parts, and what they stand for in
Dong, Jacobsen, Khalloufi, Akram, Liu, Duraisamy and Huan (2025), "Variational Bayesian optimal experimental design with
normalizing flows":

* `bounds`: nearest neighbours (LB-KLD) and flows at the published designs, 30,000 simulations an estimate, repeated
  (the values of table 2);
* `above`: the information at some of these designs from the other side, by entropies of the outcome;
* `search`: designs found by grids (one and two times) and SPSA (three and four), on the bound of one flow that takes
  the times as context, then by the top of a cubic surface (the designs of table 2);
* `compare`: published and found designs with 300,000 simulations each, on common draws;
* `posterior`: the flow's posterior at the best four times beside approximate Bayesian computation (figure 13).

Run as

    python benchmarks/paper/aphids.py [--quick] [--only bounds above search compare posterior] [--figures DIR]
"""

import math

import pyro
import torch
from aphids_designs import BY_FLOW, BY_NEIGHBOURS, PRIOR, found, picture_of_designs
from study import Study, table

from pyro_voed import (
    Experiment,
    Fresh,
    JointSample,
    Pool,
    abc_posterior,
    barber_agakov,
    eig_flow,
    eig_lbkld,
    eig_marginal_likelihood,
    flow_posterior,
    sample_joint,
)
from pyro_voed.densities import AffineCouplingFlow, StackedDensity
from pyro_voed.diagnostics import agreement
from pyro_voed.estimators.building import build_density
from pyro_voed.estimators.fit import weights_group
from pyro_voed.monte_carlo import mean_and_standard_error
from pyro_voed.plots import plot_posterior_pair
from pyro_voed.problems.aphids import PUBLISHED, aphids, leaping_counts
from pyro_voed.training.ascent import Ascent
from pyro_voed.training.loop import fit_pool

REPEATS = 2


def main():
    chapters = {"bounds": bounds, "above": above, "search": search, "compare": compare, "posterior": posterior}
    study = Study("aphids", __doc__.splitlines()[0], list(chapters))
    for name in study.chosen:
        chapters[name](study)


def small_flow(theta_dim, context_dim):
    return AffineCouplingFlow(theta_dim, context_dim, num_transforms=3, hidden_dim=16)


def shown(times):
    return ", ".join(f"{time:.1f}" for time in times)


# Both bounds at the published designs, 30,000 simulations each: values of table 2.


def bounds(study):
    rows = []
    for index, (times, published_neighbours, published_flow) in enumerate(PUBLISHED[: study.size(len(PUBLISHED), 2)]):
        sizes = {"times": times, "repeats": REPEATS}
        near = study.part(f"neighbours_{index}", neighbour_bounds, num_samples=study.size(10_000, 1_000), **sizes)
        own = {"num_training": study.size(24_000, 100), "num_samples": study.size(5_980, 200), **study.passes}
        flow = study.part(f"flow_{index}", flow_bounds, **own, **sizes)
        rows.append(
            [
                shown(times),
                f"{published_neighbours:.2f}",
                mean_and_spread(near),
                f"{published_flow:.2f}",
                mean_and_spread(flow),
                f"{flow['on_training']:.3f}",
            ]
        )
    columns = ["times, days", "LB-KLD, published", "ours", "flow, published", "ours", "on its training pool"]
    table(f"Bounds, nats: mean of {REPEATS} ± standard error (standard deviation)", columns, rows)
    print(f"{near['simulations']:,.0f} and {flow['simulations']:,.0f} simulations an estimate")


def mean_and_spread(part):
    """Return the mean of the repeats, its standard error by those of the estimates, and the repeats' deviation."""
    eig, error = torch.tensor(part["eig"]), torch.tensor(part["error"])
    return f"{eig.mean():.3f} ± {error.square().mean().sqrt() / math.sqrt(len(eig)):.3f} ({eig.std():.3f})"


def neighbour_bounds(times, num_samples, repeats):
    results = [eig_lbkld(aphids(times), "y", "theta", num_samples=num_samples, seed=i) for i in range(repeats)]
    return {
        "eig": [result.eig.item() for result in results],
        "error": [result.standard_error.item() for result in results],
        "simulations": results[0].num_simulations,
    }


def flow_bounds(times, num_training, num_samples, repeats, batch_size=512, max_epochs=1_000):
    """Train the repeats stacked: each has simulations and weights of its own, but all stop at one time."""
    result = eig_flow(
        aphids(times),
        "y",
        "theta",
        designs={"xi": torch.tensor(times).expand(repeats, -1)},
        ensemble=True,
        density=small_flow,
        training=Pool(
            repeats * num_training, batch_size=repeats * batch_size, learning_rate=5e-3, max_epochs=max_epochs
        ),
        num_samples=num_samples,
        seed=0,
    )
    one_pass = max(1, round(0.9 * num_training / batch_size))
    return {
        "eig": result.eig.tolist(),
        "error": result.standard_error.tolist(),
        "on_training": result.history.bound[-one_pass:].mean().item(),
        "simulations": result.num_simulations / repeats,
    }


# The information from the other side.


def above(study):
    rows = []
    for index in (0, 2, 4, 5)[: study.size(4, 1)]:
        times, _, published = PUBLISHED[index]
        part = study.part(
            f"above_{index}",
            from_above,
            times=times,
            num_steps=study.size(800, 5),
            num_samples=study.size(100_000, 200),
            num_rates=study.size(4_000, 50),
            num_repeats=study.size(100, 40),
        )
        values = [
            f"{part[name][0]:.3f} ± {part[name][1]:.3f}" for name in ("marginal", "conditional", "eig", "learned")
        ]
        rows.append([shown(times), f"{published:.2f}", *values])
    columns = ["times, days", "published", "H(y), at most", "H(y given theta)", "information", "both densities learned"]
    table("The information from above, nats", columns, rows)


def from_above(times, num_steps, num_samples, num_rates, num_repeats):
    r"""Estimate the information as H(y) - H(y given theta), the first term by a learned density, thus from above.

    The counts are made continuous by uniform noise on (0, 1), the same in both terms.
    """
    learned = eig_marginal_likelihood(
        aphids(times),
        "y",
        "theta",
        training=Fresh(num_steps=num_steps, learning_rate=3e-3),
        num_samples=num_samples,
        seed=0,
    )
    pyro.set_rng_seed(1)
    sample = sample_joint(Experiment(aphids(times), "y", "theta"), num_samples)
    with torch.no_grad():
        y = sample.y + torch.rand_like(sample.y)
        marginal = mean_and_standard_error(-learned.density.marginal.log_prob(y, y[:, :0]))
    conditional = mean_and_standard_error(conditional_entropies(times, num_rates, num_repeats))
    difference = (marginal[0] - conditional[0], (marginal[1] ** 2 + conditional[1] ** 2) ** 0.5)
    pairs = {"marginal": marginal, "conditional": conditional, "eig": difference}
    pairs["learned"] = (learned.eig, learned.standard_error)
    return {name: [float(value) for value in pair] for name, pair in pairs.items()}


def conditional_entropies(times, num_rates, num_repeats):
    r"""Return the entropy of repeated experiments at each of many rates, nats: nearly normal ones.

    Gaussian entropy, the bias of the logarithm of a Wishart determinant taken off, less the leading terms of the
    negentropy (Comon 1994), :math:`\sum \kappa_{ijk}^2 / 12 + \sum \kappa_{ijkl}^2 / 48`, the squares as products of
    estimates from two halves, which have no error in common.
    """
    dim, freedom = len(times), num_repeats - 1
    theta = PRIOR.sample((num_rates,)).double().unsqueeze(1).expand(-1, num_repeats, -1)
    counts = leaping_counts(theta[..., 0], theta[..., 1], torch.tensor(times).expand(num_rates, num_repeats, -1))
    y = counts.double() + torch.rand(counts.shape, dtype=torch.double)
    centred = y - y.mean(1, keepdim=True)
    degrees = torch.arange(freedom, freedom - dim, -1) / 2
    log_det = torch.logdet(centred.mT @ centred / freedom) - torch.digamma(degrees).sum() + dim * math.log(freedom / 2)
    halves = [third_and_fourth_cumulants(half) for half in y.chunk(2, 1)]
    third, fourth = ((a * b).flatten(1).sum(-1) for a, b in zip(*halves, strict=True))
    return 0.5 * (dim * math.log(2 * math.pi * math.e) + log_det) - third / 12 - fourth / 48


def third_and_fourth_cumulants(y):
    """Return the cumulants of y `(rates, repeats, dim)` over the repeats, whitened by their own mean and covariance."""
    num, same = y.shape[1], torch.eye(y.shape[-1], dtype=y.dtype)
    centred = y - y.mean(1, keepdim=True)
    factor = torch.linalg.cholesky(centred.mT @ centred / num)
    z = torch.linalg.solve_triangular(factor, centred.mT, upper=False).mT
    pairs = torch.einsum("rni,rnj->rnij", z, z).flatten(2)
    gaussian = torch.einsum("ij,kl->ijkl", same, same)
    gaussian = gaussian + gaussian.transpose(1, 2) + gaussian.transpose(1, 3)
    # The mean fourth moments of normal draws whitened by their own moments (Mardia 1970).
    gaussian = gaussian * (num - 1) / (num + 1)
    return pairs.mT @ z / num, pairs.mT @ pairs / num - gaussian.flatten(0, 1).flatten(1)


# Designs: table 2.


def search(study):
    rows = []
    for num_times in (1, 2, 3, 4):
        part = found(study, num_times)
        table_of = {"grid": "grid", "spsa": "SPSA"}
        rows.append(
            [
                str(num_times),
                *(shown(PUBLISHED[index[num_times - 1]][0]) for index in (BY_NEIGHBOURS, BY_FLOW)),
                f"{table_of[part['method']]}: {shown(part['searched'])}",
                shown(part["times"]),
                f"{part['simulations'] / 1e6:.1f}",
            ]
        )
    columns = ["", "published, LB-KLD", "published, flow", "search", "top of the surface", "million simulations"]
    table("Counting times found, days (table 2)", columns, rows)
    study.save(picture_of_designs(study), "designs")


# Published and found designs on common draws, 300,000 simulations each.


def compare(study):
    rows = []
    for num_times in (1, 2, 3, 4):
        part = compared(study, num_times)
        ahead = [f"{mean:+.4f} ± {error:.4f}" for mean, error in part["ahead"]] + [""]
        for times, eig, error, less in zip(part["designs"], part["eig"], part["error"], ahead, strict=True):
            origin = origin_of(times, ours=part["designs"][-1])
            rows.append([shown(times), origin, f"{eig:.4f} ± {error:.4f}", less])
    columns = ["times, days", "", "flow bound", "found here less this one"]
    table("Bounds with 300,000 simulations each, on common draws, nats", columns, rows)


def origin_of(times, ours):
    methods = {"LB-KLD": BY_NEIGHBOURS, "flow": BY_FLOW}
    names = [name for name, index in methods.items() if times in [PUBLISHED[i][0] for i in index]]
    published = [f"published, {' and '.join(names)}"] if names else []
    return "; ".join(published + ["found here"] * (times == ours))


def compared(study, num_times):
    ours = tuple(found(study, num_times)["times"])
    published = {PUBLISHED[index[num_times - 1]][0] for index in (BY_NEIGHBOURS, BY_FLOW)}
    return study.part(
        f"compare_{num_times}",
        flow_bounds_on_common_draws,
        designs=[*sorted(published - {ours}), ours],
        num_training=study.size(50_000, 200),
        num_samples=study.size(250_000, 200),
        **study.passes,
    )


def flow_bounds_on_common_draws(designs, num_training, num_samples, max_epochs=1_000):
    """Train a flow for each design and evaluate all on the same aphids, each seen at the times of its design.

    Training shares its aphids too, its first weights and its minibatches: what is chance in it moves all bounds alike.
    """
    pyro.set_rng_seed(1)
    kept, fresh = (seen_at(designs, size) for size in (num_training, num_samples))
    flow = small_flow(kept.theta.shape[-1], kept.y.shape[-1])
    members = [
        build_density(flow, theta, y, num_designs=0, summary=None)
        for theta, y in zip(kept.theta.unbind(1), kept.y.unbind(1), strict=True)
    ]
    density = StackedDensity(members)
    fit_pool(
        kept,
        lambda rows: barber_agakov(rows, density),
        Ascent([weights_group(density, [1e-2])]),
        batch_size=1_024,
        max_epochs=max_epochs,
        begin=lambda part: density.fit_scales_(part.theta, part.y),
        progress=False,
    )
    with torch.no_grad():
        terms = barber_agakov(fresh, density)
    eig, error = mean_and_standard_error(terms)
    ahead = [mean_and_standard_error(terms[:, -1] - terms[:, index]) for index in range(len(designs) - 1)]
    return {
        "designs": designs,
        "eig": eig.tolist(),
        "error": error.tolist(),
        "ahead": [[float(value) for value in pair] for pair in ahead],
    }


def seen_at(designs, num_samples):
    """Simulate aphids and return what each of several designs sees of them, `(num_samples, num_designs, ...)`."""
    union = sorted({time for design in designs for time in design})
    columns = torch.tensor([[union.index(time) for time in design] for design in designs])
    sample = sample_joint(Experiment(aphids(union), "y", "theta"), num_samples)
    every = [getattr(sample, name).unsqueeze(1) for name in ("theta", "log_det", "outcome_log_det", "log_prior")]
    theta, *logs = (value.expand(-1, len(designs), *value.shape[2:]) for value in every)
    return JointSample(theta, sample.y[:, columns], *logs)


# Posteriors at the best four times: figure 13.


def posterior(study):
    part = study.part(
        "posterior",
        posteriors,
        times=tuple(found(study, 4)["times"]),
        num_training=study.size(24_000, 200),
        num_samples=study.size(5_900, 200),
        num_simulations=study.size(1_000_000, 2_000),
        num_draws=study.size(4_000, 500),
        num_judged=study.size(1_000, 100),
        **study.passes,
    )
    rows = [
        [name, *(f"{part[method][which][i]:.4g}" for method in ("flow", "abc") for which in ("mean", "sd"))]
        for i, name in enumerate(("birth rate", "death rate"))
    ]
    columns = ["rate", "flow: mean", "standard deviation", "ABC: mean", "standard deviation"]
    table(f"Posteriors after counts of {part['counts']} (figure 13)", columns, rows)
    print(f"correlation: flow {part['flow']['correlation']:.3f}, ABC {part['abc']['correlation']:.3f}")
    print(f"classifier between the two: accuracy {part['accuracy']}; between two halves of ABC's: {part['control']}")
    study.save(picture_of_posteriors(part), "posteriors")


def posteriors(times, num_training, num_samples, num_simulations, num_draws, num_judged, max_epochs=1_000):
    model = aphids(times)
    pyro.set_rng_seed(3)
    outcome = sample_joint(Experiment(model, "y", "theta"), 1)
    counts = outcome.values["y"][0]
    result = eig_flow(
        model,
        "y",
        "theta",
        density=small_flow,
        training=Pool(num_training, learning_rate=5e-3, max_epochs=max_epochs),
        num_samples=num_samples,
        seed=0,
    )
    flow = flow_posterior(result, counts, num_draws, seed=0)
    reference = abc_posterior(
        model,
        counts,
        "y",
        "theta",
        num_simulations=num_simulations,
        quantile=num_draws / num_simulations,
        regression_adjustment=True,
        seed=0,
    )
    judged = agreement(flow, reference, num_draws=num_judged, seed=0)
    draws = {"flow": flow.flat("theta"), "abc": reference.flat("theta")}
    moments = {
        name: {"mean": x.mean(0).tolist(), "sd": x.std(0).tolist(), "correlation": torch.corrcoef(x.T)[0, 1].item()}
        for name, x in draws.items()
    }
    return {
        "counts": ", ".join(f"{count:.0f}" for count in counts.tolist()),
        "truth": outcome.values["theta"][0],
        "draws": draws,
        "accuracy": f"{judged.c2st.accuracy:.3f} ± {judged.c2st.standard_error:.3f}",
        "control": f"{judged.control.accuracy:.3f} ± {judged.control.standard_error:.3f}",
        **moments,
    }


def picture_of_posteriors(part):
    scale = torch.tensor([1.0, 1e4])
    pyro.set_rng_seed(0)
    prior = PRIOR.sample((20_000,)) * scale
    grid = plot_posterior_pair(
        {"flow": part["draws"]["flow"] * scale, "ABC": part["draws"]["abc"] * scale},
        prior=prior,
        true_values=part["truth"] * scale,
        column_names=["birth rate, 1/day", "death rate, 1e-4/day"],
    )
    return grid[0, 0].figure


if __name__ == "__main__":
    main()
