"""Laws of devices: what is computed from tensors on one device is on that device, and meets no tensor of another.

No GPU is needed: `There` is a tensor on a pretended device. It keeps its values on the CPU, so whole estimators run,
but says of itself that it is on DEVICE, and an operation of it with a CPU tensor raises where CUDA would raise. That
rule is held against torch's own, of fake CUDA tensors, where they have one. "meta" is the one device, besides
the CPU, for which every build of torch has what autograd needs.
"""

import importlib

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import constraints
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import pyro_voed
from pyro_voed import Fresh, Pool
from pyro_voed.densities import (
    AffineCouplingFlow,
    Classifier,
    MixedDensity,
    SplineCouplingFlow,
    StackedDensity,
    Standardise,
    StandardisedDensity,
    as_density,
)
from pyro_voed.densities.critics import JointCritic
from pyro_voed.estimators import tuba
from pyro_voed.experiment.designs import pack_designs, unpack_designs
from pyro_voed.experiment.experiment import Experiment
from pyro_voed.experiment.packing import unpack_targets
from pyro_voed.experiment.sampling import sample_joint
from pyro_voed.training.ascent import Ascent

DEVICE = torch.device("meta")
ROWS, MEMBERS, THETA_DIM, CONTEXT_DIM = 6, 3, 3, 2

aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
WITHOUT_SCALARS = {aten.cat.default, aten.stack.default}


class There(Tensor):
    """A tensor on the pretended device, its values held on the CPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = Tensor._make_wrapper_subclass(cls, held.shape, device=DEVICE, **layout)
        made.held = held
        return made

    def tolist(self):  # torch has none for subclasses
        return self.held.tolist()

    def __repr__(self):
        return f"There({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return run_operation(operation, args, kwargs or {})


def run_operation(operation, args, kwargs):
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, There)]
    check_devices(operation, args, there, [tensor for tensor in tensors if not isinstance(tensor, There)])
    asked = kwargs.get("device")
    if operation is aten.copy_.default:
        ends_there = isinstance(args[0], There)
    else:
        ends_there = bool(there) if asked is None else torch.device(asked) == DEVICE
    args, kwargs = tree_map_only(There, lambda tensor: tensor.held, (args, kwargs))
    if asked is not None:
        kwargs["device"] = torch.device("cpu")
    # What an operation in place returns is the tensor it was given.
    given = {id(tensor): tensor for tensor in tensors} | {id(tensor.held): tensor for tensor in there}
    return tree_map_only(
        Tensor,
        lambda result: given[id(result)] if id(result) in given else There(result) if ends_there else result,
        operation(*args, **kwargs),
    )


def check_devices(operation, args, there, here):
    assert not any(tensor.device == DEVICE for tensor in here), f"{operation}: a tensor was made past the pretence"
    if not there or operation in COPIES:
        return
    if operation in INDEXING and isinstance(args[0], There):
        here = [tensor for tensor in here if all(tensor is not index for index in args[1])]
    if operation not in WITHOUT_SCALARS:
        here = [tensor for tensor in here if tensor.dim()]
    if here:
        raise RuntimeError(f"{operation}: expected all tensors on one device, got some on {DEVICE} and some on the CPU")


class PretendedOperations(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return run_operation(operation, args, kwargs or {})


class PretendedLiterals(TorchFunctionMode):
    """Let `torch.tensor(..., device=DEVICE)` and its kin be seen, which make meta tensors without any operation."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        if function is Tensor.new_tensor and isinstance(args[0], There):
            return torch.tensor(args[1], dtype=args[0].dtype).to(DEVICE)
        return function(*args, **kwargs)


@pytest.fixture
def pretence(monkeypatch):
    optimiser = importlib.import_module("torch.optim.optimizer")  # torch.optim hides its submodules
    fused = [*optimiser._get_fused_kernels_supported_devices(), DEVICE.type]
    monkeypatch.setattr(optimiser, "_get_fused_kernels_supported_devices", lambda: fused)
    with PretendedOperations(), PretendedLiterals():
        yield


def there(*shape):
    return torch.randn(*shape, device=DEVICE)


def moved(module):
    """Move to the device, off the start, where some weights get no gradient."""
    module = module.to(DEVICE)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.03 * torch.randn_like(weight))
    return module


def assert_there(*tensors):
    assert tensors
    assert all(isinstance(tensor, There) and tensor.device == DEVICE for tensor in tensors)


MIXES = {
    "sum": lambda far, near: far + near,
    "sum with a scalar": lambda far, near: far + near.sum(),
    "product": lambda far, near: far @ near,
    "join": lambda far, near: torch.cat([far, near]),
    "choice": lambda far, near: torch.where(far > 0, far, near),
    "choice of a scalar": lambda far, near: torch.where(far > 0, far, near.sum()),
    "gather": lambda far, near: far.gather(0, near.long()),
    "add in place": lambda far, near: far.clone().add_(near),
    "add in place to the near": lambda far, near: near.clone().add_(far),
    "solve": lambda far, near: torch.linalg.solve_triangular(far, near, upper=False),
}


@pytest.mark.parametrize("name", MIXES)
def test_the_pretence_raises_where_torch_says_that_cuda_does(name):
    def raises(far, near):
        try:
            MIXES[name](far, near)
        except RuntimeError:
            return True
        return False

    with PretendedOperations():
        pretended = raises(torch.ones(2, 2, device=DEVICE), torch.ones(2, 2).mul(0.5))
    with FakeTensorMode():
        assert raises(torch.empty(2, 2, device="cuda"), torch.empty(2, 2)) == pretended


# Fake tensors are laxer than CUDA about the first two and, in a build without CUDA, cannot do the others. The rule is
# CUDA's: stacking joins tensors on one device, and only an index on the CPU may meet a tensor on another.
RAISING = {
    "scalars stacked": lambda far, near: torch.stack([far.sum(), near.sum()]),
    "near rows by far numbers": lambda far, near: near[far.long().flatten()],
}
PASSING = {
    "rows by number": lambda far, near: far[near.long().flatten()],
    "write": lambda far, near: far.clone().copy_(near),
    "move": lambda far, near: far + near.to(far),
}


def test_the_pretence_follows_cuda_where_fake_tensors_do_not(pretence):
    far, near = torch.ones(2, 2, device=DEVICE), torch.zeros(2, 2)
    for mix in RAISING.values():
        with pytest.raises(RuntimeError, match="one device"):
            mix(far, near)
    assert_there(*(mix(far, near) for mix in PASSING.values()))


def test_a_tensor_of_another_device_in_the_middle_is_caught(pretence):
    flow = moved(SplineCouplingFlow(THETA_DIM, CONTEXT_DIM))
    theta, context = there(ROWS, THETA_DIM), there(ROWS, CONTEXT_DIM)
    flow.log_prob(theta, context)
    # A buffer that no `.to` reaches is the classical mistake.
    flow.gaussian.places = torch.zeros(THETA_DIM**2, dtype=torch.long)
    with pytest.raises(RuntimeError, match="one device"):
        flow.log_prob(theta, context)


def classifier(context_dim=CONTEXT_DIM):
    values = [torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0, 2.0])]
    return Classifier(values, context_dim, frequencies=[torch.tensor([0.3, 0.7]), torch.full((3,), 1 / 3)])


def mixed():
    continuous = SplineCouplingFlow(1, CONTEXT_DIM + 5)
    return MixedDensity(classifier(), continuous, torch.tensor([True, False, True]))


def standardised():
    summary = nn.Linear(CONTEXT_DIM - 1, 4)
    flow = SplineCouplingFlow(THETA_DIM, 5)
    return StandardisedDensity(flow, Standardise(THETA_DIM), Standardise(CONTEXT_DIM), summary, num_bypass=1)


def pyro_flow():
    base = dist.Normal(torch.zeros(THETA_DIM, device=DEVICE), 1.0).to_event(1)
    coupling = dist.transforms.conditional_affine_coupling(THETA_DIM, CONTEXT_DIM).to(DEVICE)
    return as_density(dist.ConditionalTransformedDistribution(base, [coupling]), THETA_DIM, CONTEXT_DIM)


DENSITIES = {
    "affine": lambda: AffineCouplingFlow(THETA_DIM, CONTEXT_DIM),
    "spline": lambda: SplineCouplingFlow(THETA_DIM, CONTEXT_DIM),
    "spline of one coordinate": lambda: SplineCouplingFlow(1, CONTEXT_DIM),
    "spline without context": lambda: SplineCouplingFlow(THETA_DIM, 0),
    "classifier": classifier,
    "mixed": mixed,
    "standardised": standardised,
    "adapted": pyro_flow,
}


@pytest.mark.parametrize("name", DENSITIES)
def test_a_density_stays_on_its_device(name, pretence):
    density = moved(DENSITIES[name]())
    context = there(ROWS, density.context_dim)
    drawn = density.draw(context, (4, ROWS))
    log_prob = density.log_prob(drawn.detach(), context)
    gradients = torch.autograd.grad(log_prob.mean(), list(density.parameters()), allow_unused=True)
    assert_there(drawn, log_prob, density.condition(context).sample((2,)))
    assert_there(*(gradient for gradient in gradients if gradient is not None))
    assert_there(*density.state_dict().values())


def test_a_stacked_density_stays_on_its_device(pretence):
    stacked = moved(StackedDensity([standardised() for _ in range(MEMBERS)]))
    theta, context = there(ROWS, MEMBERS, THETA_DIM), there(ROWS, MEMBERS, CONTEXT_DIM)
    log_prob = stacked.log_prob(theta, context)
    assert_there(log_prob, *torch.autograd.grad(log_prob.mean(), list(stacked.parameters())))
    stacked.fit_scales_(theta, context)
    assert_there(stacked.draw(context, (ROWS, MEMBERS)), stacked.log_prob(theta, context))
    assert_there(*stacked.state_dict().values())
    alone = stacked.select([2, 0]).member(0)
    assert_there(*alone.state_dict().values(), alone.log_prob(theta[:, 2], context[:, 2]))


@pytest.mark.parametrize("members", [1, MEMBERS])
def test_a_group_without_gradient_does_not_stop_a_step(members, pretence):
    used, unused = (nn.Parameter(there(MEMBERS)) for _ in range(2))
    ascent = Ascent([{"params": [used], "lr": 0.1}, {"params": [unused], "lr": 0.1, "members": members}])
    kept = unused.detach().clone()
    assert ascent.step(used.sum())
    assert torch.equal(unused, kept)


def regression():
    slope = pyro.param("slope", torch.tensor(1.0, device=DEVICE), constraint=constraints.interval(0.0, 2.0))
    offset = pyro.param("offset", torch.tensor([0.5], device=DEVICE), constraint=constraints.positive)
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2, device=DEVICE), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.Gamma(torch.tensor(2.0, device=DEVICE), 2.0))
    mean = slope.unsqueeze(-1) * theta + offset
    return pyro.sample("y", dist.Normal(mean, 0.5 + scale.unsqueeze(-1)).to_event(1))


def shares():
    """A target with fewer coordinates than elements."""
    theta = pyro.sample("theta", dist.Dirichlet(torch.ones(3, device=DEVICE)))
    return pyro.sample("y", dist.Normal(theta, 1.0).to_event(1))


def labelled():
    gain = pyro.param("gain", torch.tensor(1.0, device=DEVICE), constraint=constraints.positive)
    kind = pyro.sample("kind", dist.Bernoulli(torch.tensor(0.5, device=DEVICE)))
    theta = pyro.sample("theta", dist.Normal(torch.tensor(0.0, device=DEVICE), 1.0))
    return pyro.sample("y", dist.Normal(gain * theta + kind, 1.0))


GAINS = {"slope": torch.tensor([0.5, 1.0, 1.5]), "offset": torch.tensor([[0.5], [1.0], [1.5]])}


@pytest.mark.parametrize("vectorize", [True, False])
def test_simulations_and_packed_designs_stay_on_the_models_device(vectorize, pretence):
    experiment = Experiment(regression, "y", vectorize=vectorize)
    assert experiment.device == DEVICE
    designs = {name: value.to(DEVICE) for name, value in GAINS.items()}
    sample = sample_joint(experiment, ROWS, designs, likelihood=True, controls=True, redraw=True)
    for name in ("theta", "y", "log_det", "outcome_log_det", "log_prior", "log_likelihood", "controls", "designs"):
        assert_there(getattr(sample, name))
    assert_there(sample.context(), sample.redraw().y, *unpack_targets(experiment, sample.theta).values())
    # Rows are picked by numbers from the CPU's generator.
    assert_there(sample[torch.randperm(ROWS)].theta)
    packed = pack_designs(experiment, designs)
    back = unpack_designs(experiment, packed)
    assert_there(packed, *back.values(), *experiment.designs[0].interval_ends)
    for name, value in designs.items():
        torch.testing.assert_close(back[name].held, value.held)


SHORT = {"seed": 0, "progress": False}
LEARNT = {"training": Fresh(num_steps=4), "num_samples": 200, **SHORT}
RATES = {**LEARNT, "training": Fresh(num_steps=4, learning_rate=(1e-3, 2e-3))}
# Two passes over a pool are as good as hundreds here.
POOLED = {"training": Pool(60, max_epochs=2), "num_samples": 60, **SHORT}

ESTIMATES = {
    "flow": lambda: pyro_voed.eig_flow(regression, "y", "theta", **LEARNT),
    "flow over designs": lambda: pyro_voed.eig_flow(regression, "y", "theta", designs=GAINS, **LEARNT),
    "flow of an ensemble": lambda: pyro_voed.eig_flow(regression, "y", "theta", designs=GAINS, ensemble=True, **RATES),
    "flow on a pool": lambda: pyro_voed.eig_flow(labelled, "y", designs={"gain": GAINS["slope"]}, **POOLED),
    "flow of shares": lambda: pyro_voed.eig_flow(shares, "y", **LEARNT),
    "flow of mixed targets": lambda: pyro_voed.eig_flow(labelled, "y", **LEARNT),
    "marginal": lambda: pyro_voed.eig_marginal(labelled, "y", **LEARNT),
    "critic": lambda: pyro_voed.eig_critic(regression, "y", "theta", **LEARNT),
    "joint critic with a baseline": lambda: pyro_voed.eig_critic(
        regression, "y", "theta", critic=JointCritic, terms=tuba, **LEARNT
    ),
    "ace": lambda: pyro_voed.eig_ace(labelled, "y", num_inner_samples=4, **LEARNT),
    "nmc": lambda: pyro_voed.eig_nmc(labelled, "y", seed=0),
    "laplace": lambda: pyro_voed.eig_laplace(regression, "y", num_samples=20, seed=0),
}


@pytest.mark.parametrize("name", ESTIMATES)
@pytest.mark.filterwarnings("ignore:(the Laplace approximation is doubtful|.*effective sample size)")
def test_an_estimate_is_on_the_models_device(name, pretence):
    result = ESTIMATES[name]()
    checked = [] if result.weights is None or result.weights.pareto_k is None else [result.weights.pareto_k]
    assert_there(result.eig, result.standard_error, *checked)
    assert torch.isfinite(result.eig).all()
    if isinstance(result.density, nn.Module):
        assert_there(*result.density.state_dict().values())


def test_a_climb_and_a_posterior_stay_on_the_models_device(pretence):
    result = pyro_voed.optimise_design(regression, "y", "theta", **LEARNT)
    posterior = pyro_voed.flow_posterior(result, {"y": torch.zeros(2, device=DEVICE)}, num_samples=10)
    assert_there(result.final.eig, *result.final.designs.values(), *posterior.values.values())
