"""Experts with fewer replicas than the rest of the model: gradients, summed over two axes, weights
and norm are those of one device, and stage 3 keeps 1/n of all experts."""

import math
import operator
from functools import cache, partial

import pytest
import torch
import zero_expert_programs as mixed
import zero_programs as programs
from test_zero import assert_rows_equal
from torch import nn
from zero_expert_programs import MESHES, MIXTURE, build, make_axes, make_synchroniser, units
from zero_programs import Case

from picotron_lab import checkpoint, data_parallel, expert_parallel, precision, sharding, zero
from picotron_lab.analysis.meter import Meter
from picotron_lab.analysis.zero_state import Job, contract
from picotron_lab.lab import run_ranks
from picotron_lab.processes import run_processes

STAGES = [(stage, impl) for stage in (1, 2, 3) for impl in ("plain", "fused")]
WAYS = [(0, step) for step in ("naive", "overlapped", "bucketed", "silent")] + STAGES
QUICK = {
    "two by two": [(1, "fused"), (3, "plain"), (3, "fused")],
}
SLOW = {  # what is `late` below is left to CI, what is `rare` to a run after a change
    "two by two": [(1, "plain"), *STAGES[2:4], (0, "naive"), (0, "silent")],
    "three by two, tied": [(0, "overlapped"), (1, "plain"), (2, "fused"), *STAGES[4:]],
    "alone with its experts": [*STAGES[1::2], (0, "naive")],
    "two ranks without experts": [(0, "bucketed")],  # more of it: test_any_order_of_the_ranks
}
impls = pytest.mark.parametrize("impl", ["plain", "fused"])


late, rare = (partial(pytest.param, marks=m) for m in (pytest.mark.slow, pytest.mark.exhaustive))


def seldom(name, stage, way):
    return (late if "tied" in name or stage == 0 else rare)(name, stage, way)


@cache
def reference(name):
    ranks, _, case = MESHES[name]
    return programs.one_device(case, ranks)


def assert_one_device(seen, expected):
    grads, weights = expected
    assert_rows_equal([rank.grads for rank in seen], grads)
    assert_rows_equal([rank.weights for rank in seen], weights)
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in grads.values()))
    assert [rank.norm for rank in seen] == pytest.approx([norm] * len(seen), rel=1e-10)


# ---- the same as one device


@pytest.mark.parametrize(
    ("name", "stage", "way"),
    [
        (name, *way) if way in QUICK.get(name, ()) else seldom(name, *way)
        for name in MESHES for way in WAYS if way in (*QUICK.get(name, ()), *SLOW[name])
    ],
)  # fmt: skip
def test_two_steps_of_sgd(name, stage, way):
    ranks, ep, case = MESHES[name]
    seen = run_ranks(mixed.train, ranks, ep, case, stage, way)
    assert_one_device(seen, reference(name))
    for rank, told in enumerate(seen if stage > 0 else ()):
        held = 8 * sum(weight.numel() for _, weight in told.weights)
        assert (told.sent, held) == mixed.predicted(name, stage, way, rank, told.weights)


@pytest.mark.parametrize(
    ("name", "impl", "again"),
    [
        rare("two by two", "plain", "plain"),
        rare("two by two", "fused", "fused"),
        late("three by two, tied", "plain", "fused"),
        late("three by two, tied", "fused", "plain"),
    ],
)
def test_recomputation_around_both_units(name, impl, again):
    """Nothing more is gathered, and nothing more reduced."""
    ranks, ep, case = MESHES[name]
    seen = run_ranks(mixed.train, ranks, ep, case, 3, impl, again)
    assert_one_device(seen, reference(name))
    for rank, told in enumerate(seen):
        assert told.sent == mixed.predicted(name, 3, impl, rank, told.weights)[0]


FROZEN = {
    "experts": ("mlp.experts",),
    "all but experts": ("attention", "mlp_norm", "mlp.router", "mlp.shared"),
    "all but routers": ("attention", "mlp_norm", "mlp.experts", "mlp.shared"),
}


@pytest.mark.parametrize(
    ("name", "impl", "again"),
    [
        late(name, impl, again) if impl != again
        else (name, impl, again) if (impl == "fused") == (name == "all but experts")
        else rare(name, impl, again)
        for name in FROZEN for impl, again in (("plain", "plain"), ("fused", "fused"),
                                               ("plain", "none"), ("fused", "plain"))
    ],
)  # fmt: skip
def test_frozen_parts(name, impl, again):
    """A unit without anything to learn is left without a Boundary: nothing of it stays whole."""
    frozen = tuple(f"layers.{i}.{part}" for i in range(2) for part in FROZEN[name])
    rest = () if name == "experts" else ("embed", "norm", "head")
    case = Case(MIXTURE, frozen=(*frozen, *rest), microbatches=1)

    def run(world):
        axes = make_axes(world, 2)
        model = build(case, axes, 3, impl, again)
        sync = make_synchroniser(model, axes, 3, impl)
        programs.gradients(axes.replica, case, model, sync, 0)
        whole = [unit for unit in units(model) if unit.weights is not None]
        return [(s.record, s.grad) for s in sync.shards], len(whole)

    grads, whole = zip(*run_ranks(run, 4), strict=True)
    assert_rows_equal(grads, programs.one_device(case, 4)[0])
    assert whole == (0,) * 4


@pytest.mark.parametrize("impl", [rare("plain"), "fused"])
@pytest.mark.parametrize("where", ["forward", rare("backward")])
def test_after_a_step_that_broke_off_inside_an_expert(impl, where):
    """Neither unit uses again what it has gathered: the weights have changed since."""
    case = Case(MIXTURE, microbatches=1)

    class Broken(Exception):
        pass

    def breaks(*_):
        raise Broken

    def run(world):
        axes = make_axes(world, 2)
        model = build(case, axes, 3, impl, impl)
        part = next(part for name, part in model.named_modules() if name.endswith("mlp.experts"))
        arm = {"forward": part.register_forward_hook, "backward": part.register_full_backward_hook}
        sync = make_synchroniser(model, axes, 3, impl)
        hook = arm[where](breaks)
        with pytest.raises(Broken):
            programs.gradients(axes.replica, case, model, sync, 0)
        hook.remove()
        change(model)
        programs.gradients(axes.replica, case, model, sync, 0)
        return [(s.record, s.grad) for s in sync.shards]

    model = programs.build(case)
    change(model)
    sum(model(*programs.batch(case, 0, i)) / 17 for i in range(4)).backward()
    assert_rows_equal(run_ranks(run, 4), {p.record.name: p.grad for p in model.parameters()})


@torch.no_grad()
def change(model):
    for parameter in model.parameters():
        parameter.mul_(-1.5)


@pytest.mark.parametrize("impl", ["plain", rare("fused")])
def test_backward_through_experts_of_before(impl):
    """Also where no weight of the layer itself has changed."""

    def run(world):
        axes = make_axes(world, 2)
        model = build(Case(MIXTURE), axes, 3, impl)
        sync = make_synchroniser(model, axes, 3, impl)
        sync.begin_step()
        loss = model(*programs.batch(Case(MIXTURE), 0, world.rank))
        with torch.no_grad():
            expert_parallel.expert_parameters(model)[0].mul_(2)
        with pytest.raises(AssertionError, match="weights changed between forward and backward"):
            loss.backward()

    run_ranks(run, 4)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "impl"), STAGES)
def test_any_order_of_the_ranks(stage, impl):
    ranks, ep, case = MESHES["two ranks without experts"]
    again = "none" if stage < 3 else impl
    seen = run_ranks(mixed.train, ranks, ep, case, stage, impl, again, seed=0)
    assert_one_device(seen, reference("two ranks without experts"))


@pytest.mark.slow
def test_over_gloo():
    expected = programs.one_device(mixed.PROCESSES, 4)
    for seen in zip(*run_processes(mixed.over_gloo, 4), strict=True):
        assert_one_device(seen, expected)


# ---- who is a unit


def test_experts_are_units_inside_those_of_their_layers():
    """By hand: experts 2 and 3 of 4 are with ranks 1 and 3, which have 4 and 3 of their 7 rows."""

    def run(world):
        axes = make_axes(world, 2)
        model = build(Case(MIXTURE), axes, 3, "plain")
        layer = model.layers[0]
        inner = layer.module.mlp.experts
        assert {name.split(".")[0] for name in layer.shapes} == {
            "attention_norm", "attention", "mlp_norm", "mlp"
        }  # fmt: skip
        assert not any("experts" in name for name in layer.shapes)
        assert [unit.gatherer.axis.name for unit in units(model)] == [
            "dp", "dp", "expert_replica", "dp", "expert_replica", "dp", "dp"
        ]  # fmt: skip
        assert len(inner.gatherer.units) == 2 and inner.gatherer is not layer.gatherer
        assert {shape for shape in inner.shapes.values()} == {(7, 12), (12, 7)}
        record = expert_parallel.expert_parameters(model)[0].record
        assert record.replicas == record.partial == ()
        return record.name, record.slices

    names = [f"layers.0.mlp.experts.{e}.gate.weight" for e in (0, 2, 0, 2)]
    rows = [(0, 4), (0, 4), (4, 7), (4, 7)]
    expected = [(name, (part, (0, 12))) for name, part in zip(names, rows, strict=True)]
    assert run_ranks(run, 4) == expected


@pytest.mark.parametrize(("experts", "ep"), [(4, 4), (1, 2)])
def test_no_unit_for_experts_that_nobody_else_has_or_that_are_not_here(experts, ep):
    def run(world):
        case = Case({"experts": experts, "top_k": 1, "layers": 1})
        model = build(case, make_axes(world, ep), 3, "fused")
        mine = expert_parallel.expert_parameters(model)
        inside = [unit for unit in units(model) if unit.gatherer.axis.name == "expert_replica"]
        return len(mine), len(inside), [tuple(p.shape) for p in mine[:1]]

    seen = run_ranks(run, 4)
    if ep == 4:
        assert seen == [(3, 0, [(7, 12)])] * 4  # whole, and in no unit
    else:
        assert sorted(seen) == [(0, 0, []), (0, 0, []), (3, 1, [(3, 12)]), (3, 1, [(4, 12)])]


def test_without_expert_parallelism_nothing_is_inside():
    def run(world):
        model = build(Case(MIXTURE), make_axes(world, 1), 3, "plain")
        return [unit.gatherer.axis.name for unit in units(model)]

    assert run_ranks(run, 2) == [["dp"] * 5] * 2


# ---- what is sent, and what lies on a rank


@pytest.mark.parametrize("impl", [rare("plain"), "fused"])
@pytest.mark.parametrize("w", [rare(torch.float32), torch.bfloat16])
def test_live_and_peak_bytes(impl, w):
    """4 ranks have 1/4 of everything: of experts half of the rows of the half that two ranks have.

    Plain: on top comes what one unit needs, or both units of a layer, whole in forward. Fused: both
    axes have buffers to arrive and to lie in; one buffer to leave is large enough for either.
    """
    g, K = 4, 8 + (4 if w.itemsize == 2 else 0)
    chain = programs.Chain()
    inner, dense = list(mixed.Pair().parameters()), 16 * 32
    outer = [list(u.parameters()) for u in zero.units_of(chain) if not isinstance(u, nn.Sequential)]
    outer[1:1] = [[programs.make_linear(16, 32).weight] for _ in range(3)]
    for p in sum(outer, inner):
        p.data = p.data.to(w)
    precision.accumulate_in(sum(outer, inner), torch.float32)
    jobs = Job(outer, 4, [True] * 6), Job([inner] * 3, 2, [True] * 3)
    told = [contract(3, impl, job) for job in jobs]
    whole = 8 * 16 + 3 * dense + 16 * 16 + 16 * 24
    experts = 3 * (32 * 24 + 24 * 16)  # of one rank; another one has as many others
    held = whole // 4 + 2 * experts // (2 * 2)
    expected = {"parameter": w.itemsize * held, "gradient": g * held, "optimizer": K * held}
    leave = g * min(dense, experts // 3) if impl == "fused" else 0
    expected |= {"buffer": sum(t.buffer for t in told) - leave, "activation": 0}
    both = w.itemsize * (dense + experts // 3) if impl == "plain" else 0
    top = max(both, *(t.transient for t in told))
    assert run_ranks(mixed.measure, 4, impl, w, torch.float32) == [(expected, top, 0)] * 4


@pytest.mark.parametrize("impl", ["plain", rare("fused")])
@pytest.mark.parametrize("again", [rare("none"), "full"])
def test_nothing_of_the_weights_is_kept_for_backward(impl, again):
    """Bytes between forward and backward; the model of stage 1 tells them."""

    def kept(world, stage):
        case = Case({**MIXTURE, "layers": 1})
        path = "none" if again == "none" else impl
        model = build(case, make_axes(world, 2), stage, impl, path)
        inputs = programs.batch(case, 0, world.rank)
        model(*inputs)  # what stays is made in the first forward
        with Meter() as meter:
            loss = model(*inputs)
            return meter.live["activation"], loss.requires_grad

    assert run_ranks(kept, 4, 3) == run_ranks(kept, 4, 1)


# ---- checkpoints


@pytest.mark.exhaustive  # left to a run after a change
def test_checkpoints_go_to_another_mesh(tmp_path):
    """From 4 ranks that share experts out by two to 6 ranks by three, and to one file reader."""
    case = Case(MIXTURE)

    def save(world):
        model = build(case, make_axes(world, 2), 3, "fused")
        pieces = [(p.record, p.detach()) for p in model.parameters()]
        return checkpoint.save(tmp_path, 1, pieces, {}, world)

    def load(world):
        model = build(case, make_axes(world, 3), 3, "plain")
        change(model)
        pieces = [(p.record, p.detach()) for p in model.parameters()]
        checkpoint.load(checkpoint.read_manifest(path), pieces)
        return pieces

    path = run_ranks(save, 4)[0]
    full = {p.record.name: p.detach() for p in programs.build(case).parameters()}
    manifest = checkpoint.read_manifest(path)
    assert all(torch.equal(checkpoint.read_full(manifest, n), p) for n, p in full.items())
    assert_rows_equal(run_ranks(load, 6), full, 0)


# ---- several synchronisers


class Recorder(data_parallel.Synchroniser):
    def __init__(self, names, axis, seen):
        self.shards, self.axis, self.seen = names, axis, seen
        self.begin_step = lambda: seen.append((axis, "begin"))
        self.before_backward = lambda last: seen.append((axis, last))
        self.finish = lambda: seen.append((axis, "finish"))
        self.publish = lambda: seen.append((axis, "publish"))

    @property
    def buffers(self):
        return [self.axis]


def test_several_call_each_in_one_order():
    seen = []
    sync = data_parallel.Several([Recorder(["p", "q"], "a", seen), Recorder(["e"], "b", seen)])
    sync.begin_step()
    sync.before_backward(False)
    sync.before_backward(True)
    sync.finish()
    sync.publish()
    events = ["begin", False, True, "finish", "publish"]
    assert seen == [(axis, event) for event in events for axis in ("a", "b")]
    assert (sync.shards, sync.buffers) == (["p", "q", "e"], ["a", "b"])


@impls
@pytest.mark.parametrize("stage", [rare(1), 2])
def test_who_is_alone_with_its_experts_keeps_no_buffers_for_them(stage, impl):
    """Their gradients and weights stay where they lie; all else has two buckets, if fused."""

    def run(world):
        axes = make_axes(world, 4)
        model = build(Case(MIXTURE), axes, stage, impl)
        dense, experts = make_synchroniser(model, axes, stage, impl).parts
        assert all(map(operator.is_, experts.shards, expert_parallel.expert_parameters(model)))
        assert len(experts.shards) == 6
        return len(dense.buffers), len(experts.buffers)

    assert run_ranks(run, 4) == [(2 if impl == "fused" else 0, 0)] * 4


def test_each_parameter_goes_to_its_axis():
    def run(world):
        axes = make_axes(world, 2)
        both = axes.replica, axes.expert_replica
        model = build(Case(MIXTURE), axes, 0, "plain")
        parameters = list(model.parameters())
        sync = data_parallel.over_axes(parameters, both, lambda ps, axis: Recorder(ps, axis, []))
        dense, experts = sync.parts
        assert [part.axis for part in sync.parts] == [*both]
        assert experts.shards == expert_parallel.expert_parameters(model)
        assert {*dense.shards, *experts.shards} == {*parameters}
        alone = data_parallel.over_axes(dense.shards, both, lambda ps, axis: axis)
        assert alone is axes.replica
        sharding.update(parameters[0], partial=("tp",))
        with pytest.raises(AssertionError, match="embed.weight is partial over .*'tp'.*of dp, exp"):
            data_parallel.over_axes(parameters, both, lambda ps, axis: axis)

    run_ranks(run, 4)
