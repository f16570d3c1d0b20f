"""Backward in two parts, for inputs and then for weights, gives the gradients of torch's one."""

import dataclasses
import itertools

import pytest
import tensor_programs
import torch
import zero_programs
from test_recompute import ALL, CONFIGS, batch, build
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from picotron_lab import deferred, recompute, sharding, zero
from picotron_lab.analysis.meter import Meter
from picotron_lab.lab import run_ranks
from picotron_lab.model import MLP
from picotron_lab.precision import accumulate_in

SOME = [("none", "plain"), ("full", "plain"), ("full", "fused")]


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def freeze(model, *parts_of_names):
    for parameter in model.parameters():
        parameter.requires_grad_(not any(part in parameter.record.name for part in parts_of_names))


def b_pass(later, y, wanted, dy=None):
    """Gradients of what is wanted, None where there is none; and the jobs that are left."""
    later.jobs = []
    found = torch.autograd.grad(y, wanted, dy, allow_unused=True)
    jobs, later.jobs = later.jobs, None
    return found, jobs


def w_pass(parameters, found, jobs):
    """Complete the gradients; each goes through its leaf's own backward."""
    for parameter, direct in zip(parameters, found, strict=True):
        parts = [deferred.gradient(job) for job in jobs if job.weight is parameter]
        parts += [] if direct is None else [direct]
        if parts:
            parameter.backward(sum(parts))


def of(model):
    """Its gradients by name."""
    return {p.record.name: p.grad for p in trained(model)}


def in_two(model, *inputs):
    """Gradients by name, and the names of the jobs' weights."""
    later, parameters = deferred.prepare(model), trained(model)
    found, jobs = b_pass(later, model(*inputs), parameters)
    w_pass(parameters, found, jobs)
    return of(model), [job.weight.record.name for job in jobs]


def in_one(model, *inputs):
    model(*inputs).backward()
    return of(model)


def assert_close(found, expected, tolerance=1e-12):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).abs().max() / gradient.abs().max()
        assert gradient.abs().max() > 0 and error <= tolerance, f"{name}: {error}"


def matrices(model, *others):
    """Names of the weights of matmuls."""
    others = ("embed", "router", *others)
    pairs = [(p.record.name, p.dim()) for p in model.parameters()]
    return sorted(n for n, dim in pairs if dim == 2 and not any(o in n for o in others))


# ---- one device


@pytest.mark.parametrize(("kind", "impl"), ALL)
@pytest.mark.parametrize("name", ["grouped", "tied", "experts"])
def test_two_parts_make_the_gradients_of_one(kind, impl, name):
    model = build(CONFIGS[name], kind, impl, rate=0.3)
    found, jobs = in_two(model, *batch())
    assert_close(found, in_one(build(CONFIGS[name], rate=0.3), *batch()))
    tied = ["embed.weight"] if name == "tied" else []  # the head's part of it
    assert sorted(jobs) == sorted(tied + matrices(model))


@pytest.mark.parametrize(("kind", "impl"), SOME)
def test_fused_model(kind, impl):
    """Its head makes dW in forward: no job."""
    model = build(kind=kind, impl=impl, fused=True)
    found, jobs = in_two(model, *batch())
    assert_close(found, in_one(build(), *batch()), 1e-10)
    assert sorted(jobs) == matrices(model, "head")


def test_order_of_jobs_is_that_of_backward():
    _, jobs = in_two(build(), *batch())
    parts = ("mlp.down", "mlp.gate mlp.up", "attention.o", "attention.q attention.k attention.v")
    assert jobs.pop(0) == "head.weight"
    for layer, part in itertools.product((1, 0), parts):
        names = {f"layers.{layer}.{name}.weight" for name in part.split()}
        assert {jobs.pop(0) for _ in names} == names
    assert jobs == []


@pytest.mark.parametrize("kind", ["none", "full"])
def test_one_backward_of_a_prepared_model_is_the_usual_one(kind):
    model = build(kind=kind)
    deferred.prepare(model)
    assert_close(in_one(model, *batch()), in_one(build(), *batch()))


@pytest.mark.parametrize(("kind", "impl"), SOME)
def test_two_micro_batches_and_the_gradient_of_the_input(kind, impl):
    """F0 F1 B0 B1 W0 W1 of a stage that is one layer."""
    stage, plain = (build(kind=k, impl=impl).layers[1] for k in (kind, "none"))
    later, parameters = deferred.prepare(stage), trained(stage)
    x, dy = torch.randn(2, 2, 3, 7, 24, generator=torch.Generator(), dtype=torch.float64)
    others = (torch.ones(7, 6), torch.zeros(7, 6)), batch()[2]
    leaves = [x_BTD.clone().requires_grad_() for x_BTD in x]
    ys = [stage(leaf, *others) for leaf in leaves]
    passes = [b_pass(later, ys[i], [leaves[i], *parameters], dy[i]) for i in (0, 1)]
    assert all(p.grad is None for p in parameters)
    for (_, *found), jobs in passes:
        w_pass(parameters, found, jobs)
    x.requires_grad_()
    for i in (0, 1):
        plain(x[i], *others).backward(dy[i])
    dx = torch.stack([found[0] for found, _ in passes])
    assert_close({"x": dx, **of(stage)}, {"x": x.grad, **of(plain)})


def test_logits_without_labels():
    model, plain = build(), build()
    later, parameters = deferred.prepare(model), trained(model)
    tokens_BT, _, where = batch()
    logits, expected = (m(tokens_BT, where=where) for m in (model, plain))
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    dy = torch.arange(logits.numel(), dtype=torch.float64).view_as(logits).sin()
    w_pass(parameters, *b_pass(later, logits, parameters, dy))
    expected.backward(dy)
    assert_close(of(model), of(plain))


@pytest.mark.parametrize(("kind", "impl"), SOME)
def test_frozen_weights_leave_no_job(kind, impl):
    models = build(kind=kind, impl=impl), build()
    for model in models:
        freeze(model, ".k.", "head", "embed")
    found, jobs = in_two(models[0], *batch())
    assert_close(found, in_one(models[1], *batch()))
    assert sorted(jobs) == matrices(model, "head", ".k.")


def test_a_bias_is_left_to_torch():
    stage = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2, bias=False))
    later = deferred.prepare(stage)
    found, jobs = b_pass(later, stage(torch.ones(4, 2)).sum(), trained(stage))
    assert [job.weight is stage[1].weight for job in jobs] == [True]
    assert [gradient is None for gradient in found] == [False, False, True]


def test_jobs_hold_inputs_and_gradients_alone():
    """MLP, N 6, F 4, float64. Its x and dy are the test's; h and the gradients of gate and up are
    6 * 4 * 8 bytes each."""
    mlp = MLP(3, 4).double()
    later, x, dy = deferred.prepare(mlp), *torch.randn(2, 2, 3, 3, dtype=torch.float64)
    x.requires_grad_()
    with Meter() as meter:
        y = mlp(x)
        found, jobs = b_pass(later, y, [x, *mlp.parameters()], dy)
        del y, found
        assert len(jobs) == 3 and not any(t.requires_grad for job in jobs for t in job[1:])
        assert meter.live["activation"] == 3 * 6 * 4 * 8
        del jobs
        assert meter.live["activation"] == 0


@pytest.mark.parametrize(("kind", "impl"), SOME)
def test_bfloat16_with_wide_gradients(kind, impl):
    """The leaf's own backward casts, adds, and calls hooks once, also for a tied head."""
    cfg = CONFIGS["tied"]
    model, plain = (build(cfg, k, impl, dtype=torch.bfloat16) for k in (kind, "none"))
    calls = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: calls.append(p.record.name))
    for each in (model, plain):
        accumulate_in(trained(each), torch.float32)
    found, _ = in_two(model, *batch())
    assert sorted(calls) == sorted(found)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert_close(found, in_one(plain, *batch()), 0.01)


# ---- a job added to .grad


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("before", [None, 0.5])
def test_accumulate(device, narrow, wide, before):
    wide = torch.promote_types(narrow, wide)
    grad, x = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0)).to(device, narrow)
    weight = nn.Parameter(torch.ones(8, 8, dtype=narrow, device=device))
    weight.grad_dtype = wide
    if before is not None:
        weight.grad = torch.full_like(weight, before, dtype=wide, requires_grad=False)
    deferred.accumulate(deferred.Job(weight, x, grad))
    expected = torch.einsum("btf,btd->fd", grad.double(), x.double()) + (before or 0.0)
    assert weight.grad.dtype == wide
    exact = narrow == torch.float32 or (wide == torch.float32 and device == "cuda")
    error = (weight.grad - expected).abs().max() / expected.abs().max()
    assert error < (1e-6 if exact else 2**-8)


@pytest.mark.parametrize(("kind", "impl"), [("none", "plain"), ("full", "fused")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_at_once(kind, impl, dtype):
    """Added to gradients that are there, with hooks after each; two backwards add up."""
    models = [build(CONFIGS["grouped"], k, impl, dtype=dtype) for k in (kind, "none")]
    calls = []
    for model in models:
        accumulate_in(trained(model), torch.promote_types(dtype, torch.float32))
        for parameter in trained(model):
            parameter.grad = sharding.zero_gradient(parameter)
    first, seen = {}, of(models[0])
    for parameter in trained(models[0]):
        first[parameter.record.name] = parameter.grad.data_ptr()
        parameter.register_post_accumulate_grad_hook(
            lambda p: calls.append((p.record.name, p.grad.abs().sum() > 0))
        )
    deferred.prepare(models[0], at_once=True)
    for model in models:
        for _ in range(2):
            model(*batch()).backward()
    assert {name: gradient.data_ptr() for name, gradient in seen.items()} == first
    assert sorted(calls) == sorted([(name, True) for name in first] * 2), "each hook saw its sum"
    assert_close(of(models[0]), of(models[1]), *([0.02] if dtype == torch.bfloat16 else []))


def test_a_backward_that_breaks_off_leaves_no_jobs():
    linear = nn.Sequential(nn.Linear(5, 7, bias=False))
    later = deferred.prepare(linear)
    with pytest.raises(RuntimeError, match="out of luck"), later.waits() as jobs:
        torch.autograd.grad(linear(torch.ones(3, 5)).sum(), linear[0].weight, allow_unused=True)
        raise RuntimeError("out of luck")
    assert len(jobs) == 1 and later.jobs is None


def test_second_derivatives_are_refused():
    linear = nn.Sequential(nn.Linear(5, 7, bias=False))
    deferred.prepare(linear)
    x = torch.ones(3, 5, requires_grad=True)
    with pytest.raises(AssertionError, match="prepared matmuls drop"):
        torch.autograd.grad(linear(x).sum(), x, create_graph=True)


def test_at_once_makes_no_gradient_of_its_own():
    """Of a weight of 7 x 5 there is the gradient alone, and without one autograd makes it."""
    linear = nn.Sequential(nn.Linear(5, 7, bias=False))
    deferred.prepare(linear, at_once=True)
    (weight,) = linear.parameters()
    x = torch.randn(3, 5, requires_grad=True)
    linear(x).sum().backward()
    expected = x.detach().sum(0).expand(7, 5)
    torch.testing.assert_close(weight.grad, expected)
    y = linear(x).sum()
    with Shapes() as shapes:
        y.backward()
    torch.testing.assert_close(weight.grad, 2 * expected)
    assert (7, 5) not in shapes.made


class Shapes(TorchDispatchMode):
    """Shapes of what operators make: neither views nor what they change in place."""

    def __init__(self):
        super().__init__()
        self.made = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage()._cdata not in given:
            self.made.add(tuple(result.shape))
        return result


# ---- recomputation's plain path and torch.autograd.grad


@pytest.mark.parametrize("name", ["grouped", "tied"])
@pytest.mark.parametrize("frozen", ["-", ".k.", "layers.0", "embed"])
def test_recomputed_layers_give_gradients_to_autograd_grad(name, frozen):
    models = build(CONFIGS[name], "full", "plain", 0.3), build(CONFIGS[name], rate=0.3)
    for model in models:
        freeze(model, frozen)
    parameters = trained(models[0])
    found = torch.autograd.grad(models[0](*batch()), parameters)
    assert all(p.grad is None for p in parameters)
    pairs = zip(parameters, found, strict=True)
    assert_close({p.record.name: g for p, g in pairs}, in_one(models[1], *batch()))


def zero_units(axis, case):
    """Units of stage 3 that are recomputed: this rank's rows of the sum over ranks."""
    model = zero_programs.build(case, axis, 3)
    recompute.apply(model, "full", "plain")
    shards = trained(model)
    later, sync = deferred.prepare(model), zero.make(3, shards, axis, "plain", 900.0)
    sync.begin_step()
    sync.before_backward(last=True)
    found, jobs = b_pass(later, model(*zero_programs.batch(case, 0, axis.rank)), shards)
    assert jobs == [] and not any(g is not None for g in found)
    sync.finish()
    return [(s.record, s.grad) for s in sync.shards]


@pytest.mark.parametrize("frozen", [(), ("embed", "layers.1.mlp.up")])
def test_recomputed_units_of_zero_3(frozen):
    """Weights that are lent defer nothing: B does it all, and brings it to the shards."""
    case = zero_programs.Case(frozen=frozen, microbatches=1)
    expected = {n: 17 * g for n, g in zero_programs.one_device(case, 2)[0].items()}
    for parts in run_ranks(zero_units, 2, case):
        wholes = {record.name: expected[record.name][record.index] for record, _ in parts}
        assert_close({record.name: gradient for record, gradient in parts}, wholes, 1e-10)
        assert wholes.keys() == expected.keys()


# ---- tensor and sequence parallelism


def on_rank(world, job, kind, impl, frozen):
    """[(record, gradient)] of one rank, the names of its jobs, and those of all its matrices."""
    axes = tensor_programs.split_axes(world, job)
    model = tensor_programs.parallel_model(axes, job)
    recompute.apply(model, kind, impl)
    freeze(model, frozen)
    inputs, count = tensor_programs.batch(job)
    _, jobs = in_two(model, *inputs)
    sharding.reduce_gradients(trained(model), axes)
    gradients = [(p.record, p.grad / count) for p in trained(model)]
    return gradients, sorted(jobs), matrices(model, frozen)


JOB = tensor_programs.Job(tensor_programs.SMALL, T=6)
RANKS = {
    "plain": JOB, "fused": dataclasses.replace(JOB, impl="fused", fused_model=True),
    "shared kv head": JOB.with_model(kv_heads=1),
    "experts": JOB.with_model(experts=3),
}  # fmt: skip


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize(
    ("name", "kind", "impl", "frozen"),
    [(name, "none", "plain", "-") for name in RANKS]
    + [(impl, "full", impl, ".k.") for impl in ("plain", "fused")],
)
def test_ranks(name, sequence, kind, impl, frozen):
    job = dataclasses.replace(RANKS[name], sequence=sequence)
    expected = tensor_programs.one_device(job)[2]
    for gradients, jobs, all_matrices in run_ranks(on_rank, 2, job, kind, impl, frozen):
        assert jobs == all_matrices
        wholes = {record.name: expected[record.name][record.index] for record, _ in gradients}
        assert_close({record.name: gradient for record, gradient in gradients}, wholes, 1e-10)
        assert len(wholes) == sum(frozen not in name for name in expected)
