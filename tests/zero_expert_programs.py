"""What the tests of ZeRO with experts run on every rank, also in processes, which import this."""

from dataclasses import dataclass

import torch
import zero_programs as programs
from torch import nn
from zero_programs import Case

from picotron_lab import (
    data_parallel,
    expert_parallel,
    mesh,
    precision,
    recompute,
    sharding,
    zero,
)  # fmt: skip
from picotron_lab.analysis.meter import Meter
from picotron_lab.analysis.zero_state import Job, contract
from picotron_lab.config import MeshConfig
from picotron_lab.model import Llama
from picotron_lab.sharding import squared_norm
from picotron_lab.zero_units import Sharded

BUCKET = 900.0
MIXTURE = {"experts": 4, "top_k": 2, "shared_experts": 1}
MESHES = {  # ranks, ranks that share the experts out, model
    "two by two": (4, 2, Case(MIXTURE, steps=2)),
    "three by two, tied": (6, 3, Case({**MIXTURE, "experts": 5, "tied": True}, steps=2)),
    "alone with its experts": (4, 4, Case(MIXTURE, steps=2)),
    "two ranks without experts": (6, 3, Case({**MIXTURE, "experts": 2}, steps=2)),
}


def make_axes(world, ep):
    return mesh.build(world, MeshConfig(dp=world.size, ep=ep))


def build(case, axes, stage, impl, again="none"):
    """As the trainer builds it. again: path of the recomputation of whole layers, or none."""
    with torch.device("meta"):
        model = Llama(case.config, dropout=0.2)
    sharding.attach(model)
    for parameter in model.parameters():
        parameter.requires_grad = not parameter.record.name.startswith(case.frozen or ("-",))
    expert_parallel.parallelize(model, axes.ep, impl)
    experts = set(expert_parallel.expert_parameters(model))
    for parameter in model.parameters():
        axis = axes.expert_replica if parameter in experts else axes.replica
        sharding.add_axis(parameter, axis, partial=True)
    if stage == 3:
        zero.shard_model(model, axes.replica, impl, axes.expert_replica)
    if again != "none":
        recompute.apply(model, "full", again)
    sharding.materialise(model, 3, programs.large_value, dtype=case.dtype)
    return model


def units(model):
    return [module for module in model.modules() if isinstance(module, Sharded)]


def make_synchroniser(model, axes, stage, way):
    """way: impl of ZeRO, or with stage 0 the step of data_parallel."""

    def make(parameters, axis):
        if stage == 0:
            return data_parallel.synchroniser(way, parameters, axis, BUCKET)
        return zero.make(stage, parameters, axis, way, BUCKET)

    parameters = programs.trained(model)
    if stage == 3:
        return make(parameters, axes.replica)
    return data_parallel.over_axes(parameters, (axes.replica, axes.expert_replica), make)


@dataclass
class Seen:
    """By one rank in the last step; weights after it."""

    grads: list
    weights: list
    norm: float
    sent: dict


def train(world, ep, case, stage, way, again="none"):
    """Plain SGD with a large learning rate."""
    axes = make_axes(world, ep)
    impl = "fused" if way in ("fused", "bucketed", "silent") else "plain"
    model = build(case, axes, stage, impl, again)
    sync = make_synchroniser(model, axes, stage, way)
    for step in range(case.steps):
        world.ledger.clear()
        programs.gradients(axes.replica, case, model, sync, step)
        norm = squared_norm(sync.shards, world, axes.axes).sqrt().item()
        programs.descend(sync.shards, 0.5)
        sync.publish()
    grads = [(s.record, s.grad.clone()) for s in sync.shards]
    weights = [(p.record, p.detach().clone()) for p in model.parameters()]
    return Seen(grads, weights, norm, sent(world.ledger.calls))


def sent(calls):
    """(calls, bytes) on each axis, but of experts' tokens and of the gradient norm."""
    totals = {}
    for call in calls:
        if call.axis not in ("ep", "world"):
            count, size = totals.get(call.axis, (0, 0))
            totals[call.axis] = count + 1, size + call.bytes
    return totals


def predicted(name, stage, impl, rank, weights):
    """What zero_state.py says of each axis: ({axis: (calls, bytes)}, bytes of weights).

    weights  of this rank, with their records: they tell which experts are here
    """
    ranks, ep, case = MESHES[name]
    mine = {record.name for record, _ in weights if "mlp.experts." in record.name}
    outer, inner = [], []
    for unit in zero.units_of(programs.build(case)):
        parameters = list(unit.parameters())
        outer.append([p for p in parameters if "mlp.experts." not in p.record.name])
        inner.append([p for p in parameters if p.record.name in mine])
    calls, held = {}, 0
    for axis, size, index, groups, again in (
        ("dp", ranks, rank, outer, [False, *[True] * (len(outer) - 1)]),
        ("expert_replica", ranks // ep, rank // ep, inner[1:-2], [True] * case.config.layers),
    ):
        if stage < 3:
            parameters = {id(p): p for group in groups for p in group}.values()
            groups = zero.group_by_size(list(parameters), BUCKET)
        if any(groups):
            said = contract(stage, impl, Job(groups, size, again, index, case.microbatches))
            held += said.parameter
            calls |= {axis: (said.calls, said.payload)} if size > 1 else {}
    return calls, held


PROCESSES = Case(MIXTURE, microbatches=1)


def over_gloo(world):
    """Blocking and overlapped calls on two axes between real processes."""
    ways = ((2, "fused"), (3, "plain"), (3, "fused", "fused"))
    return [train(world, 2, PROCESSES, *way) for way in ways]


# ---- a model whose activations have no bytes


class Layer(nn.Module):
    """One matrix of its own, then two of experts."""

    def __init__(self):
        super().__init__()
        self.dense, self.experts = programs.make_linear(16, 32), Pair()

    def forward(self, x):
        return self.experts(self.dense(x), None)


class Pair(nn.Module):
    """The experts of one rank."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Sequential(programs.make_linear(32, 24), programs.make_linear(24, 16))

    def forward(self, x, counts):
        return self.experts(x)


def meta_chain(axes):
    with torch.device("meta"):
        model = programs.Chain()
        model.layers = nn.ModuleList(Layer() for _ in range(3))
    sharding.attach(model)
    for p in model.parameters():
        axis = axes.expert_replica if "experts" in p.record.name else axes.replica
        sharding.add_axis(p, axis, partial=True)
    return model


def measure(world, impl, w, g):
    """Stage 3, four ranks, of which two have the same experts: (live bytes between micro-batches,
    the most on top in a step, what is left at its end)."""
    axes = make_axes(world, 2)
    model = meta_chain(axes)
    zero.shard_model(model, axes.replica, impl, axes.expert_replica)
    sharding.materialise(model, 0, programs.large_value, dtype=w)
    parameters = list(model.parameters())
    precision.accumulate_in(parameters, g)
    sync = zero.make(3, parameters, axes.replica, impl)
    weights = precision.MasterWeights(sync.shards).weights
    optimizer = torch.optim.AdamW(weights, foreach=False)
    programs.run_empty(model, sync, w)  # the first step makes what stays
    for weight, shard in zip(weights, sync.shards, strict=True):
        weight.grad = shard.grad.to(weight.dtype)
    optimizer.step()
    with Meter() as meter:
        programs.label(meter, model, sync, optimizer, weights)
        meter.label("buffer", [b for unit in units(model) for b in unit.gatherer.buffers])
        meter.reset_peak()
        live = programs.run_empty(model, sync, w, meter)
        sync.publish()
        return live, meter.peak_bytes - sum(live.values()), meter.live["activation"]
