"""ZeRO is exact: every stage and path against one device, torch, and numbers by hand."""

from dataclasses import replace
from functools import cache

import pytest
import torch
import zero_programs as programs
from torch import nn
from zero_programs import CASES, Case

from picotron_lab import sharding, zero
from picotron_lab.comm import Axis
from picotron_lab.lab import run_ranks
from picotron_lab.ledger import Ledger
from picotron_lab.nobody import Nobody
from picotron_lab.processes import run_processes
from picotron_lab.sharding import Record

STAGES = [(stage, impl) for stage in (1, 2, 3) for impl in ("plain", "fused")]
every_stage = pytest.mark.parametrize(("stage", "impl"), STAGES)


def rarely(*case_and_whether):
    """A case that is left to a run after a change, or is not."""
    *case, rare = case_and_whether
    return pytest.param(*case, marks=[pytest.mark.exhaustive] * rare)


either_path = pytest.mark.parametrize(
    ("stage", "impl"), [rarely(*way, (way[0] == 2) != (way[1] == "plain")) for way in STAGES]
)


@cache
def reference(ranks, name):
    return programs.one_device(CASES[name][1], ranks)


def assert_rows_equal(held, full, tolerance=1e-10):
    """Every rank's rows are those of one device, and together they are all rows."""
    seen = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in full.items()}
    for record, value in (pair for rank in held for pair in rank):
        expected = full[record.name]
        scale = expected.abs().amax().item() + 1e-30 if expected.numel() else 1.0
        difference = (value.double() - expected[record.index].double()).abs()
        assert value.shape == expected[record.index].shape
        assert value.numel() == 0 or difference.max() <= tolerance * scale, record.name
        seen[record.name][record.index] = True
    assert all(rows.all() for rows in seen.values())


# ---- the same as one device


@pytest.mark.parametrize(
    ("name", "stage", "impl"),
    [
        (name, *way) if name == "odd sizes" else rarely(name, *way, way != STAGES[(k + 3) % 6])
        for k, name in enumerate(CASES) for way in STAGES
    ],
)  # fmt: skip
def test_gradients_are_the_rows_of_one_device(name, stage, impl):
    ranks, case = CASES[name]
    grads, weights, _ = zip(*run_ranks(programs.train, ranks, case, stage, impl), strict=True)
    expected_grads, expected_weights = reference(ranks, name)
    assert_rows_equal(grads, expected_grads)
    assert_rows_equal(weights, expected_weights)
    for record, _ in grads[0]:
        assert record.replicas == record.partial == ()


@either_path
def test_trajectory_with_clipping(stage, impl):
    """Three steps of plain SGD with a large learning rate: no AdamW to hide a factor."""
    case = Case({"layers": 1, "tied": True}, steps=3, clip=0.3)
    results = run_ranks(programs.train, 3, case, stage, impl, seed=5)
    grads, weights = programs.one_device(case, 3)
    assert_rows_equal([r[0] for r in results], grads)
    assert_rows_equal([r[1] for r in results], weights)


@every_stage
def test_bfloat16_with_float32_gradients_and_masters(stage, impl):
    """Two addends commute: the sum over two ranks is that of one device to the last bit."""
    case = Case({"layers": 1}, microbatches=1, dtype=torch.bfloat16)
    results = run_ranks(programs.train, 2, case, stage, impl)
    grads, weights = programs.one_device(case, 2)
    assert all(g.dtype == torch.float32 for _, g in results[0][0])
    assert_rows_equal([r[0] for r in results], grads, 1e-6)
    assert all(w.dtype == torch.bfloat16 for _, w in results[0][1])
    assert_rows_equal([r[1] for r in results], weights, 0)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_can_travel_in_another_dtype(stage):
    case = Case({"layers": 1}, microbatches=1)
    results = run_ranks(programs.train, 2, case, stage, "fused", torch.float32)
    grads, _ = programs.one_device(case, 2)
    assert_rows_equal([r[0] for r in results], grads, 1e-6)
    with pytest.raises(AssertionError):
        assert_rows_equal([r[0] for r in results], grads, 1e-12)
    details = [c.detail for c in results[0][2] if c.op == "reduce_scatter"]
    assert details and all("float32" in detail for detail in details)


@pytest.mark.parametrize("impl", ["plain", "fused"])
@pytest.mark.parametrize(
    "reentrant", [pytest.param(True, marks=pytest.mark.exhaustive), False]
)
def test_recomputation_around_a_unit(impl, reentrant):
    """torch's own, which runs a layer's forward again in backward: nothing more is gathered."""
    _, case = CASES["two ranks"]
    results = run_ranks(programs.train, 2, replace(case, checkpointing=reentrant), 3, impl)
    assert_rows_equal([r[0] for r in results], reference(2, "two ranks")[0])
    without = run_ranks(programs.train, 2, case, 3, impl)
    for (*_, calls), (*_, expected) in zip(results, without, strict=True):
        assert [(c.op, c.bytes) for c in calls] == [(c.op, c.bytes) for c in expected]


@every_stage
def test_adamw_steps_empty_shards(stage, impl):
    """AdamW's first step moves every weight by the learning rate, whatever the gradient."""

    def step(axis):
        model = programs.build(CASES["empty shards"][1], axis, stage, impl)
        parameters = list(model.parameters())
        sync = zero.make(stage, parameters, axis, impl)
        before = [p.detach().clone() for p in parameters]
        sync.begin_step()
        for shard in sync.shards:
            shard.grad.fill_(3.0)
        torch.optim.AdamW(sync.shards, lr=0.125, weight_decay=0.0).step()
        sync.publish()
        return [(b - p.detach()) for b, p in zip(before, parameters, strict=True)]

    moved = torch.cat([x.flatten() for rank in run_ranks(step, 8) for x in rank])
    torch.testing.assert_close(moved, torch.full_like(moved, 0.125))


def test_over_gloo():
    _, expected = programs.one_device(programs.PROCESSES, 2)
    for weights in zip(*run_processes(programs.over_gloo, 2), strict=True):
        assert_rows_equal(weights, expected)


@pytest.mark.slow
def test_torch_fully_shard():
    """The weights of FSDP2 after two steps."""
    results = run_processes(programs.with_fully_shard, 2)
    assert_rows_equal([mine for _, mine in results], results[0][0])


@either_path
def test_gradients_that_were_there_before_do_not_count(stage, impl):
    ranks, case = CASES["two ranks"]

    def train(axis):
        model = programs.build(case, axis, stage, impl)
        parameters = list(model.parameters())
        sync = zero.make(stage, parameters, axis, impl, case.bucket)
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 7.0)
        programs.gradients(axis, case, model, sync, 0)
        return [(s.record, s.grad) for s in sync.shards]

    assert_rows_equal(run_ranks(train, ranks), reference(ranks, "two ranks")[0])


def test_a_bucket_without_elements():
    """One matrix, which is its own gradient, and after it one of no rows, which leaves first."""

    def step(axis, stage, impl, size):
        weights = [nn.Parameter(torch.arange(6.0).view(3, 2)), nn.Parameter(torch.empty(0, 2))]
        for weight in weights:
            weight.record = Record("w", tuple(weight.shape), ((0, len(weight)), (0, 2)))
        sync = zero.make(stage, weights, axis, impl, size)
        sync.begin_step()
        sync.before_backward(last=True)
        sum(w.square().sum() / 2 for w in weights).backward()
        sync.finish()
        sync.publish()
        return [shard.grad.tolist() for shard in sync.shards]

    rows = [[[0, 2], [4, 6]], []], [[[8, 10]], []]
    for stage, impl in STAGES[:4]:
        for size in (10, 1000):  # in a bucket of its own, or with the other
            assert run_ranks(step, 2, stage, impl, size) == [*rows]


# ---- the example of the lesson


class Sum(nn.Module):
    """y = w1 x + w2 x + w3 x + w4 x, cut into units as a Llama is."""

    def __init__(self):
        super().__init__()
        units = [Term() for _ in range(4)]
        self.embed, self.norm, self.head = units[0], units[2], units[3]
        self.layers = nn.ModuleList(units[1:2])

    def forward(self, x):
        return sum(unit(x) for unit in zero.units_of(self))


class Term(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1))

    def forward(self, x):
        return self.weight * x


@every_stage
def test_weights_1_2_3_4_and_inputs_1_and_2(stage, impl):
    """By hand: y = 10 x and loss y*y/2, so dw = y x = 10 x x: 10 on rank 0, 40 on rank 1, mean 25.

    Halved losses add up to the mean. With learning rate 1/8 every weight falls by 25/8.
    """
    values = dict(zip(("embed", "layers.0", "norm", "head"), (1.0, 2.0, 3.0, 4.0), strict=True))

    def step(axis):
        with torch.device("meta"):
            model = Sum()
        sharding.attach(model)
        if stage == 3:
            zero.shard_model(model, axis, impl)
        draw = lambda name, *_: torch.tensor([values[name.removesuffix(".weight")]])  # noqa: E731
        sharding.materialise(model, 0, draw)
        sync = zero.make(stage, list(model.parameters()), axis, impl)
        sync.begin_step()
        y = model(torch.tensor([axis.rank + 1.0]))
        sync.before_backward(last=True)
        (y.square().sum() / 2 / axis.size).backward()
        sync.finish()
        gradients = [shard.grad.tolist() for shard in sync.shards]
        torch.optim.SGD(sync.shards, lr=0.125).step()
        sync.publish()
        return y.item(), gradients, [p.tolist() for p in model.parameters()]

    (y0, grads0, new0), (y1, grads1, new1) = run_ranks(step, 2)
    assert (y0, y1) == (10.0, 20.0)
    assert grads0 == [[25.0]] * 4 and grads1 == [[]] * 4  # one row: rank 0 has it
    order = [[-2.125], [-1.125], [-0.125], [0.875]]
    assert sorted(new0) == order and sorted(new1) == ([[]] * 4 if stage == 3 else order)


# ---- ranks that differ


def skip_one(axis, stage, impl):
    """Four matrices of one shape, one of which rank 1 does not use."""
    weights = [nn.Parameter(torch.eye(5, dtype=torch.float64) + i / 9) for i in range(4)]
    for i, weight in enumerate(weights):
        weight.record = Record(str(i), (5, 5), ((0, 5), (0, 5)))
    sync = zero.make(stage, weights, axis, impl, bucket_bytes=400)
    for _ in range(2):  # the second step must not see the first
        sync.begin_step()
        for i in range(2):
            x = torch.full((1, 5), float(axis.rank + i + 1), dtype=torch.float64)
            for k, weight in enumerate(weights):
                x = x if (k, axis.rank) == (2, 1) else torch.tanh(x @ weight)
            sync.before_backward(last=i == 1)
            x.sum().backward()
        sync.finish()
    return [shard.grad.clone() for shard in sync.shards], [w.grad for w in weights]


@pytest.mark.parametrize(("stage", "impl"), [(1, "plain"), (1, "fused"), (2, "fused")])
@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_a_parameter_that_one_rank_does_not_use(stage, impl, seed):
    def alone(axis):  # nothing is sent: each rank's own part
        mine = Axis("alone", range(3), axis.rank, Nobody(), Ledger())
        return skip_one(mine, 1, "plain")[1]

    expected = [sum(parts) for parts in zip(*run_ranks(alone, 3), strict=True)]
    parts = [grads for grads, _ in run_ranks(skip_one, 3, stage, impl, seed=seed)]
    for rows, full in zip(zip(*parts, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(rows), full, rtol=1e-12, atol=1e-12)


def test_a_unit_with_a_weight_that_one_rank_does_not_use():
    """Stage 3 sends zeros for it: by hand, rank 0 has gradient x = 1, rank 1 none."""

    class Half(nn.Module):
        def __init__(self, axis):
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.full((2,), 3.0)) for _ in range(2))
            self.uses_b = axis.rank == 0

        def forward(self, x):
            return self.a * x + (self.b * x if self.uses_b else 0)

    def step(axis, impl):
        module = Half(axis)
        sharding.attach(module)
        gatherer = {"plain": zero.Gatherer, "fused": zero.Prefetcher}[impl](axis)
        shards = {p: zero.shard_rows(p, axis) for p in module.parameters()}
        gatherer.units = [zero.Sharded(module, gatherer, shards)]
        sync = zero.make(3, list(shards.values()), axis, impl)
        sync.begin_step()
        gatherer.units[0](torch.tensor([1.0, 1.0])).sum().backward()
        sync.finish()
        return [shard.grad.tolist() for shard in sync.shards]

    for impl in ("plain", "fused"):
        assert run_ranks(step, 2, impl) == [[[2.0], [1.0]]] * 2


@either_path
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_after_a_step_that_was_broken_off(stage, impl, where):
    """Nothing that it gathered or summed is used again: the weights have changed since."""
    case = Case({"layers": 1}, bucket=3000.0)

    class Broken(Exception):
        pass

    def breaks(*_):
        raise Broken

    def train(axis):
        model = programs.build(case, axis, stage, impl)
        part = next(part for name, part in model.named_modules() if name.endswith("mlp"))
        arm = {"forward": part.register_forward_hook, "backward": part.register_full_backward_hook}
        sync = zero.make(stage, list(model.parameters()), axis, impl, case.bucket)
        hook = arm[where](breaks)
        with pytest.raises(Broken):
            programs.gradients(axis, case, model, sync, 0)
        hook.remove()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-1.5)
        programs.gradients(axis, case, model, sync, 0)
        return [(s.record, s.grad) for s in sync.shards]

    model = programs.build(case)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.5)
    sum(model(*programs.batch(case, 0, i)) / 17 for i in range(4)).backward()
    expected = {p.record.name: p.grad for p in model.parameters()}
    assert_rows_equal(run_ranks(train, 2), expected)


# ---- what cannot be done


@pytest.mark.parametrize("impl", ["plain", "fused"])
def test_backward_without_a_synchroniser_says_what_to_call(impl):
    def step(axis, made):
        model = programs.build(CASES["two ranks"][1], axis, 3, impl)
        if made:
            zero.make(3, list(model.parameters()), axis, impl)
        loss = model(*programs.batch(Case(), 0, 0))
        with pytest.raises(AssertionError, match=r"call zero\.make .* begin_step, before backward"):
            loss.backward()

    for made in (False, True):
        run_ranks(step, 2, made)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_weights_of_two_dtypes_do_not_share_a_wire(stage):
    """Else narrow ones would be widened, or wide ones rounded, unasked."""

    def build(axis):
        model = programs.build(CASES["two ranks"][1], axis)
        model.layers[0].mlp.up.bfloat16()
        if stage == 3:
            zero.shard_model(model, axis, "fused")
        zero.make(stage, list(model.parameters()), axis, "fused")

    with pytest.raises(AssertionError, match="give the weights of a model one dtype"):
        run_ranks(build, 2)
