"""What test_tensor_parallel.py and test_sequence_parallel.py run: on one device, on every rank, and
in processes, which import this file."""

import math
from dataclasses import dataclass, replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from picotron_lab import optim, sequence_parallel, sharding, tensor_parallel, vocab_parallel
from picotron_lab.analysis.meter import Meter
from picotron_lab.config import ModelConfig
from picotron_lab.dropout import Where
from picotron_lab.fused import fuse
from picotron_lab.model import IGNORED, Llama, initial_value, rotary_angles
from picotron_lab.tensor_parallel import tally

SMALL = ModelConfig(vocab_size=23, hidden_size=16, layers=2, heads=8, kv_heads=8, ffn_size=22)


@dataclass(frozen=True)
class Job:
    """A model, its batch, and how it is made parallel."""

    cfg: ModelConfig = SMALL
    impl: str = "plain"
    fused_model: bool = False
    sequence: bool = False
    dropout: float = 0.3
    B: int = 3
    T: int = 7
    dtype: torch.dtype = torch.float64
    vocab: str = "none"  # or an algorithm of vocab_parallel.py

    def with_model(self, **changes):
        return replace(self, cfg=replace(self.cfg, **changes))


def batch(job):
    """Tokens, labels of which some are ignored, a place inside a longer run; counted tokens."""
    dice = torch.Generator().manual_seed(5)
    tokens_BT, labels_BT = torch.randint(job.cfg.vocab_size, (2, job.B, job.T), generator=dice)
    labels_BT[torch.rand(job.B, job.T, generator=dice) < 0.3] = IGNORED
    where = Where(torch.arange(job.T), torch.arange(job.B) + 5, step=3, seed=7)
    return (tokens_BT, labels_BT, where), int((labels_BT != IGNORED).sum())


def scaled_value(name, shape, generator):
    """Weights so large that no part of the model drowns in the residual stream."""
    if len(shape) == 1:
        return 1 + 0.3 * torch.randn(shape, generator=generator)
    return 10 * initial_value(name, shape, generator)


# ---- models


def plain_model(job):
    """The model of one device: everything is compared with it."""
    with torch.device("meta"):
        model = Llama(job.cfg, job.dropout)
    sharding.attach(model)
    sharding.materialise(model, 1, scaled_value, dtype=job.dtype)
    return model


def split_axes(world, job):
    """The axes tp and kv of one rank."""
    n = world.size
    tp = world.split("tp", [list(range(n))])
    same = n // job.cfg.kv_heads if job.cfg.kv_heads < n else 1
    kv = tp.split("kv", [list(range(i, i + same)) for i in range(0, n, same)])
    return {"tp": tp, "kv": kv}


def parallel_model(axes, job):
    """The same weights, cut in the order of the trainer."""
    tp = axes["tp"]
    with torch.device("meta"):
        model = Llama(job.cfg, job.dropout)
    sharding.attach(model)
    if job.fused_model:
        fuse(model)
    tensor_parallel.parallelize(model, tp, axes["kv"], job.impl)
    if job.vocab == "none":
        tensor_parallel.split_head(model, tp, job.impl)
    else:
        vocab_parallel.parallelize(model, tp, job.impl, job.vocab)
    if job.sequence:
        sequence_parallel.parallelize(model, tp, job.impl)
    sharding.materialise(model, 1, scaled_value, dtype=job.dtype)
    return model


# ---- gradients and steps


def train(model, job, steps, reduce, clip):
    """(last loss, norms): `steps` of SGD, then once more forward and backward.

    reduce(parameters) completes the gradients, clip(parameters) gives their norm.
    """
    parameters = list(model.parameters())
    norms = []
    for step in range(steps + 1):
        model.zero_grad()
        inputs, count = batch(job)
        loss = model(*inputs) / count
        loss.backward()
        reduce(parameters)
        if step < steps:
            norms.append(float(clip(parameters)))
            descend(parameters, 1.0)
    return loss.detach(), norms


@torch.no_grad()
def descend(parameters, lr):
    """A step of SGD; a process needs seconds to get ready for one of torch's optimizers."""
    for parameter in parameters:
        parameter -= lr * parameter.grad


def one_device(job, steps=0, limit=0.05):
    """(loss, norms, {name: gradient}, {name: weight})."""
    model = plain_model(job)
    loss, norms = train(
        model, job, steps, lambda ps: None, lambda ps: torch.nn.utils.clip_grad_norm_(ps, limit)
    )
    parts = [(p.record.name, p) for p in model.parameters()]
    return loss, norms, {n: p.grad for n, p in parts}, {n: p.detach() for n, p in parts}


def on_rank(world, job, steps=0, limit=0.05):
    """The same on one rank: (loss, norms, [(record, gradient, weight)])."""
    axes = split_axes(world, job)
    model = parallel_model(axes, job)
    loss, norms = train(
        model, job, steps, lambda ps: sharding.reduce_gradients(ps, axes),
        lambda ps: optim.clip(ps, limit, world, axes),
    )  # fmt: skip
    return loss, norms, [(p.record, p.grad, p.detach()) for p in model.parameters()]


def worst_deviation(results, expected):
    """Of losses, norms, and of each shard relative to the whole gradient or weight; infinite for
    what is no number."""
    loss, norms, *wholes = expected
    found = []
    for mine, my_norms, parts in results:
        assert {record.name for record, *_ in parts} == set(wholes[0])
        pairs = [(mine, loss), *zip(my_norms, norms, strict=True)]
        found += [abs(float(a / b) - 1) for a, b in pairs]
        for record, *tensors in parts:
            for part, whole in zip(tensors, (w[record.name] for w in wholes), strict=True):
                difference = torch.linalg.vector_norm(part - whole[record.index])
                found.append(float(difference / torch.linalg.vector_norm(whole)))
    return max(each if math.isfinite(each) else math.inf for each in found)


# ---- what is sent, held and saved


def traffic(world, job):
    """What is sent in forward, backward and reduction, as {"forward all_reduce": (calls, bytes)};
    the calls; and the number of weights."""
    axes = split_axes(world, job)
    model = parallel_model(axes, job)
    inputs, count = batch(job)
    ledger, sent, calls = world.ledger, {}, []

    def note(direction):
        sent.update(tally(ledger, direction))
        calls.append(ledger.calls[:])
        ledger.clear()

    loss = model(*inputs)
    note("forward")
    loss.backward()
    note("backward")
    sharding.reduce_gradients(model.parameters(), axes)
    note("reduction")
    return sent, calls, sum(p.numel() for p in model.parameters())


def saved(world, job):
    """Bytes that forward leaves for backward."""
    model = parallel_model(split_axes(world, job), job)
    (tokens_BT, labels_BT, where), _ = batch(job)
    with Meter() as meter:
        meter.label("parameter", model.parameters())
        meter.label("buffer", [tokens_BT, labels_BT, where.positions_T, where.rows_B])
        loss = model(tokens_BT, labels_BT, where)
        meter.label("buffer", [loss])
        return meter.live["activation"]


class Events(TorchDispatchMode):
    """The order of matmuls ("mm") and of the calls of an axis: "all_reduce", "... done"."""

    def __init__(self, axis, verbs):
        super().__init__()
        self.seen = []
        for verb in verbs:
            setattr(axis, verb, self._noting(verb, getattr(axis, verb)))

    def _noting(self, verb, call):
        def noted(*args, **options):
            self.seen.append(verb)
            answer = call(*args, **options)
            return Noted(answer, self.seen, verb) if options.get("wait") is False else answer

        return noted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm"):
            self.seen.append("mm")
        return func(*args, **(kwargs or {}))


@dataclass
class Noted:
    """A handle that notes when it is waited for."""

    handle: object
    seen: list
    verb: str

    def wait(self):
        self.seen.append(f"{self.verb} done")
        return self.handle.wait()


def order_in_mlp(world, job, verbs):
    """Events of forward and of backward of one MLP region."""
    axes = split_axes(world, job)
    mlp = parallel_model(axes, job).layers[0].mlp
    T = job.T // world.size if job.sequence else job.T
    x_BTD = torch.ones(job.B, T, job.cfg.hidden_size, dtype=job.dtype, requires_grad=True)
    with Events(axes["tp"], verbs) as events:
        y_BTD = mlp(x_BTD)
        forward = events.seen[:]
        events.seen.clear()
        y_BTD.backward(torch.ones_like(y_BTD))
        return forward, events.seen


# ---- real processes: a block by torch's own tensor parallelism


def first_block(model, job):
    """It, its input, the gradient of its output, angles, and where."""
    dice = torch.Generator().manual_seed(6)
    shape = (2, job.B, job.T, job.cfg.hidden_size)
    x_BTD, dy_BTD = torch.randn(shape, generator=dice, dtype=job.dtype)
    (_, _, where), _ = batch(job)
    angles = rotary_angles(where.positions_T, job.cfg.head_width, job.cfg.rope_theta)
    return model.layers[0], x_BTD.requires_grad_(), dy_BTD, (angles, where)


def by_torch(world, job):
    """Output, dX and this rank's gradients of a block that torch parallelized."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import parallel

    block, x_BTD, dy_BTD, others = first_block(plain_model(job), job)
    columns = ("attention.q", "attention.k", "attention.v", "mlp.gate", "mlp.up")
    plan = {name: parallel.ColwiseParallel() for name in columns}
    plan |= {name: parallel.RowwiseParallel() for name in ("attention.o", "mlp.down")}
    parallel.parallelize_module(block, init_device_mesh("cpu", (world.size,)), plan)
    y_BTD = block(x_BTD, *others)
    y_BTD.backward(dy_BTD)
    gradients = {name.removesuffix(".weight"): p.grad for name, p in block.named_parameters()}
    local = {n: gradients[n].to_local() for n in plan}  # fails on what torch did not cut
    return y_BTD.detach(), x_BTD.grad, gradients | local


def by_us(world, job):
    """The same with tensor_parallel.py, and the operations that were sent."""
    axes = split_axes(world, job)
    block, x_BTD, dy_BTD, others = first_block(parallel_model(axes, job), job)
    y_BTD = block(x_BTD, *others)
    y_BTD.backward(dy_BTD)
    gradients = {name.removesuffix(".weight"): p.grad for name, p in block.named_parameters()}
    ops = [call.op for call in world.ledger.calls]
    world.ledger.clear()
    return y_BTD.detach(), x_BTD.grad, gradients, ops


def beside_torch(world, jobs):
    """What torch computes, then what each job does."""
    return by_torch(world, jobs[0]), *(by_us(world, job) for job in jobs)
