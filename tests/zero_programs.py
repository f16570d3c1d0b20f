"""What the tests of ZeRO run: on one device, on every rank, and in processes, which import this."""

from dataclasses import dataclass, field
from typing import Any

import torch
from tensor_programs import descend
from torch import nn
from torch.utils.checkpoint import checkpoint

from picotron_lab import optim, precision, sharding, zero
from picotron_lab.analysis.meter import Meter
from picotron_lab.config import ModelConfig
from picotron_lab.dropout import Where
from picotron_lab.fused import fuse
from picotron_lab.model import IGNORED, Llama, initial_value

SIZES = {"vocab_size": 13, "hidden_size": 12, "layers": 2, "heads": 2, "kv_heads": 1, "ffn_size": 7}


@dataclass(frozen=True)
class Case:
    """A model and its batches; which parameters are frozen, by the beginning of their names."""

    sizes: dict[str, Any] = field(default_factory=dict)
    fused_model: bool = False
    frozen: tuple[str, ...] = ()
    microbatches: int = 2
    steps: int = 1
    clip: float = 0.0
    dtype: torch.dtype = torch.float64
    checkpointing: bool | None = None  # of every layer: use_reentrant
    validate: bool = False  # between forward and backward
    in_flight: int = 1  # micro-batches whose forward runs before the first backward
    bucket: float = 900.0
    empty: bool = False  # the feed-forward has no features here: so may a rank of tp end up

    @property
    def config(self):
        return ModelConfig(**{**SIZES, **self.sizes})


CASES = {
    "two ranks": (2, Case()),
    "odd sizes": (3, Case({"hidden_size": 10, "heads": 1, "vocab_size": 11})),
    "fused model": (3, Case(fused_model=True, microbatches=1)),
    "tied": (4, Case({"tied": True})),
    "experts": (3, Case({"experts": 3, "top_k": 1, "layers": 1})),
    "empty weights": (2, Case({"layers": 1}, microbatches=1, empty=True)),
    "empty shards": (8, Case({"hidden_size": 6, "heads": 1, "layers": 1}, microbatches=1)),
    "frozen": (3, Case(frozen=("embed", "layers.0", "layers.1.mlp.up"))),
    "frozen end": (2, Case(frozen=("layers.1", "norm", "head"))),
    "ahead, validation": (2, Case(microbatches=3, in_flight=2, validate=True)),
}
PROCESSES = Case({"layers": 1}, steps=2)


def large_value(name, shape, generator):
    """Weights so large that no part of the model drowns in the residual stream."""
    value = initial_value(name, shape, generator)
    return value * 10 if len(shape) > 1 else value + 0.3 * torch.randn(shape, generator=generator)


def build(case, axis=None, stage=0, impl="plain"):
    """The model in the trainer's order; without an axis, the plain one of one device."""
    with torch.device("meta"):
        model = Llama(case.config, dropout=0.2)
    sharding.attach(model)
    for layer in model.layers if case.empty else ():
        for name, dim in (("gate", 0), ("up", 0), ("down", 1)):
            linear = getattr(layer.mlp, name)
            linear.weight = sharding.narrow(linear.weight, dim, 0, 0)
    for parameter in model.parameters():
        parameter.requires_grad = not parameter.record.name.startswith(case.frozen or ("-",))
    if axis is not None:
        if case.fused_model:
            fuse(model)
        sharding.replicate(model, axis)
        if stage == 3:
            zero.shard_model(model, axis, impl)
        if case.checkpointing is not None:
            model.layers = nn.ModuleList(Checkpointed(x, case.checkpointing) for x in model.layers)
    sharding.materialise(model, 3, large_value, dtype=case.dtype)
    return model


class Checkpointed(nn.Module):
    """torch's own recomputation."""

    def __init__(self, module, reentrant):
        super().__init__()
        self.module, self.reentrant = module, reentrant

    def forward(self, *inputs):
        return checkpoint(self.module, *inputs, use_reentrant=self.reentrant)


def batch(case, step, index):
    """Micro-batch `index` of the whole step; every third one has no counted label at all."""
    dice = torch.Generator().manual_seed(100 * step + index)
    tokens, labels = torch.randint(case.config.vocab_size, (2, 2, 5), generator=dice)
    labels[torch.rand(2, 5, generator=dice) < (2.0 if index % 3 == 2 else 0.3)] = IGNORED
    return tokens, labels, Where(torch.arange(5), torch.arange(2) + 2 * index, step, 7)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def one_device(case, ranks):
    """Plain model, torch's own clipping and SGD: gradients and final weights by name."""
    model = build(case)
    parameters = trained(model)
    precision.accumulate_in(parameters, torch.promote_types(case.dtype, torch.float32))
    masters = precision.MasterWeights(parameters)
    optimizer = torch.optim.SGD(masters.weights, lr=0.5)
    for step in range(case.steps):
        for p in parameters:
            p.grad = torch.zeros_like(p, dtype=p.grad_dtype)
        for i in range(ranks * case.microbatches):
            (model(*batch(case, step, i)) / 17).backward()
        if case.clip:
            torch.nn.utils.clip_grad_norm_(parameters, case.clip)
        masters.take_gradients()
        optimizer.step()
        masters.publish()
    grads = {p.record.name: p.grad for p in parameters}
    return grads, {p.record.name: p.detach() for p in model.parameters()}


def train(axis, case, stage, impl, reduce_dtype=None):
    """The same on one rank: [(record, gradient)], [(record, weight)], calls of the last step."""
    model = build(case, axis, stage, impl)
    parameters = trained(model)
    precision.accumulate_in(parameters, torch.promote_types(case.dtype, torch.float32))
    sync = zero.make(stage, parameters, axis, impl, case.bucket, reduce_dtype)
    masters = precision.MasterWeights(sync.shards)
    for step in range(case.steps):
        axis.ledger.clear()
        gradients(axis, case, model, sync, step)
        optim.clip(sync.shards, case.clip, axis, {axis.name: axis})
        masters.take_gradients()
        descend(masters.weights, 0.5)
        masters.publish()
        sync.publish()
    grads = [(s.record, s.grad.clone()) for s in sync.shards]
    weights = [(p.record, p.detach().clone()) for p in model.parameters()]
    return grads, weights, axis.ledger.calls[:]


def gradients(axis, case, model, sync, step):
    """All micro-batches of this rank, `in_flight` forwards ahead of their backwards."""
    m, losses = case.microbatches, []
    sync.begin_step()
    for i in range(m):
        losses.append(model(*batch(case, step, axis.rank * m + i)) / 17)
        if case.validate:
            with torch.no_grad():
                model.eval()(*batch(case, 0, 0))
            model.train()
        while losses and (len(losses) == case.in_flight or i == m - 1):
            sync.before_backward(last=i == m - 1 and len(losses) == 1)
            losses.pop(0).backward()
    sync.finish()


# ---- a model whose activations have no bytes


class Chain(nn.Module):
    """Matrices in the units of a Llama; 0 rows of input, so that what is measured is the state."""

    def __init__(self, width=16):
        super().__init__()
        self.embed = make_linear(8, width)
        self.layers = nn.ModuleList(
            nn.Sequential(make_linear(width, 2 * width), make_linear(2 * width, width))
            for _ in range(3)
        )
        self.norm, self.head = make_linear(width, width), make_linear(width, 24)

    def forward(self, x):
        for part in zero.units_of(self):
            x = part(x)
        return x


def make_linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


def meta_chain():
    with torch.device("meta"):
        model = Chain()
    sharding.attach(model)
    return model


def measure(axis, stage, impl, w, g, bucket):
    """(live bytes between micro-batches, the most on top in a step, what is left at its end)."""
    model = meta_chain()
    sharding.replicate(model, axis)
    if stage == 3:
        zero.shard_model(model, axis, impl)
    sharding.materialise(model, 0, initial_value, dtype=w)
    parameters = list(model.parameters())
    precision.accumulate_in(parameters, g)
    sync = zero.make(stage, parameters, axis, impl, bucket)
    weights = precision.MasterWeights(sync.shards).weights
    optimizer = torch.optim.AdamW(weights, foreach=False)
    run_empty(model, sync, w)  # the first step makes what stays
    for weight, shard in zip(weights, sync.shards, strict=True):
        weight.grad = shard.grad.to(weight.dtype)
    optimizer.step()
    with Meter() as meter:
        label(meter, model, sync, optimizer, weights)
        meter.reset_peak()
        live = run_empty(model, sync, w, meter)
        sync.publish()
        return live, meter.peak_bytes - sum(live.values()), meter.live["activation"]


def run_empty(model, sync, dtype, meter=None):
    """Two micro-batches of no rows; what a meter sees between them."""
    seen = []
    sync.begin_step()
    for last in (False, True):
        sync.before_backward(last)
        model(torch.empty(0, 8, dtype=dtype)).backward(torch.empty(0, 24, dtype=dtype))
        seen.append(meter and meter.live)
    sync.finish()
    return seen[0]


def label(meter, model, sync, optimizer, weights):
    moments = [s[key] for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    meter.label("optimizer", [*moments, *weights])
    meter.label("parameter", model.parameters())  # the weights themselves, unless narrow
    meter.label("gradient", [p.grad for p in [*model.parameters(), *sync.shards]])
    gathering = getattr(model.embed, "gatherer", None)
    meter.label("buffer", [*sync.buffers, *(gathering.buffers if gathering else [])])


# ---- processes


def over_gloo(axis):
    """Weights of all stages and paths: buffers that a call reads and writes are really sent."""
    return [train(axis, PROCESSES, s, impl)[1] for s in (1, 2, 3) for impl in ("plain", "fused")]


def with_fully_shard(axis):
    """Weights after training with torch's FSDP2, and those of stage 3."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = build(PROCESSES), init_device_mesh("cpu", (axis.size,))
    records = [p.record for p in model.parameters()]
    for module in (*zero.units_of(model), model):
        fully_shard(module, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(PROCESSES.steps):
        optimizer.zero_grad()
        for i in range(PROCESSES.microbatches):
            loss = model(*batch(PROCESSES, step, axis.rank * PROCESSES.microbatches + i)) / 17
            (loss * axis.size).backward()  # FSDP2 takes the mean over ranks
        optimizer.step()
    full = (p.detach().full_tensor() for p in model.parameters())
    theirs = {record.name: weight for record, weight in zip(records, full, strict=True)}
    return theirs, train(axis, PROCESSES, 3, "fused")[1]
