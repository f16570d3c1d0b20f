"""What the tests of pipelines run: a tiny Llama without Trainer and files, on ranks and on one
device.

Processes import this file. Weights and tokens come from streams that no code under test draws
from; the model of one device is the plain one, trained with torch's autograd, clipping and a step
written out.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from picotron_lab import (
    build,
    data_parallel,
    mesh,
    optim,
    precision,
    router,
    sharding,
    token_slices,
    vocab_parallel,
)  # fmt: skip
from picotron_lab.checks import check_run, schedule_of, slices_of
from picotron_lab.comm import Alone, Axis
from picotron_lab.config import MeshConfig, ModelConfig, TrainConfig
from picotron_lab.dropout import Where
from picotron_lab.ledger import Call, Ledger
from picotron_lab.model import IGNORED, Llama
from picotron_lab.pipeline_parallel import Executor, FusedExecutor, NoReplicas
from picotron_lab.pipeline_vocabulary import ALGORITHM, Words, plan
from picotron_lab.schedules.actions import Schedule
from picotron_lab.schedules.costs import Costs
from picotron_lab.schedules.validator import validate

STEPS, LR, CLIP, T, D = 3, 0.5, 0.3, 4, 8
SIZES = {"vocab_size": 13, "hidden_size": D, "heads": 2, "kv_heads": 1, "ffn_size": 12}
EXPERTS = {
    "experts": 2, "top_k": 1, "ffn_size": 6, "balance_loss": 0.3, "balance_speed": 0.01,
    "z_loss": 0.02,
}  # fmt: skip
FLAVOURS = {  # changes of the model, of training
    "dense": ({}, {}),
    "tied, dropout": ({"tied": True}, {"dropout": 0.3}),
    "recompute, dropout": ({}, {"recompute": "full", "dropout": 0.3}),
    "experts": (EXPERTS, {}),
    "tied, experts": ({**EXPERTS, "tied": True}, {}),
    "recompute, experts": (EXPERTS, {"recompute": "full"}),
    "recompute, tied": ({"tied": True}, {"recompute": "full"}),
}


@dataclass(frozen=True)
class Case:
    """A schedule on p ranks with m micro-batches of one sequence.

    v       stages per rank; 0: the schedule's own number
    layers  of each stage, as in --pp-layers; "even": one each
    slices  of every sequence, as in --token-slices; "1": none
    length  of a sequence
    """

    name: str
    p: int
    m: int
    impl: str = "plain"
    flavour: str = "dense"
    v: int = 0
    layers: str = "even"
    slices: str = "1"
    length: int = T

    def __str__(self) -> str:
        v = f" v{self.v}" if self.v else ""
        cut = f" slices {self.slices}" if self.slices != "1" else ""
        return f"{self.name} p{self.p} m{self.m}{v} {self.impl} {self.flavour} {self.layers}{cut}"

    def training(self) -> tuple[MeshConfig, TrainConfig]:
        """The mesh and what to do on it."""
        _, changes = FLAVOURS[self.flavour]
        mesh_cfg = MeshConfig(
            pp=self.p, schedule=self.name, virtual_stages=self.v, pp_layers=self.layers,
            token_slices=self.slices,
        )  # fmt: skip
        cfg = TrainConfig(
            global_batch_size=self.m, micro_batch_size=1, sequence_length=self.length,
            dtype="float64", impl=self.impl, **changes,
        )  # fmt: skip
        return mesh_cfg, cfg

    def schedule(self) -> Schedule:
        """What the ranks run."""
        return schedule_of(*self.training(), len(self.lengths()))

    def lengths(self) -> tuple[int, ...]:
        """Of the slices."""
        return slices_of(*self.training())

    def model(self, stages: int) -> ModelConfig:
        """Of a pipeline with so many stages."""
        changes, _ = FLAVOURS[self.flavour]
        layers = stages if self.layers == "even" else sum(map(int, self.layers.split(",")))
        return ModelConfig(**{**SIZES, "layers": layers, **changes})


@dataclass
class Seen:
    """What one rank, or one device, went through."""

    numbers: list[float] = field(default_factory=list)  # loss and norm of every step
    tensors: list[tuple[str, Any, Tensor]] = field(default_factory=list)  # what, record, values
    calls: list[Call] = field(default_factory=list)  # of the first step's executor
    peak: int = 0

    def keep(self, what: str, parameter: Tensor, values: Tensor) -> None:
        """A copy of what a parameter has now."""
        what = f"{what} {parameter.record.name}"
        self.tensors.append((what, parameter.record, values.detach().clone()))

    def keep_weights(self, model: nn.Module) -> None:
        """At the end: parameters, and the biases of routers."""
        for tensor in (*model.parameters(), *model.buffers()):
            self.keep("final", tensor, tensor)


@torch.no_grad()
def enlarge(model: nn.Module) -> None:
    """So large that no part of the model drowns in the residual stream; no norm weight is 1."""
    for p in model.parameters():
        noise = torch.randn(p.record.shape, generator=sharding.generator_of(1, p.record.name))
        p.copy_(p * 10 if p.dim() > 1 else p + 0.3 * noise[p.record.index])


def batches(step: int, m: int, length: int = T) -> tuple[Tensor, Tensor]:
    """Tokens, labels [m, T] of a step; the last of several is ragged, the first has a gap."""
    draw = torch.Generator().manual_seed(step)
    tokens_BT = torch.randint(0, SIZES["vocab_size"], (m, length + 1), generator=draw)
    labels_BT = tokens_BT[:, 1:].clone()
    if m > 1:
        labels_BT[-1, 1:] = IGNORED
    labels_BT[0, -1] = IGNORED
    return tokens_BT[:, :-1], labels_BT


def where(step: int, rows_B: Tensor, length: int = T) -> Where:
    """These sequences of the global batch."""
    return Where(torch.arange(length), rows_B, step, seed=5)


# ---- on ranks


@dataclass
class Rank:
    """What a rank needs to train: the trainer's parts without the trainer."""

    model_cfg: ModelConfig
    mesh: mesh.Mesh
    part: nn.Module
    executor: Any
    synchroniser: Any
    case: Case

    @property
    def axes(self) -> dict[str, Axis]:
        return {**self.mesh.axes, **self.part.axes}

    def microbatches(self, step: int) -> list[tuple]:
        """The arguments of the model for every micro-batch."""
        length = self.case.length
        tokens_BT, labels_BT = batches(step, self.executor.schedule.microbatches, length)
        rows = torch.arange(len(tokens_BT)).split(1)
        return [(tokens_BT[i], labels_BT[i], where(step, i, length)) for i in rows]

    def slices(self, given: list[tuple], every: list[tuple[int, ...]] | None) -> list:
        """What the executor takes; `every`: the slices of each micro-batch, if they differ."""
        if self.executor.schedule.slices == 1:
            return given
        every = every or [self.case.lengths()] * len(given)
        return [token_slices.cut(one, of) for one, of in zip(given, every, strict=True)]


def prepare(axis: Axis, case: Case) -> Rank:
    """This rank's part of the model, and its executor."""
    mesh_cfg, cfg = case.training()
    schedule = case.schedule()
    model_cfg = case.model(schedule.stages)
    check_run(model_cfg, mesh_cfg, cfg)
    validate(schedule)
    ranks = mesh.build(axis, mesh_cfg, model_cfg.kv_heads)
    part = build.build_model(model_cfg, mesh_cfg, cfg, ranks, schedule, torch.device("cpu"))
    enlarge(part)
    precision.accumulate_in(list(part.parameters()), torch.float64)
    found = build.synchronisers(part, mesh_cfg, cfg, ranks)
    executor = build.executor(part, schedule, ranks, cfg.impl, found)
    synchroniser = data_parallel.together(list(found.values()))
    return Rank(model_cfg, ranks, part, executor, synchroniser, case)


def train(axis: Axis, case: Case, steps: int = STEPS, every: list | None = None) -> Seen:
    """Steps of SGD with clipping on this rank; `every`: the slices of each micro-batch."""
    rank, seen = prepare(axis, case), Seen()
    for step in range(steps):
        axis.ledger.clear()
        loss, norm = gradients(rank, step, seen, every)
        seen.numbers += [loss, norm]
        with torch.no_grad():
            for p in rank.synchroniser.shards:
                p -= LR * p.grad
    seen.keep_weights(rank.part)
    seen.peak = rank.executor.peak
    return seen


def gradients(
    rank: Rank, step: int, seen: Seen, every: list | None = None
) -> tuple[float, float]:
    """Loss and norm; leaves clipped gradients in .grad, and copies of unclipped ones in `seen`."""
    given = rank.microbatches(step)
    tokens = int(sum((labels != IGNORED).sum() for _, labels, _ in given))
    positions = len(given) * rank.case.length
    router.begin_step(rank.part, 1 / positions)
    loss_sum = rank.executor.run(rank.slices(given, every), tokens)
    if step == 0:
        seen.calls = list(rank.mesh.world.ledger.calls)
    parameters, replica = rank.synchroniser.shards, rank.mesh.replica
    others = {name: axis for name, axis in rank.axes.items() if axis is not replica}
    sharding.reduce_gradients(parameters, others)
    if rank.model_cfg.experts:
        copies = rank.axes.get("mirror")
        router.settle(rank.part, replica, positions, copies, rank.mesh.pp)
    for p in parameters:
        seen.keep(f"step {step} gradient", p, p.grad)
    loss = rank.mesh.pp.all_reduce(loss_sum) / tokens
    return float(loss), float(optim.clip(parameters, CLIP, rank.mesh.world, rank.axes))


def train_all(axis: Axis, cases: list[Case]) -> list[Seen]:
    """One after the other in the same processes."""
    return [train(axis, case) for case in cases]


# ---- on the virtual clock


class Product(nn.Module):
    """A stage that computes next to nothing: time is pretended."""

    def __init__(self, first: bool, last: bool):
        super().__init__()
        self.first, self.last = first, last
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, labels_BT: Tensor, place: Where) -> Tensor:
        x = self.weight * (x[..., None] if self.first else x)
        return x.sum() if self.last else x

    def boundary(self, tokens_BT: Tensor) -> Tensor:
        return torch.empty(*tokens_BT.shape, 1)


def times(axis: Axis, schedule: Schedule, costs: Costs, impl: str) -> list[tuple]:
    """(item, start, end) of a rank's list, on stages that take what `costs` say."""
    s, words, split = schedule.stages, None, schedule.vocabulary > 0
    stages = {
        i: Product(i == 0 and not split, i == s - 1 and not split)
        for i in schedule.placement[axis.rank]
    }
    if split:
        with torch.device("meta"):
            model = Llama(ModelConfig(vocab_size=5, hidden_size=1, layers=1, head_size=2))
        sharding.attach(model)
        vocab_parallel.parallelize(model, axis, impl, ALGORITHM[schedule.vocabulary])
        sharding.materialise(model, 0, build.initial_value)
        model.head.weight.grad = torch.zeros_like(model.head.weight)
        words = Words(model.embed, model.head, axis, schedule)
        if schedule.vocabulary == 2:
            words.plan = plan(schedule, axis.rank, costs)
    kind = {"plain": Executor, "fused": FusedExecutor}[impl]
    executor = kind(stages, schedule, axis, dict.fromkeys(stages, NoReplicas()), words)
    executor.trace, executor.pretend = [], costs.of
    tokens_BT = torch.ones(1, 2, dtype=torch.int64)
    executor.run([(tokens_BT, tokens_BT, Where.first(tokens_BT))] * schedule.microbatches, 1)
    return executor.trace


# ---- on one device


def whole(model_cfg: ModelConfig, dropout: float = 0.0) -> Llama:
    """The plain model."""
    model = Llama(model_cfg, dropout)
    sharding.attach(model)
    sharding.materialise(model, 0, build.initial_value, dtype=torch.float64)
    enlarge(model)
    return model


def alone(
    model_cfg: ModelConfig, dropout: float, m: int, length: int = T, steps: int = STEPS
) -> Seen:
    """The same steps with the plain model, all sequences at once."""
    model, seen = whole(model_cfg, dropout), Seen()
    one = Axis("one", [0], 0, Alone(), Ledger())
    for step in range(steps):
        tokens_BT, labels_BT = batches(step, m, length)
        router.begin_step(model, 1 / (m * length))
        loss_sum = model(tokens_BT, labels_BT, where(step, torch.arange(m), length))
        loss = loss_sum / (labels_BT != IGNORED).sum()
        model.zero_grad()
        loss.backward()
        router.settle(model, one, m * length)
        for p in model.parameters():
            seen.keep(f"step {step} gradient", p, p.grad)
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        seen.numbers += [float(loss.detach()), float(norm)]
        with torch.no_grad():
            for p in model.parameters():
                p -= LR * p.grad
    seen.keep_weights(model)
    return seen


# ---- compared


def deviation(found: list[Seen], reference: Seen) -> float:
    """The largest difference of any number or tensor from one device, relative to the largest
    element of the whole tensor. Every element must be on some rank, and copies must be equal."""
    whole = {what: values for what, _, values in reference.tensors}
    missing = {what: torch.ones_like(values, dtype=torch.bool) for what, values in whole.items()}
    copies: dict[tuple, Tensor] = {}
    worst = 0.0
    for mine in found:
        pairs = zip(mine.numbers, reference.numbers, strict=True)
        worst = max(worst, *(abs(a - b) / abs(b) for a, b in pairs))
        for what, record, values in mine.tensors:
            first = copies.setdefault((what, record.slices), values)
            assert torch.equal(values, first), f"copies of {what} differ"
            right, largest = whole[what][record.index], whole[what].abs().max()
            assert values.shape == right.shape and values.isfinite().all(), what
            if not torch.equal(values, right):
                worst = max(worst, float((values - right).abs().max() / largest))
            missing[what][record.index] = False
    left = [what for what, elements in missing.items() if elements.any()]
    assert not left, f"nobody has all of {left}"
    return worst
