"""ZeRO: stop keeping n copies of what only one rank needs.

Paper   Rajbhandari et al. 2020, sections 5 and 7 (1910.02054); stage 3 is also FSDP (2304.11277)
Idea    Data parallel ranks hold the same parameters, gradients and moments. Give each rank 1/n of
        the rows of each, and fetch the rest when, and only while, it is needed.
        stage 1   moments are cut: each rank steps its rows, then all gather the new weights
        stage 2   and gradients: a full one is reduced and freed as soon as it is made
        stage 3   and parameters: a unit (embedding, layer, norm, head) is gathered to be used,
                  forward and again backward, then freed
        Not a way to split computation: every rank runs the whole model (see tensor_parallel.py).
Before  every rank, with AdamW in float32: 4Ψ parameters + 4Ψ gradients + 8Ψ moments
After   stage 1: 4Ψ + 4Ψ + 8Ψ/n    stage 2: 4Ψ + (4Ψ + 8Ψ)/n    stage 3: 16Ψ/n + one gathered unit
        bf16 with master weights, as in the paper: 2Ψ + 2Ψ + 12Ψ/n, 2Ψ + (2Ψ + 12Ψ)/n, 16Ψ/n; with
        float32 gradients, the trainer's way: 2Ψ + 4Ψ + 12Ψ/n, 2Ψ + (4Ψ + 12Ψ)/n, 18Ψ/n
        The fused path also keeps flat buffers. Stages 1, 2: two buckets for each axis, none for
        one of size 1. Stage 3: two units for each axis, in use and on its way; one of gradients
Wire    m micro-batches, per step: stage 1 reduce_scatter(4Ψ) + all_gather(4Ψ), like all_reduce(4Ψ);
        stage 2 m reduce_scatter(4Ψ) + all_gather(4Ψ); stage 3 m (2 all_gather(4Ψ) +
        reduce_scatter(4Ψ)), less one all_gather of what backward does not read (embedding, fused
        head); a tied weight is gathered and reduced in both of its units
Axes    dp: replicas of the model, which become shards of its state; of experts expert_replica, the
        ranks among them that hold the same ones
Dims    none: dim 0 of any tensor is its rows
Read    plain: zero_rows.py, its first half -> Zero -> Stage1 -> Stage2 -> zero_units.py, up to
        Gatherer -> Stage3; fused: the rest of zero_rows.py -> Buckets -> Prefetcher -> contract
Try     python -m picotron_lab.zero    Tests   tests/test_zero.py
"""

from collections.abc import Sequence
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from picotron_lab import precision, sharding
from picotron_lab.analysis.meter import Meter
from picotron_lab.analysis.zero_state import Contract, Job, contract, formula, wire_formula
from picotron_lab.comm import Axis
from picotron_lab.config import ModelConfig
from picotron_lab.lab import run_ranks
from picotron_lab.model import Llama, initial_value
from picotron_lab.sharding import group_by_size
from picotron_lab.zero_rows import (
    Flights,
    Group,
    forget,
    gather_rows,
    mine,
    scatter_sum,
    set_to_zero,
    shard_rows,
)  # fmt: skip
from picotron_lab.zero_units import Gatherer, Prefetcher, Sharded, shard_experts, units_of

MIB, BUCKET = 2**20, 4096  # BUCKET: of the demonstration

# ---- 1. the idea


class Zero:
    """How the gradients of one step are summed, and what the optimizer steps: the `shards`."""

    def __init__(self, shards: Sequence[nn.Parameter]):
        self.shards = list(shards)

    @property
    def buffers(self) -> list[Tensor]:
        """Flat memory that stays between steps."""
        return []

    def begin_step(self) -> None:
        """Gradients are zero."""
        set_to_zero(self.shards)

    def before_backward(self, last: bool) -> None:
        """One micro-batch's backward comes; `last` says that no other will add to the gradients."""

    def finish(self) -> None:
        """partial -> shard: from now on every shard.grad is the whole sum of its rows."""

    def publish(self) -> None:
        """shard -> replicated: the optimizer has stepped the shards; the other weights follow."""


# ---- 2. plain path


class Stage1(Zero):
    """Gradients add up in full over the micro-batches; then each rank gets the sum of its rows.

    The other rows of a full gradient stay this rank's own part; nobody reads them.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], axis: Axis):
        super().__init__([shard_rows(p, axis) for p in parameters])
        self.parameters, self.axis = list(parameters), axis

    def begin_step(self) -> None:
        set_to_zero(self.parameters)
        for parameter, shard in zip(self.parameters, self.shards, strict=True):
            shard.grad = parameter.grad[mine(parameter, self.axis)]  # where the sum will lie

    def finish(self) -> None:
        for parameter, shard in zip(self.parameters, self.shards, strict=True):
            shard.grad.copy_(scatter_sum(parameter.grad, self.axis))

    @torch.no_grad()
    def publish(self) -> None:
        for parameter, shard in zip(self.parameters, self.shards, strict=True):
            parameter.copy_(gather_rows(shard, len(parameter), self.axis))


class Stage2(Stage1):
    """A hook reduces each gradient as soon as backward has made it, for every micro-batch.

    Every rank must use every parameter, else ranks would meet in different calls (see Buckets).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], axis: Axis):
        super().__init__(parameters, axis)
        for parameter, shard in zip(self.parameters, self.shards, strict=True):
            parameter.register_post_accumulate_grad_hook(partial(self._reduce, shard))

    def begin_step(self) -> None:
        forget(self.parameters)  # what others left there, which would count as this step's
        set_to_zero(self.shards)

    def _reduce(self, shard: nn.Parameter, parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        shard.grad += scatter_sum(gradient, self.axis)

    def finish(self) -> None:
        """Nothing is left to do."""


class Stage3(Zero):
    """The module's own parameters are the shards; a unit whose backward is over calls `reduce`.

    Units of any axis: each says over which.
    """

    def __init__(self, shards: Sequence[nn.Parameter]):
        super().__init__(shards)
        for shard in self.shards:  # through which units find it: they are older than their weights
            shard.synchroniser = self

    def publish(self) -> None:
        """Units must learn that their weights changed, which fused AdamW does not tell torch."""
        increment_version(self.shards)

    def reduce(self, shards: Sequence[nn.Parameter], gradients: list[Tensor], axis: Axis) -> None:
        """partial -> shard (reduce_scatter, one unit): the sums are added to every shard.grad."""
        for shard, gradient in zip(shards, gradients, strict=True):
            shard.grad += scatter_sum(gradient.to(shard.grad_dtype), axis)


def shard_model(model: Llama, axis: Axis, impl: str, expert_axis: Axis | None = None) -> None:
    """Stage 3, on the meta device: every unit of the model keeps this rank's rows alone.

    expert_axis  over which gradients of experts are partial, where that is not `axis`: the experts
                 of a layer are then a unit inside the layer's
    """
    kind = {"plain": Gatherer, "fused": Prefetcher}[impl]
    apart = shard_experts(model, kind(expert_axis), axis) if expert_axis else set()
    # a tied parameter is in two units
    shards = {p: shard_rows(p, axis) for p in model.parameters() if p not in apart}
    gatherer = kind(axis)
    gatherer.units = [Sharded(module, gatherer, shards) for module in units_of(model)]
    model.embed, *layers, model.norm, model.head = gatherer.units
    model.layers = nn.ModuleList(layers)


# ---- 3. fused path


class Bucket:
    """Parameters whose gradients leave together, and this rank's shards of them."""

    def __init__(self, parameters: Sequence[nn.Parameter], shards: dict, axis: Axis):
        self.parameters, self.shards = parameters, [shards[p] for p in parameters]
        self.group = Group(parameters, axis)
        self.missing = 0  # gradients that the current backward still owes


class Buckets(Stage1):
    """Stage 1 in groups: a bucket leaves when the last backward has completed its gradients.

    They are counted down and leave in order as in data_parallel.Bucketed, for the same reason.
    At most two are under way: one is filled or emptied while the other travels.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], axis: Axis, size: float, dtype: torch.dtype
    ):
        super().__init__(parameters, axis)
        shards, self.dtype = dict(zip(self.parameters, self.shards, strict=True)), dtype
        self.buckets = [Bucket(group, shards, axis) for group in group_by_size(parameters, size)]
        self.owner = {p: bucket for bucket in self.buckets for p in bucket.parameters}
        self.waiting: list[Bucket] = []  # buckets of the current backward that have not left
        widest = max(dtype.itemsize, parameters[0].itemsize)
        room = widest * max(bucket.group.size for bucket in self.buckets)
        self.flights = Flights(min(2, len(self.buckets)), parameters[0].device, room)
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._count_down)

    @property
    def buffers(self) -> list[Tensor]:
        return self.flights.buffers

    def begin_step(self) -> None:
        self.waiting = []  # like calls under way, of a backward that was broken off
        self.flights.land()
        super().begin_step()

    def before_backward(self, last: bool) -> None:
        if last:
            self._expect_gradients()

    def finish(self) -> None:
        self._send_rest()
        self.flights.land()

    @torch.no_grad()
    def publish(self) -> None:
        for bucket in self.buckets:
            group, shards = bucket.group, bucket.shards
            send, landed = partial(group.gather, shards), partial(group.unpack, bucket.parameters)
            self.flights.start(group, shards[0].dtype, send, landed)
        self.flights.land()

    def _expect_gradients(self) -> None:
        self.waiting = list(self.buckets)
        for bucket in self.buckets:
            bucket.missing = len(bucket.parameters)

    def _count_down(self, parameter: nn.Parameter) -> None:
        self.owner[parameter].missing -= 1
        while self.waiting and self.waiting[0].missing == 0:
            self._send(self.waiting.pop(0))

    def _send_rest(self) -> None:
        while self.waiting:
            self._send(self.waiting.pop(0))

    def _send(self, bucket: Bucket) -> None:
        send = partial(bucket.group.reduce, [p.grad for p in bucket.parameters])
        self.flights.start(bucket.group, self.dtype, send, partial(self._take, bucket))

    def _take(self, bucket: Bucket, wire: Tensor) -> None:
        sums = bucket.group.mine(bucket.shards, wire)
        for shard, total in zip(bucket.shards, sums, strict=True):
            shard.grad.copy_(total)


class FreedBuckets(Buckets):
    """Stage 2 in groups: a bucket leaves in every backward, and its full gradients are freed."""

    def begin_step(self) -> None:
        self.waiting = []
        self.flights.land()
        forget(self.parameters)
        set_to_zero(self.shards)

    def before_backward(self, last: bool) -> None:
        self._send_rest()
        self._expect_gradients()

    def _send(self, bucket: Bucket) -> None:
        super()._send(bucket)
        forget(bucket.parameters)

    def _take(self, bucket: Bucket, wire: Tensor) -> None:
        bucket.group.add_sums(bucket.shards, wire)


class OverlappedUnits(Stage3):
    """Stage 3 with one reduce-scatter per unit, under way while backward computes the next."""

    def __init__(self, shards: Sequence[nn.Parameter], dtype: torch.dtype):
        super().__init__(shards)
        self.dtype, self.flights = dtype, Flights(1, shards[0].device)

    @property
    def buffers(self) -> list[Tensor]:
        return self.flights.buffers

    def begin_step(self) -> None:
        self.flights.land()  # of a backward that was broken off
        super().begin_step()

    def reduce(self, shards: Sequence[nn.Parameter], gradients: list[Tensor], axis: Axis) -> None:
        group = Group(gradients, axis)
        send, landed = partial(group.reduce, gradients), partial(group.add_sums, shards)
        self.flights.start(group, self.dtype, send, landed)

    def finish(self) -> None:
        self.flights.land()


# ---- 4. contract


def make(
    stage: int,
    parameters: Sequence[nn.Parameter],
    axis: Axis,
    impl: str,
    bucket_bytes: float = 64 * MIB,
    reduce_dtype: torch.dtype | None = None,
) -> Zero:
    """The synchroniser of a stage, 1, 2 or 3, for the trainable parameters of a real model.

    axis          of stages 1 and 2: make one for each axis (data_parallel.over_axes); of stage 3,
                  one serves all parameters, for their units know their axes
    reduce_dtype  of gradients on the wire, fused path only; else the dtype in which they add up
    """
    dtype = reduce_dtype or parameters[0].grad_dtype
    if stage == 3:
        return Stage3(parameters) if impl == "plain" else OverlappedUnits(parameters, dtype)
    if axis.size == 1:  # the shards are the parameters, and there is nothing to add or send
        return Zero(parameters)
    if impl == "plain":
        return (Stage1, Stage2)[stage - 1](parameters, axis)
    return (Buckets, FreedBuckets)[stage - 1](parameters, axis, bucket_bytes, dtype)


def main() -> None:
    """Every stage on 4 threads, with the state of AdamW."""
    ranks, m = 4, 2
    cfg = ModelConfig(vocab_size=64, hidden_size=16, layers=1, heads=2, kv_heads=1, ffn_size=32)
    size = sum(p.numel() for p in _meta(cfg).parameters())
    print(f"Ψ = {size}, n = {ranks}, m = {m} micro-batches; bytes of one rank: predicted, measured")
    print("state is weights + gradients + optimizer: moments, and masters of bfloat16 weights")
    row = "{:8} {:9} {:7} {:>18} {:>12} {:>11} {:>11} {:>11} {:>5}".format
    print(row("weights", "gradients", "stage", *("state", "sent") * 2, "buffers", "calls"))
    half = torch.bfloat16, torch.bfloat16
    single, ours = (torch.float32, torch.float32), (torch.bfloat16, torch.float32)
    cases = (single, "plain"), (half, "fused"), (ours, "fused")
    for ((w, g), impl), stage in product(cases, (1, 2, 3)):
        seen = run_ranks(_demo, ranks, cfg, stage, impl, (w, g), m)[0]
        said = contract(stage, impl, _job(cfg, stage, (w, g), ranks, m))
        names = [str(dtype).removeprefix("torch.") for dtype in (w, g)]
        forms = [f(stage, w.itemsize, g.itemsize) for f in (formula, wire_formula)]
        keys = "state", "payload", "buffer", "calls"
        pairs = [f"{getattr(said, key)} {getattr(seen, key)}" for key in keys]
        print(row(*names, f"{stage} {impl}", *forms, *pairs))


def _meta(cfg: ModelConfig) -> Llama:
    with torch.device("meta"):
        model = Llama(cfg)
    sharding.attach(model)
    return model


def _job(cfg: ModelConfig, stage: int, dtypes: tuple, ranks: int, m: int) -> Job:
    """What contract() needs to know of the demonstration."""
    model = _meta(cfg).to(dtypes[0])
    precision.accumulate_in(list(model.parameters()), dtypes[1])
    groups = [list(unit.parameters()) for unit in units_of(model)]
    if stage < 3:
        groups = group_by_size(list(model.parameters()), BUCKET)
    return Job(groups, ranks, [False] + [True] * (len(groups) - 1), microbatches=m)


def _demo(axis: Axis, cfg: ModelConfig, stage: int, impl: str, dtypes: tuple, m: int) -> Contract:
    """One step of a small Llama; what lies on this rank after it, and what it sent."""
    model = _meta(cfg)
    sharding.replicate(model, axis)
    if stage == 3:
        shard_model(model, axis, impl)
    sharding.materialise(model, 0, initial_value, dtype=dtypes[0])
    parameters = list(model.parameters())
    precision.accumulate_in(parameters, dtypes[1])
    sync = make(stage, parameters, axis, impl, BUCKET)
    weights = precision.MasterWeights(sync.shards).weights
    moments = [torch.zeros_like(weight) for weight in weights for _ in ("first", "second")]
    tokens = torch.arange(8).view(2, 4) + axis.rank
    sync.begin_step()
    for i in range(m):
        loss = model(tokens + i, tokens)
        sync.before_backward(last=i == m - 1)
        loss.backward()
    sync.finish()
    sync.publish()
    units_buffers = model.embed.gatherer.buffers if stage == 3 else []
    with Meter() as meter:  # storages count once, however many views are labelled
        meter.label("optimizer", [*weights, *moments])
        meter.label("parameter", parameters)  # which are also the weights, unless narrow
        meter.label("gradient", [p.grad for p in [*parameters, *sync.shards]])
        meter.label("buffer", [*sync.buffers, *units_buffers])
        live = [meter.live[key] for key in ("parameter", "gradient", "optimizer", "buffer")]
    return Contract(*live, 0, len(axis.ledger.calls), axis.ledger.bytes())


if __name__ == "__main__":
    main()
