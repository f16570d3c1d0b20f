"""ZeRO keeps, sends and overlaps what its contract says, and notices when weights change."""

import gc
from dataclasses import replace

import pytest
import torch
import zero_programs as programs
from torch import nn
from zero_programs import CASES, Case

from picotron_lab import precision, sharding, zero
from picotron_lab.analysis.meter import Meter
from picotron_lab.analysis.zero_state import Job, contract
from picotron_lab.lab import run_ranks

STAGES = [(stage, impl) for stage in (1, 2, 3) for impl in ("plain", "fused")]
every_stage = pytest.mark.parametrize(("stage", "impl"), STAGES)

# ---- what is sent


def full_parameters(case, dtypes):
    """The parameters of one device, to predict from."""
    model = programs.build(replace(case, dtype=dtypes[0]))
    precision.accumulate_in(list(model.parameters()), dtypes[1])
    return model


def job_of(case, stage, dtypes, ranks, rank=0):
    """Groups as they travel; the embedding and a fused head need no weight in backward."""
    model = full_parameters(case, dtypes)
    groups = [list(unit.parameters()) for unit in zero.units_of(model)]
    again = [False, *[True] * (len(groups) - 2), not case.fused_model]
    if stage < 3:
        groups = zero.group_by_size(programs.trained(model), case.bucket)
    return Job(groups, ranks, again, rank, case.microbatches)


def sampled():
    """Of the first model all stages; of each other one of them, and the rest after a change."""
    for k, name in enumerate(("odd sizes", "fused model", "tied", "experts", "empty shards")):
        for way in STAGES:
            rare = k > 0 and way != STAGES[k]
            yield pytest.param(name, *way, marks=[pytest.mark.exhaustive] * rare)


@pytest.mark.parametrize("name, stage, impl", list(sampled()))
def test_calls_and_payload_are_the_contract(name, stage, impl):
    ranks, case = CASES[name]
    said = contract(stage, impl, job_of(case, stage, (torch.float64,) * 2, ranks))
    results = run_ranks(programs.train, ranks, case, stage, impl)
    for rank, (grads, weights, calls) in enumerate(results):
        held = contract(stage, impl, job_of(case, stage, (torch.float64,) * 2, ranks, rank))
        assert 8 * sum(weight.numel() for _, weight in weights) == held.parameter
        assert 16 * sum(grad.numel() for _, grad in grads) == held.optimizer
        calls = [c for c in calls if c.op != "all_reduce"]  # of the gradient norm
        assert (len(calls), sum(c.bytes for c in calls)) == (said.calls, said.payload)
        assert all(c.waits for c in calls) == (impl == "plain")


def test_payload_by_hand():
    """8 ranks, two matrices of 16 and of 3 rows, which are padded to 8; 4 columns of float32."""
    weights = [nn.Parameter(torch.zeros(16, 4)), nn.Parameter(torch.zeros(3, 4))]
    full, padded = 16 * 4 * 4, 8 * 4 * 4
    job = Job([weights], ranks=8, rank=5, microbatches=3, again=[True])
    told = [contract(s, "plain", job) for s in (1, 2, 3)]
    both = full + padded
    assert [t.payload for t in told] == [2 * both, 4 * both, 9 * both]
    assert [t.calls for t in told] == [4, 8, 18]
    assert [contract(s, "fused", job).calls for s in (1, 2, 3)] == [2, 4, 9]
    held = 2 * 4 * 4  # rank 5 has 2 of 16 rows and none of 3
    everything = full + 3 * 4 * 4
    assert [t.parameter for t in told] == [everything, everything, held]
    assert [t.gradient for t in told] == [everything, held, held]
    assert [t.optimizer for t in told] == [2 * held] * 3


@pytest.mark.parametrize("impl", ["plain", "fused"])
def test_frozen_weights_want_no_gradient(impl):
    """Backward would compute it for nothing."""

    def wanted(axis):
        model = programs.build(CASES["frozen end"][1], axis, 3, impl)
        seen = []
        for name in ("q", "k", "v", "o"):
            for layer in model.layers:
                hook = lambda module, *_: seen.append(module.weight.requires_grad)  # noqa: E731
                getattr(layer.module.attention, name).register_forward_pre_hook(hook)
        model(*programs.batch(Case(), 0, 0))
        return seen

    assert run_ranks(wanted, 2) == [[True] * 4 + [False] * 4] * 2


@pytest.mark.exhaustive  # left to a run after a change
def test_frozen_parameters_send_no_gradients():
    ranks, case = CASES["frozen"]
    for stage, impl in STAGES:
        for grads, _, calls in run_ranks(programs.train, ranks, case, stage, impl):
            model = programs.build(case)
            rows = sum(-(-len(p) // 3) * 3 * p[0].numel() for p in programs.trained(model))
            rounds = 1 if stage == 1 else case.microbatches
            sent = sum(c.bytes for c in calls if c.op == "reduce_scatter")
            assert sent == 8 * rows * rounds
            assert len(grads) == len(programs.trained(model))


@every_stage
def test_nothing_is_sent_alone(stage, impl):
    assert run_ranks(programs.train, 1, CASES["two ranks"][1], stage, impl)[0][2] == []


# ---- what lies on a rank

FLOAT, HALF = torch.float32, torch.bfloat16


@every_stage
@pytest.mark.parametrize(("w", "g"), [(FLOAT, FLOAT), (HALF, FLOAT), (HALF, HALF)])
def test_live_and_peak_bytes_are_the_contract(stage, impl, w, g):
    """A chain of matrices without activations, so that peaks come from ZeRO alone."""
    bucket = 1e9 if (w, g) == (HALF, HALF) else 3000
    model = programs.meta_chain().to(w)
    precision.accumulate_in(list(model.parameters()), g)
    groups = [list(unit.parameters()) for unit in zero.units_of(model)]
    if stage < 3:
        groups = zero.group_by_size(list(model.parameters()), bucket)
    said = contract(stage, impl, Job(groups, ranks=2, again=[True] * len(groups)))
    keys = ("parameter", "gradient", "optimizer", "buffer")
    expected = {key: getattr(said, key) for key in keys} | {"activation": 0}
    for live, top, left in run_ranks(programs.measure, 2, stage, impl, w, g, bucket):
        assert live == expected
        assert (top, left) == (said.transient, 0)


def test_bytes_per_parameter_of_the_paper():
    """(w, g, K) = (2, 2, 12), figure 1: 4 ranks, per parameter 4 + 3, 2 + 3.5 and 4 bytes."""
    model = programs.meta_chain().to(HALF)
    parameters = list(model.parameters())
    size = sum(p.numel() for p in parameters)
    precision.accumulate_in(parameters, HALF)
    job = Job([parameters], ranks=4, again=[True])
    assert [contract(s, "plain", job).state / size for s in (1, 2, 3)] == [7, 5.5, 4]
    precision.accumulate_in(parameters, FLOAT)
    assert [contract(s, "plain", job).state / size for s in (1, 2, 3)] == [9, 6, 4.5]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("impl", ["plain", "fused"])
def test_shards_are_views(stage, impl):
    def shared(axis):
        model = programs.build(CASES["two ranks"][1], axis, stage, impl)
        sync = zero.make(stage, list(model.parameters()), axis, impl)
        pairs = zip(model.parameters(), sync.shards, strict=True)
        return [p.untyped_storage()._cdata == s.untyped_storage()._cdata for p, s in pairs]

    assert all(map(all, run_ranks(shared, 2)))


@pytest.mark.parametrize("impl", ["plain", "fused"])
@pytest.mark.parametrize("reentrant", [pytest.param(True, marks=pytest.mark.exhaustive), False])
def test_recomputation_keeps_no_more_than_without_zero(impl, reentrant):
    """Bytes between forward and backward; the model without ZeRO, recomputed alike, tells them."""

    def kept(axis, stage):
        case = Case({"layers": 3, "ffn_size": 40}, checkpointing=reentrant)
        model = programs.build(case, axis, stage, impl)
        inputs = programs.batch(case, 0, axis.rank)
        model(*inputs)  # what stays is made in the first forward
        with Meter() as meter:
            loss = model(*inputs)
            return meter.live["activation"], loss.requires_grad

    assert run_ranks(kept, 2, 3) == run_ranks(kept, 2, 1)


@pytest.mark.parametrize("impl", ["plain", "fused"])
def test_a_loss_without_backward_leaves_nothing(impl):
    """Reference counts alone must free its graph: no part of it may hold itself."""

    def left(axis):
        case = CASES["two ranks"][1]
        model = programs.build(case, axis, 3, impl)
        inputs = programs.batch(case, 0, axis.rank)
        model(*inputs)  # what stays is made in the first forward
        with Meter() as meter:
            meter.label("parameter", model.parameters())
            meter.label("buffer", model.embed.gatherer.buffers)
            loss = model(*inputs)
            before = meter.live["activation"]
            del loss
            return before > 0, meter.live["activation"]

    gc.collect()
    gc.disable()
    try:
        assert run_ranks(left, 2) == [(True, 0)] * 2
    finally:
        gc.enable()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_buffers_of_odd_sizes_are_the_contract(stage):
    """Padding lies on the wire, and not where a gathered unit is used."""
    ranks, case = CASES["odd sizes"]

    def buffers(axis):
        model = programs.build(case, axis, stage, "fused")
        sync = zero.make(stage, list(model.parameters()), axis, "fused", case.bucket)
        programs.gradients(axis, case, model, sync, 0)
        gathering = model.embed.gatherer.buffers if stage == 3 else []
        return sum(buffer.nbytes for buffer in [*sync.buffers, *gathering])

    said = contract(stage, "fused", job_of(case, stage, (torch.float64,) * 2, ranks))
    assert run_ranks(buffers, ranks) == [said.buffer] * ranks


# ---- what overlaps


def calls_under_way(sync):
    """Reductions that have not landed; the plain path waits for each."""
    return len(sync.flights.under_way) if hasattr(sync, "flights") else 0


def sent(axis, stage, impl):
    """A later step of one micro-batch: payload of each call by operation, in order."""
    case = replace(CASES["two ranks"][1], microbatches=1, steps=2)
    *_, calls = programs.train(axis, case, stage, impl)
    return [(c.op.replace("_", " "), c.bytes) for c in calls if c.op != "all_reduce"]


def test_fused_units_are_prefetched_and_reduced_in_between():
    """Two layers: the next gather leaves before a unit computes, its reduction after.

    The first backward has shown whose weights it reads; this is the second step.
    """
    model = programs.build(CASES["two ranks"][1])
    sizes = [8 * sum(p.numel() + len(p) % 2 * p[0].numel() for p in unit.parameters())
             for unit in zero.units_of(model)]  # fmt: skip
    embed, layer, _, norm, head = sizes
    gather, reduce = "all gather", "reduce scatter"
    forward = [(gather, size) for size in (embed, layer, layer, norm, head)]
    backward = [
        (gather, head), (gather, norm),
        (reduce, head), (gather, layer),
        (reduce, norm), (gather, layer),
        (reduce, layer),
        (reduce, layer), (reduce, embed),
    ]  # fmt: skip
    for calls in run_ranks(sent, 2, 3, "fused"):
        assert calls == forward + backward


@pytest.mark.parametrize("impl", ["plain", "fused"])
def test_units_gathered_at_any_moment(impl):
    """Plain: one. Fused: one that computes and the next, whose gather has left before.

    While layer 1 goes back, the gather of layer 0 and the reduction of the norm are under way:
    in the second step, for the first backward has shown whose weights it reads.
    """

    def watched(axis):
        case = Case(microbatches=1)
        model = programs.build(case, axis, 3, impl)
        sync = zero.make(3, list(model.parameters()), axis, impl)
        programs.gradients(axis, case, model, sync, 0)
        units, seen = zero.units_of(model), []

        def watch(*_):
            gathered = [i for i, unit in enumerate(units) if unit.weights is not None]
            coming = getattr(units[0].gatherer, "guess", None)
            reduced = calls_under_way(sync)
            seen.append((gathered, units.index(coming[0]) if coming else None, reduced))

        for unit in units:
            unit.module.register_forward_pre_hook(watch)
        for name in ("q", "k", "v", "o"):
            getattr(model.layers[1].module.attention, name).register_full_backward_hook(watch)
        programs.gradients(axis, case, model, sync, 0)
        watch()
        return seen

    fused = impl == "fused"
    forward = [([i], i + 1 if fused and i < 4 else None, 0) for i in range(5)]
    backward = [([2], 1, 1) if fused else ([2], None, 0)] * 4
    for seen in run_ranks(watched, 2):
        assert seen == [*forward, *backward, ([], None, 0)]


@pytest.mark.parametrize(("stage", "impl"), STAGES[:4])
def test_when_buckets_leave(stage, impl):
    """How many calls were made when each gradient was there, in two micro-batches, and are on."""

    def watched(axis):
        case = Case()
        model = programs.build(case, axis, stage, impl)
        parameters, seen, under_way = list(model.parameters()), [], []
        sync = zero.make(stage, parameters, axis, impl, case.bucket)
        for parameter in parameters:
            hook = lambda _: seen.append(len(axis.ledger.calls))  # noqa: E731
            parameter.register_post_accumulate_grad_hook(hook)
            hook = lambda _: under_way.append(calls_under_way(sync))  # noqa: E731
            parameter.register_post_accumulate_grad_hook(hook)
        programs.gradients(axis, case, model, sync, 0)
        return seen[: len(parameters)], seen[len(parameters) :], max(under_way)

    for first, last, under_way in run_ranks(watched, 2):
        assert under_way == (2 if impl == "fused" else 0)
        assert (first[-2] > 0) == (stage == 2)
        assert (last[-2] > first[-1]) == ((stage, impl) != (1, "plain"))


# ---- weights that change


@pytest.fixture(scope="module")
def chain():
    """Builds a Chain of stage 3 with its synchroniser; begin_step has been called."""

    def build(axis, impl="fused"):
        with torch.device("meta"):
            model = programs.Chain()
        sharding.attach(model)
        zero.shard_model(model, axis, impl)
        sharding.materialise(model, 0, programs.large_value)
        sync = zero.make(3, list(model.parameters()), axis, impl)
        sync.begin_step()
        return model, sync

    return build


def double(sync):
    with torch.no_grad():
        for shard in sync.shards:
            shard.mul_(2)


def step_fused_adamw(sync):
    """Of which torch's version counters know nothing."""
    torch.optim.AdamW(sync.shards, fused=True).step()
    sync.publish()


@pytest.mark.parametrize("impl", ["plain", "fused"])
@pytest.mark.parametrize("change", [double, step_fused_adamw])
def test_backward_through_weights_of_before(chain, impl, change):
    """torch refuses that on one device; old activations and new weights give no gradient."""

    def step(axis):
        model, sync = chain(axis, impl)
        loss = model(torch.ones(1, 8)).sum()
        change(sync)
        with pytest.raises(AssertionError, match="weights changed between forward and backward"):
            loss.backward()

    run_ranks(step, 2)


def test_what_left_before_the_weights_changed_is_not_used(chain):
    """A unit's forward starts the next gather; by hand, two doubled matrices give four times y."""

    def ratios(axis):
        model, sync = chain(axis)
        x = model.layers[0](model.embed(torch.ones(1, 8)))
        y = model.layers[1](x)
        model.layers[0](model.embed(torch.ones(1, 8)))
        double(sync)
        return (model.layers[1](x) / y).flatten().tolist()

    for found in run_ranks(ratios, 2):
        assert found == pytest.approx([4.0] * 16)


def test_what_left_for_backward_is_not_used_by_the_next_forward(chain):
    """A backward that ends early leaves a gather under way; then the weights change."""

    class Stop(Exception):
        pass

    def outputs(axis):
        model, sync = chain(axis)

        def stop(_):
            raise Stop

        x = torch.ones(1, 8, requires_grad=True)  # so that the embedding's weight is read too
        middle = model.embed(x)
        middle.register_hook(stop)
        for unit in zero.units_of(model)[1:]:
            middle = unit(middle)
        with pytest.raises(Stop):
            middle.sum().backward()
        double(sync)
        return (model(x) / middle).flatten().tolist()

    for ratios in run_ranks(outputs, 2):
        assert ratios == pytest.approx([2.0**9] * 24)  # one factor 2 per matrix
