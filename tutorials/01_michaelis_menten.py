# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Which measurements tell most about an enzyme?
#
# An enzyme turns a substrate into a product, the faster the more substrate there is, up to a maximal rate. Two numbers
# describe it: that maximal rate, and the concentration at which half of it is reached. We can measure the rate at seven
# concentrations, each time with an error, and want to know both numbers. *Which seven concentrations?*
#
# Before any measurement is made, what we know is the prior $p(\theta)$. A measurement $y$ at the design $\xi$ turns it
# into the posterior $p(\theta \mid y, \xi)$. The *expected information gain* (EIG) is how much uncertainty, as
# Shannon's entropy, that takes away on average over all outcomes that may come:
#
# $$
# \mathrm{EIG}(\xi) = \mathbb{E}_{p(\theta, y \mid \xi)}\left[\log \frac{p(\theta \mid y, \xi)}{p(\theta)}\right].
# $$
#
# One nat more means that, on average, the posterior occupies about $e = 2.7$ times less of the parameter space. The
# best design is the one with the largest EIG (D. V. Lindley 1956).
#
# The trouble is the posterior inside the average: nobody knows it in closed form, and there is one for every outcome.
# The way out taken here is to learn it. If any density $q(\theta \mid y)$ is put in its place, the average can only
# become smaller (D. Barber and F. Agakov 2003):
#
# $$
# \mathrm{EIG}(\xi) \ge \mathbb{E}_{p(\theta, y \mid \xi)}\left[\log q(\theta \mid y) - \log p(\theta)\right],
# $$
#
# and what is lost is how far $q$ is from the posterior. So the right-hand side is raised, by stochastic gradients, in
# $q$ (a normalising flow) *and* in the design $\xi$, at the same time. One training gives the design, a lower bound on
# its EIG, and a posterior for any outcome.
#
# The model, its constants and the course of the story are those of D. R. Ivanova's BayesFlow tutorial on Bayesian
# experimental design; the code and every number here are this library's. All numbers quoted were measured on one core
# of a two-core CPU machine, with the seeds below. All information is in nats.

# %%
import os
import time
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer import Importance, Predictive

from pyro_voed import (
    Experiment,
    Fresh,
    eig_flow,
    eig_marginal,
    eig_nmc,
    flow_guide,
    flow_posterior,
    nuts_posterior,
    optimise_design,
    sample_joint,
)
from pyro_voed.bounds import ba_terms
from pyro_voed.densities import SplineCouplingFlow, Standardise, StandardisedDensity
from pyro_voed.diagnostics import agreement
from pyro_voed.monte_carlo import mean_and_standard_error
from pyro_voed.plots import (
    plot_design_path,
    plot_eig,
    plot_posterior_grid,
    plot_posterior_pair,
    plot_realisations,
    plot_training,
)
from pyro_voed.problems.michaelis_menten import exact_eig

torch.set_num_threads(1)
pyro.set_rng_seed(1)

FIGURES = Path(os.environ.get("PYRO_VOED_FIGURES", "figures"))
FIGURES.mkdir(parents=True, exist_ok=True)
# Tiny sizes, to see in seconds that everything runs; the numbers mean nothing then.
SMOKE = os.environ.get("PYRO_VOED_SMOKE") == "1"


def save(figure, name):
    figure.savefig(FIGURES / f"01_{name}.png", dpi=120)
    print(f"figure written: {FIGURES / f'01_{name}.png'}")


# %% [markdown]
# ## The model of one experiment
#
# An ordinary Pyro program of *one* experiment. What the experimenter sets is a `pyro.param`: seven concentrations in
# units of 400, so between 0 and 1. They start near one half, at the values printed in the tutorial mentioned above.
# What we want to know and what we measure are `pyro.sample` sites:
#
# $$
# \theta \sim N\left((0.5, 0.5), 0.1^2 I\right), \qquad
# y_i \sim N\left(\frac{(400\,\xi_i)^4\, t_1}{(400\,\xi_i)^4 + t_2^4},\; 5^2\right), \qquad t = 20 + 180\,\theta .
# $$
#
# Parameters are taken apart with `split(1, dim=-1)`, from the right, so that the same program also runs for many
# experiments at once.

# %%
START = torch.tensor([0.4745, 0.4456, 0.5147, 0.5618, 0.4844, 0.4880, 0.5162])


def mean_rate(theta, xi):
    maximal_rate, half_rate_concentration = (20 + 180 * theta).split(1, dim=-1)
    saturation = (400 * xi) ** 4
    return saturation * maximal_rate / (saturation + half_rate_concentration**4)


def model():
    xi = pyro.param("xi", START.clone(), constraint=constraints.unit_interval)
    theta = pyro.sample("theta", dist.Normal(0.5, 0.1).expand([2]).to_event(1))
    return pyro.sample("y", dist.Normal(mean_rate(theta, xi), 5.0).to_event(1))


# %% [markdown]
# Nothing is simulated in bulk before the model has been looked at. An `Experiment` is that look on its own: it runs the
# model a few times, finds designs, targets and outcomes, checks that running many experiments at once gives the same
# densities as running them one by one, and refuses what has no defined information gain. Every estimator begins with
# it, and takes an `Experiment` in place of the model and its labels.

# %%
experiment = Experiment(model, observation_labels="y", target_labels="theta")
print(experiment)

# %% [markdown]
# ## How informative are the start designs?
#
# One call of `eig_flow` trains a flow on simulations of the model, fresh ones at every step, until the bound no longer
# rises by more than its noise. Then it averages the bound over simulations that took no part in training. As this model
# states the density of its outcome, two more estimators can be put beside it as references: an upper bound (a second
# flow learns the distribution of the outcomes) and nested Monte Carlo (no learning; its upward bias shrinks as the
# draws increase).
#
# With two parameters the exact value can be found by quadrature; `pyro_voed.problems` keeps it for comparison.

# %%
sizes = {"training": Fresh(max_steps=100), "num_samples": 500} if SMOKE else {}
num_outcomes = 512 if SMOKE else 4096
before = eig_flow(experiment, references=[partial(eig_marginal, **sizes), eig_nmc], seed=0, **sizes)
print(before)
exact_before, exact_before_error = exact_eig(START, num_outcomes=num_outcomes)
print(f"exact {exact_before:.4f} +- {exact_before_error:.4f} nats, by quadrature")

ax = plot_eig(before)
ax.axhline(exact_before, color="0.1", linewidth=1, linestyle=":")
ax.set_title("Start designs; dotted: exact")
save(ax.figure, "eig_start")

# %% [markdown]
# The flow gave 2.402 ± 0.006, the marginal 2.411 ± 0.006, nested Monte Carlo 2.428 ± 0.024; the exact value is
# 2.4074 ± 0.0003. Lower and upper bound enclose it, and lie 0.009 nats apart. Without an exact value, that gap is what
# tells how much the two flows have left to learn.
#
# ## Posteriors at the start designs
#
# The bound is only as good as the flow, and the flow is a posterior we can look at. Three enzymes are drawn from the
# prior, and one outcome is simulated for each. `flow_posterior` draws from the flow, in milliseconds, without further
# training. `nuts_posterior` runs the No-U-Turn sampler on the same model with the same labels; it is the reference.

# %%
num_enzymes = 1 if SMOKE else 3
thetas = dist.Normal(0.5, 0.1).sample([num_enzymes, 2])
enzymes = [f"enzyme {number + 1}" for number in range(num_enzymes)]


def simulate():
    """Return one outcome for each enzyme, at the design in the parameter store."""
    return torch.stack([pyro.condition(model, data={"theta": theta})() for theta in thetas]).detach()


def posteriors(result, outcomes):
    """Return draws of the flow and of NUTS for each outcome, at the design of the result."""
    rows = []
    for number, y in enumerate(outcomes):
        flow = flow_posterior(result, {"y": y}, num_samples=4_000, seed=number)
        chains = {"num_samples": 200, "num_warmup": 100} if SMOKE else {"num_samples": 3_000, "num_warmup": 500}
        reference = nuts_posterior(
            model, {"y": y}, "y", "theta", designs=result.designs, num_chains=4, jit_compile=True, seed=number, **chains
        )
        effective, r_hat = reference.effective_sample_size["theta"].min(), reference.r_hat["theta"].max()
        print(
            f"outcome {number + 1}: flow {flow.seconds:.2f} s; NUTS {reference.seconds:.1f} s, "
            f"{effective:.0f} effective draws, R-hat {r_hat:.3f}, {reference.num_divergences} divergences"
        )
        rows.append({"flow": flow, "NUTS": reference})
    return rows


outcomes_before = simulate()
rows_before = posteriors(before, outcomes_before)

# %% [markdown]
# Do the two agree? A classifier is trained to tell draws of the flow from draws of NUTS (D. Lopez-Paz and M. Oquab
# 2017); an accuracy of one half on draws it has not seen means that it cannot. An accuracy alone says little, so two
# more are printed: NUTS against itself, which is what agreement looks like here, and NUTS against itself with one
# parameter shifted by 0.3 standard deviations, which is what a small error looks like.


# %%
def compare(rows):
    for number, row in enumerate(rows):
        draws = {"num_draws": 100, "num_seeds": 2} if SMOKE else {}
        print(f"outcome {number + 1}")
        print(agreement(row["flow"], row["NUTS"], seed=number, **draws))


compare(rows_before)

# %% [markdown]
# At the three outcomes NUTS had 2,202, 2,218 and 2,178 effective draws and no divergences. Between flow and NUTS the
# accuracies are 0.492, 0.506 and 0.506, with standard errors of 0.013 to 0.016; between NUTS and itself 0.494, 0.503
# and 0.502; for the small shift 0.663, 0.643 and 0.645. So at these outcomes the flow is as close to NUTS as NUTS is
# to itself, and an error of 0.3 standard deviations would have shown.

# %%
prior = dist.Normal(0.5, 0.1).sample([20_000, 2])
names = ["maximal rate", "half-rate concentration"]
grid = plot_posterior_grid(
    rows_before,
    prior=prior,
    true_values=list(thetas),
    row_names=enzymes,
    column_names=names,
)
save(grid[0, 0].figure, "posterior_grid_start")
grid = plot_posterior_pair(rows_before[0], prior=prior, true_values=thetas[0], column_names=names)
save(grid[0, 0].figure, "posterior_pair_start")

# %% [markdown]
# The flow follows the reference, also along the bent ridge of the pair plot. But the posteriors are wide. All
# seven measurements are taken where the curve is already bending towards its maximum: a high maximum reached late and
# a low one reached early look alike there, and the half-rate concentration is hardly known better than before.
#
# ## Learning the designs
#
# `optimise_design` climbs the same bound in the design and in the flow together. Gradients reach the design because
# the outcome is drawn as mean plus noise, so moving the design moves the simulated outcome. Designs move in
# unconstrained coordinates, so the constraint of the `pyro.param` holds all along.

# %%
best = optimise_design(model, "y", "theta", seed=0, **sizes)
print(best)
exact_after, exact_after_error = exact_eig(best.designs["xi"], num_outcomes=num_outcomes)
print(f"exact {exact_after:.4f} +- {exact_after_error:.4f} nats, by quadrature")
print("in the parameter store:", pyro.param("xi").detach().sort().values)

ax = plot_training(best.history)
ax.set_title("Climbing the bound in design and flow together")
save(ax.figure, "training")
ax = plot_design_path(best)
ax.set(ylim=(0, 1), ylabel="substrate concentration / 400", title="The seven concentrations during the search")
save(ax.figure, "design_path")

# %% [markdown]
# The search stopped by itself after 2,250 steps and 0.6 million simulated experiments. Its lower bound is 3.696 ± 0.006
# nats, the exact value 3.7053 ± 0.0004: 1.298 nats more than at the start, so that on average the posterior shrinks
# by a further factor of 3.7. For comparison, the designs printed in the tutorial that this one retells are worth 3.594
# nats, and the best ones known 3.7066 (quadrature, `pyro_voed.problems.michaelis_menten`).
#
# The seven designs have become two groups: three measurements at 0.27, and four between 0.92 and 0.97.
#
# Why there? At high concentrations the curve is flat and its height is the maximal rate. At about 0.27, which is
# near the half-rate concentration, the curve is steepest and tells how far right it lies. In the middle, where we
# started, both numbers act on the outcome in nearly the same way.

# %%
outcomes_after = simulate()
fine = torch.linspace(0.0, 1.0, 200)
curves = mean_rate(thetas.unsqueeze(1), fine.unsqueeze(-1)).squeeze(-1)
figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
for ax, xi, outcomes, name in zip(
    axes, (START, best.designs["xi"]), (outcomes_before, outcomes_after), ("start", "learned"), strict=True
):
    plot_realisations(
        xi,
        outcomes,
        ax,
        curve_designs=fine,
        curve_values=curves,
        design_name="substrate concentration / 400",
        observation_name="reaction rate",
    )
    ax.set(title=f"The three enzymes at the {name} designs", xlim=(0, 1))
axes[1].set_ylabel("")
axes[0].legend(frameon=False)
save(figure, "realisations")

# %% [markdown]
# ## Posteriors at the learned designs
#
# The same three enzymes, measured at the learned designs. The flow comes out of the search: nothing is trained for
# this.

# %%
rows_after = posteriors(best, outcomes_after)
compare(rows_after)

# %% [markdown]
# The accuracies are 0.504, 0.506 and 0.486, the controls 0.513, 0.491 and 0.479, the power checks 0.564, 0.556 and
# 0.562, each with a standard error of 0.011 to 0.017. Here, too, flow and NUTS are indistinguishable. The power check
# is lower than before, because these posteriors are nearly round: a shift off a narrow ridge stands out more.

# %%
grid = plot_posterior_grid(
    [
        {"start, flow": old["flow"], "learned, flow": new["flow"], "learned, NUTS": new["NUTS"]}
        for old, new in zip(rows_before, rows_after, strict=True)
    ],
    prior=prior,
    true_values=list(thetas),
    row_names=enzymes,
    column_names=names,
)
save(grid[0, 0].figure, "posterior_grid_before_after")
grid = plot_posterior_pair(rows_after[0], prior=prior, true_values=thetas[0], column_names=names)
save(grid[0, 0].figure, "posterior_pair_learned")
for enzyme, old, new in zip(enzymes, rows_before, rows_after, strict=True):
    shrunk = new["flow"].flat("theta").std(0) / old["flow"].flat("theta").std(0)
    print(f"{enzyme}: posterior sd, learned over start: " + ", ".join(f"{s:.2f}" for s in shrunk.tolist()))

# %% [markdown]
# With the same number of measurements, the standard deviation of the maximal rate fell to 0.41 to 0.50 of what it was,
# that of the half-rate concentration to 0.24 to 0.27.
#
# ## The same search by hand
#
# Nothing in `optimise_design` is hidden. `sample_joint` gives simulations of an `Experiment` as tensors, through which
# gradients reach the designs handed in; any flow gives a log density; `ba_terms` is the bound. The rest is an ordinary
# torch loop, for those who want another optimiser, a penalty on the design, or a schedule of their own.

# %%
num_steps = 100 if SMOKE else 2_500
torch.manual_seed(0)
experiment = Experiment(model, "y", "theta")
unconstrained = torch.logit(START).requires_grad_()
pilot = sample_joint(experiment, 1_000, {"xi": START})
flow = SplineCouplingFlow(experiment.theta_dim, experiment.y_dim, num_transforms=3, hidden_dim=64)
density = StandardisedDensity(flow, Standardise(2).fit_(pilot.theta), Standardise(7).fit_(pilot.y))
groups = [{"params": density.parameters(), "lr": 2e-3}, {"params": [unconstrained], "lr": 3e-2}]
optimiser = torch.optim.Adam(groups)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, num_steps)
started = time.perf_counter()
for _ in range(num_steps):
    sample = sample_joint(experiment, 256, {"xi": unconstrained.sigmoid()})
    bound = ba_terms(density.log_prob(sample.theta, sample.y), sample.log_prior).mean()
    optimiser.zero_grad()
    (-bound).backward()
    optimiser.step()
    schedule.step()

# %%
by_hand = unconstrained.sigmoid().detach()
with torch.no_grad():
    fresh = sample_joint(experiment, 20_000, {"xi": by_hand})
    eig, error = mean_and_standard_error(ba_terms(density.log_prob(fresh.theta, fresh.y), fresh.log_prior))
exact_by_hand, exact_by_hand_error = exact_eig(by_hand, num_outcomes=num_outcomes)
print(f"by hand: xi = {by_hand.sort().values}, {time.perf_counter() - started:.0f} s")
print(f"lower bound {eig:.4f} +- {error:.4f} nats, exact {exact_by_hand:.4f} +- {exact_by_hand_error:.4f} nats")

# %% [markdown]
# The same number: 3.703 ± 0.010 by hand against 3.696 ± 0.006, at designs whose exact values are 3.7054 and 3.7053
# (standard errors 0.0004). What `optimise_design` adds are the checks, the choice of the number of steps, scales that
# follow the moving design, several starts, a smaller standard error (the log prior, whose mean is known, serves as
# control variate), and care for the parameter store and the random numbers.
#
# ## The flow as a Pyro guide
#
# For an outcome in hand, `flow_guide` makes the trained flow an ordinary Pyro guide over the model's own sites, so
# everything that takes a guide takes it. `Predictive` simulates what a repetition of the experiment would give.
# `Importance` weighs draws of the guide against the exact model: the effective sample size says how good the flow is
# at this very outcome, weighted averages are free of the flow's error as the number of draws grows, and the mean weight
# estimates the evidence $p(y)$.

# %%
y = outcomes_after[0]
guide = flow_guide(best, {"y": y})
again = Predictive(model, guide=guide, num_samples=1_000)()["y"]
print("outcome:              ", y)
print("a repetition would be:", again.mean(0))
print("with a spread of:     ", again.std(0))

num_draws = 100 if SMOKE else 2_000
weighted = Importance(pyro.condition(model, data={"y": y}), guide=guide, num_samples=num_draws).run()
print(f"effective sample size {weighted.get_ESS():.0f} of {num_draws}")
evidence = weighted.get_log_normalizer()

# The evidence once more, by brute force: the density of the outcome averaged over draws of the prior.
with torch.no_grad():
    many = dist.Normal(0.5, 0.1).sample([100_000, 2])
    log_likelihood = dist.Normal(mean_rate(many, best.designs["xi"]), 5.0).log_prob(y).sum(-1)
    brute_force = log_likelihood.logsumexp(0) - torch.tensor(float(len(many))).log()
print(f"log p(y): {evidence:.3f} by the guide, {brute_force:.3f} from {len(many):,} draws of the prior")

# %% [markdown]
# Of 2,000 weighted draws 1,997 count, so at this outcome the flow is very nearly the posterior (the relative
# variance of the weights is 0.0015). The evidence agrees with that of brute force, which needed fifty times the draws.
#
# ## References
#
# - D. V. Lindley (1956), On a measure of the information provided by an experiment. Annals of Mathematical
#   Statistics 27.
# - D. Barber and F. Agakov (2003), The IM algorithm: a variational approach to information maximization. NIPS 16.
# - A. Foster et al. (2020), A unified stochastic gradient approach to designing Bayesian-optimal experiments. AISTATS.
# - T. Rainforth et al. (2024), Modern Bayesian experimental design. Statistical Science 39.
# - D. R. Ivanova, Bayesian experimental design (BED) with BayesFlow and PyTorch: the tutorial whose model and start
#   designs are used here.
# - D. Lopez-Paz and M. Oquab (2017), Revisiting classifier two-sample tests. ICLR.
