"""Searches for the times at which to count aphids, and their picture; a part of `aphids.py`, not run by itself.

One flow that takes the times as context is trained at sorted times drawn at random; its bound, at any times, is what a
grid (one and two times) or SPSA (three and four) maximises. Then the flow learns on about the best design, and a
cubic surface is fitted to its bound at many designs there, all on the same simulated plants, as separate estimates are
too noisy to tell neighbours apart. Its top is the design found.
"""

from functools import partial

import matplotlib.pyplot as plt
import pyro
import torch

from pyro_voed import Fresh, amortise_eig, search_grid, search_spsa
from pyro_voed.densities import AffineCouplingFlow
from pyro_voed.experiment.designs import pack_designs
from pyro_voed.plots.style import BLUE, GREEN, GREY, VERMILLION
from pyro_voed.problems.aphids import PRIOR_COVARIANCE, PRIOR_MEAN, PUBLISHED, aphids, leaping_counts

BY_NEIGHBOURS, BY_FLOW = (0, 1, 3, 5), (0, 2, 4, 6)
"""Members of `PUBLISHED` found by either method, one for each number of times."""
PRIOR = torch.distributions.MultivariateNormal(torch.tensor(PRIOR_MEAN), torch.tensor(PRIOR_COVARIANCE))
FIRST_DAY, LAST_DAY = 10.0, 40.0
GRID_STEPS = {1: 0.5, 2: 1.0}
HALF_WIDTHS = (2.0, 1.0)
"""Of the boxes about the best design so far, in days, over which a cubic surface is fitted, one after the other."""


def found(study, num_times):
    return study.part(
        f"search_{num_times}",
        searched,
        num_times=num_times,
        num_steps=study.size(1_500, 4),
        num_local_steps=study.size(750, 2),
        num_rows=study.size(1_000, 100),
        grid_step=GRID_STEPS[num_times] * study.size(1, 10) if num_times in GRID_STEPS else None,
        climbs=study.size(200, 2),
        num_designs=study.size(150 * num_times, 40),
        num_plants=study.size(50_000, 200),
        most_rounds=study.size(4, 1),
    )


def searched(num_times, num_steps, num_local_steps, num_rows, grid_step, climbs, num_designs, num_plants, most_rounds):
    """Search on the bound of a flow that takes the times as context, then about the best design of that search.

    Where the top of a surface lies at a side of its box, the next box of that size, of `most_rounds`, is put about it.
    """
    even = torch.linspace(FIRST_DAY, LAST_DAY, num_times + 2)[1:-1]
    surface = learn_surface(even, scattered_times, None, num_steps, seed=num_times)
    estimator = partial(surface.at, num_samples=num_rows)
    method = "spsa" if grid_step is None else "grid"
    if method == "grid":
        days = torch.arange(FIRST_DAY, LAST_DAY + 0.01, grid_step)
        grid = torch.combinations(days, num_times)
        result = search_grid(estimator, {"xi": grid}, seed=0)
        values = {"grid": grid, "eig": result.candidates.eig}
    else:
        starts = {"xi": torch.stack([even - 5.0, even + 5.0])}
        result = search_spsa(
            estimator,
            num_steps=climbs,
            num_repeats=2,
            starts=starts,
            perturbation=0.06,
            common_random_numbers=False,
            seed=0,
        )
        values = {"path": result.path["xi"]}
    pyro.clear_param_store()  # where the search left its best design, for all models with a design "xi"
    searched_times = result.designs["xi"].sort().values
    plants = Plants(num_plants)
    top, simulations, rounds = searched_times, surface.num_simulations + result.num_simulations + num_plants, 0
    for half_width in HALF_WIDTHS:
        for _ in range(most_rounds):
            near = partial(times_near, centre=top, half_width=1.2 * half_width)
            surface = learn_surface(top, near, surface.density, num_local_steps, seed=100 * num_times + rounds)
            simulations += surface.num_simulations
            rounds += 1
            top, inside = top_of_surface(surface, plants, top, half_width, num_designs, seed=rounds)
            if inside:
                break
    return {
        "method": method,
        "searched": searched_times.tolist(),
        "times": [round(time, 1) for time in top.tolist()],
        "rounds": rounds,
        "simulations": simulations,
        **values,
    }


def learn_surface(times, scattered, density, num_steps, seed):
    """Train a flow, or go on with one, at times drawn by `scattered(num, num_times)`."""
    num_times = len(times)
    return amortise_eig(
        aphids(times, simulator=partial(leaping_counts, step=0.25)),
        "y",
        "theta",
        proposal=lambda num: {"xi": scattered(num, num_times)},
        density=density or partial(AffineCouplingFlow, num_transforms=3, hidden_dim=64),
        training=Fresh(num_steps=num_steps, learning_rate=3e-3),
        seed=seed,
    )


def scattered_times(num, num_times):
    return (FIRST_DAY + (LAST_DAY - FIRST_DAY) * torch.rand(num, num_times)).sort(-1).values


def times_near(num, num_times, centre, half_width):
    return in_order(centre + half_width * (2.0 * torch.rand(num, num_times) - 1.0))


def in_order(times):
    return times.clamp(0.0, 50.0).sort(-1).values


class Plants:
    """Plants that are counted every tenth of a day, so that all designs can be compared on the same ones."""

    def __init__(self, num_plants):
        pyro.set_rng_seed(0)
        self.theta = PRIOR.sample((num_plants,))
        self.counts = leaping_counts(*self.theta.unbind(-1), (torch.arange(501) / 10).expand(num_plants, -1))

    def bound(self, surface, times):
        """Return the bound at times, up to the entropy of the prior, which all designs share."""
        counts = self.counts[:, (10 * times).round().long()]
        seen = pack_designs(surface.experiment, {"xi": times}).expand(len(counts), -1)
        with torch.no_grad():
            return surface.density.log_prob(self.theta, torch.cat([counts, seen], -1)).mean()


def top_of_surface(surface, plants, centre, half_width, num_designs, seed, num_points=200_000):
    """Return where a cubic fitted to bounds about a design is largest, and whether that is inside its box."""
    generator = torch.Generator().manual_seed(seed)
    offsets, points = (
        2.0 * torch.rand(size, len(centre), generator=generator) - 1.0 for size in (num_designs, num_points)
    )
    designs = (10.0 * in_order(centre + half_width * offsets)).round() / 10.0
    eig = torch.stack([plants.bound(surface, times) for times in designs])
    features = cubic_features((designs - centre) / half_width)
    coefficients = torch.linalg.lstsq(features, eig.double().unsqueeze(-1)).solution
    top = points[(cubic_features(points) @ coefficients).argmax()]
    return in_order(centre + half_width * top), bool(top.abs().max() < 0.95)


def cubic_features(x):
    """Return all products of up to three coordinates."""
    with_one = torch.cat([torch.ones(len(x), 1), x], 1).double()
    places = torch.combinations(torch.arange(with_one.shape[1]), 3, with_replacement=True)
    return with_one[:, places].prod(-1)


def picture_of_designs(study):
    figure, axes = plt.subplots(1, 3, figsize=(12.0, 3.7), layout="constrained")
    draw_one_time(axes[0], found(study, 1))
    draw_two_times(axes[1], found(study, 2))
    draw_all_designs(axes[2], {num_times: found(study, num_times)["times"] for num_times in (1, 2, 3, 4)})
    return figure


def draw_one_time(ax, part):
    ax.plot(part["grid"][:, 0], part["eig"], color=GREY)
    ax.axvline(PUBLISHED[0][0][0], color=BLUE, linestyle="--", label="published, both methods")
    ax.axvline(part["times"][0], color=VERMILLION, label="found here")
    ax.set(xlabel="time, days", ylabel="bound, nats", title="one time")
    ax.legend()


def draw_two_times(ax, part):
    filled = ax.tricontourf(*part["grid"].T, part["eig"], levels=14, cmap="cividis")
    ax.figure.colorbar(filled, ax=ax, label="bound, nats")
    marks = [(PUBLISHED[1][0], BLUE, "o", "published, LB-KLD"), (PUBLISHED[2][0], GREEN, "s", "published, flow")]
    for times, colour, marker, label in [*marks, (part["times"], VERMILLION, "*", "found here")]:
        size = 14 if marker == "*" else 8
        ax.plot(*times, marker, color=colour, markersize=size, markeredgecolor="white", label=label, linestyle="none")
    ax.set(xlabel="first time, days", ylabel="second time, days", title="two times", xlim=(10, 32), ylim=(14, 40))
    ax.legend(loc="lower right")


def draw_all_designs(ax, ours):
    days = torch.arange(0.0, 45.1, 0.5)
    pyro.set_rng_seed(0)
    theta = PRIOR.sample((400,))
    numbers = leaping_counts(theta[:, 0], theta[:, 1], days.expand(400, -1))
    low, high = numbers.quantile(torch.tensor([0.05, 0.95]), 0)
    band = ax.twinx()
    band.fill_between(days, low, high, color=GREY, alpha=0.25, linewidth=0)
    band.set(ylabel="aphids, 5 to 95 % of experiments", ylim=(0, None))
    kinds = [(BY_NEIGHBOURS, BLUE, "o", "published, LB-KLD"), (BY_FLOW, GREEN, "s", "published, flow")]
    for num_times, times in ours.items():
        for shift, (index, colour, marker, label) in zip((0.22, 0.0), kinds, strict=True):
            published = PUBLISHED[index[num_times - 1]][0]
            ax.plot(published, [num_times + shift] * num_times, marker, color=colour, label=label)
        ax.plot(times, [num_times - 0.22] * num_times, "*", color=VERMILLION, markersize=11, label="found here")
    ax.set(xlabel="time, days", ylabel="number of counts", yticks=list(ours), ylim=(0.4, 6.2), xlim=(0, 45))
    ax.set_title("all designs, over the numbers of aphids")
    ax.legend(*[part[:3] for part in ax.get_legend_handles_labels()], loc="upper right")
    ax.set_zorder(band.get_zorder() + 1)
    ax.patch.set_visible(False)
