"""Dry run: one rank of a job of any size, run without data, GPUs or other ranks.

Idea    A closed form tells what should happen; the program itself tells what does. So the trainer
        runs as it is, from the first weight to the optimizer's step, in the seat of one rank,
        where nobody answers and tensors have shapes but no memory (nobody.py). A Meter counts the
        bytes that they would take, a Tally the operations of matmuls, the ledger what is sent.
Step    the second one: in the first, moments and buffers that stay are still being made
Ranks   of a pipeline stage all do the same, but for uneven parts (heads, rows of ZeRO): the first
        one stands for all
Exact   as on lab threads: calls, bytes sent, operations. Memory to the byte, without a pipeline;
        with one, up to two messages less, for nobody lets a sender wait
Way     as_gpu: as the fused path runs on a GPU, in the shapes of its kernels. A CPU's operators
        keep more for backward (norms their wide input, SwiGLU a product)
Experts get equal shares of the choices of each micro-batch, in turn. With them memory is that of a
        CPU's operators, less the lists of places that are kept: below 1 %
Not     what an allocator loses between tensors, NCCL's buffers, workspaces of matmuls: add 1 to 3
        GiB to compare with a GPU. Attention counts the full square, as if not causal
Dims    B micro-batch  T queries  S keys  H/K query/kv heads  C head width
        N rows  F, D columns: [N, F] times [F, D]
Time    dryrun_time.py makes it of the Work of actions
Read    dry_run -> Rehearsal -> observe -> Tally -> Report, Work; printed: dryrun_show.py
Tests   tests/test_dryrun.py
"""

import dataclasses
import importlib.util
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from picotron_lab import corpus, data, nobody, optim
from picotron_lab.analysis.meter import Meter
from picotron_lab.config import MeshConfig, ModelConfig, TrainConfig, require
from picotron_lab.ledger import Call, Ledger
from picotron_lab.mesh import grid
from picotron_lab.schedules.actions import Action
from picotron_lab.trainer import Trainer
from picotron_lab.zero_units import Sharded

UPDATE = "update"  # what follows the last action: clipping, the optimizer, new weights
ATTENTION = 2, 5  # matmuls of T x T scores: forward; backward, which forms the scores again
UNDER_WAY = "not waited for"  # until something else is computed
CAUSAL = 0.5  # share of scores under the mask
UNTOUCHED = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


@dataclass
class Work:
    """What some actions alike did, together.

    matmuls     operations; attention  its operations, without the scores above a causal mask
    moved       bytes that all other operators read and wrote; operators  how many those were
    messages    {axis: {"operation" or "operation, not waited for": (calls, payload bytes)}}
    """

    times: int = 0
    matmuls: float = 0.0
    attention: float = 0.0
    moved: float = 0.0
    operators: int = 0
    messages: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What one rank holds, computes and sends in a step.

    parameters  how many this rank holds; kept   bytes that stay between steps, by category
    peak        bytes at the moment when they are most, by category; peak_at  the action then under
                way, such as F0.3: the last one that began, or `update`
    actions     how many there are of each kind (F, BW, ...); flops  operations of matmuls by kind
    traffic     {axis: {operation: (calls, payload bytes)}}, payload as in ledger.py
    stepped     parameters that the optimizer steps here
    works       by kind and stage, such as F0, or by kind, of passes of the vocabulary. Real runs
                have other operators, so they are left out where reports are compared
    seconds     that it took to build and to run two steps
    """

    rank: int
    stages: tuple[int, ...]
    parameters: int
    kept: dict[str, int]
    peak: dict[str, int]
    peak_at: str
    actions: dict[str, int]
    flops: dict[str, int]
    traffic: dict[str, dict[str, tuple[int, int]]]
    stepped: int
    works: dict[str, Work] = field(compare=False)
    seconds: float = 0.0

    @property
    def peak_bytes(self) -> int:
        """The most bytes held."""
        return sum(self.peak.values())


def dry_run(
    model: ModelConfig, mesh: MeshConfig, cfg: TrainConfig, rank: int, as_gpu: bool = True
) -> Report:
    """What rank `rank` of this job holds, computes and sends in one step.

    as_gpu  the fused path as it runs on a GPU, if `has_kernels`; else as on a CPU, whose operators
            keep more for backward
    raises  ConfigError for options that no run accepts, and for what only values can tell
    """
    _check(mesh)
    start = time.perf_counter()
    with nobody.pretend(as_gpu and has_kernels(), model.experts and model.top_k):
        trainer = Rehearsal(model, mesh, cfg, nobody.seat(rank, mesh.size))
        trainer.train_step(0)
        report = observe(trainer)
    return dataclasses.replace(report, seconds=time.perf_counter() - start)


def has_kernels() -> bool:
    """Whether the fused path can be followed as on a GPU: triton tells shapes of its kernels."""
    return importlib.util.find_spec("triton") is not None


def ranks(mesh: MeshConfig, every_stage: bool = False) -> list[int]:
    """The first rank of the first and of the last pipeline position, or of every one."""
    firsts = grid(mesh.pp, mesh.dp, mesh.cp, mesh.tp)[:, 0, 0, 0].tolist()
    return firsts if every_stage else sorted({firsts[0], firsts[-1]})


def _check(mesh: MeshConfig) -> None:
    require(
        mesh.token_slices != "auto",
        "--token-slices auto is decided by times, which a dry run has not; try --token-slices 4.",
    )


# ---- the trainer, without anything real


class Rehearsal(Trainer):
    """A Trainer on tensors without memory: no text is opened, no weight drawn."""

    def __init__(self, model: ModelConfig, mesh: MeshConfig, cfg: TrainConfig, world: Any):
        super().__init__(model, mesh, cfg, world)
        if getattr(self.optimizer, "defaults", {}).get("fused"):
            self.optimizer = InPlace(self.optimizer.param_groups)

    def _find_device(self) -> torch.device:
        return nobody.DEVICE

    def _open_data(self, model_cfg: ModelConfig) -> None:
        """A text of zeros, as long as a global batch."""
        cfg, size = self.cfg, model_cfg.vocab_size or vocabulary(self.cfg)
        self.model_cfg = dataclasses.replace(model_cfg, vocab_size=size)
        zeros = np.broadcast_to(np.uint8(0), (cfg.global_batch_size * cfg.sequence_length + 1,))
        self.batches = data.Batches(zeros, cfg.sequence_length, cfg.seed, cfg.global_batch_size)


class InPlace(torch.optim.AdamW):
    """AdamW in one kernel, as far as shapes can tell: the moments, and no temporaries. torch has
    that kernel for devices alone that have memory."""

    def __init__(self, groups: list[dict]):
        super().__init__(groups)
        for group in self.param_groups:
            group["fused"] = True

    def step(self) -> None:
        """Moments there must be; all else happens in place."""
        optim.moments(self)


def vocabulary(cfg: TrainConfig) -> int:
    """The size of the tokenizer's vocabulary, as the trainer rounds it up."""
    option = cfg.tokenizer_file or cfg.tokenizer
    require(
        not option.startswith("bpe:"),
        f"--tokenizer {option} is trained on the data, which a dry run does not open; add "
        f"--vocab-size {option.removeprefix('bpe:')}.",
    )
    return -(-corpus.load_tokenizer(option, [], None).vocab_size // 64) * 64


# ---- one step, watched


def observe(trainer: Trainer, step: int = 1) -> Report:
    """Run step `step` of a trainer, which may be a real one, and say what it took. Steps before
    have made what stays."""
    ledger = trainer.mesh.world.ledger
    ledger.clear()
    parameters = list(trainer.model.parameters())
    with Meter() as meter, Tally(meter, ledger) as tally:
        for category, tensors in held(trainer).items():
            meter.label(category, tensors)
        meter.watch(parameters)
        meter.reset_peak()
        kept = meter.live
        owners = [*parameters, *trainer.parameters]
        do = trainer.executor.do
        trainer.executor.do = {kind: partial(tally.run, act, owners) for kind, act in do.items()}
        trainer.compute_gradients(step)
        tally.place = tally.kind = UPDATE
        trainer.update(step)
        trainer.executor.do = do
    return Report(
        trainer.mesh.world.rank, tuple(trainer.executor.stages),
        sum(p.numel() for p in parameters), kept, meter.peak, tally.peak_at,
        dict(tally.actions), dict(tally.flops), traffic(ledger.calls),
        sum(p.numel() for p in trainer.parameters), tally.works,
    )  # fmt: skip


def held(trainer: Trainer) -> dict[str, list[Tensor | None]]:
    """What a rank keeps from step to step, by the categories of the Meter; later ones win."""
    parameters, sync = list(trainer.model.parameters()), trainer.synchroniser
    moments = [tensor for _, tensor in optim.moments(trainer.optimizer)]
    units = [m for m in trainer.model.modules() if isinstance(m, Sharded)]
    buffers = [buffer for unit in units for buffer in unit.gatherer.buffers]
    return {
        "optimizer": [*trainer.masters.weights, *moments],
        "buffer": [*buffers, *getattr(sync, "buffers", [])],
        "parameter": parameters,  # also the weights that are their own masters
        "gradient": [p.grad for p in (*parameters, *trainer.parameters)],
    }


class Tally(TorchDispatchMode):
    """Operations of matmuls by kind of action, the work of each action, and during which action the
    Meter saw its peak."""

    def __init__(self, meter: Meter, ledger: Ledger):
        super().__init__()
        self.meter, self.seen, self.ledger = meter, meter.peak, ledger
        self.work, self.works = Work(), {}
        self.place = self.kind = self.peak_at = "begin"
        self.actions: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.counts = formulas()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, 1.5 s, only to keep out of here

    def run(self, act: Callable, owners: list, action: Action, received: Tensor | None) -> Any:
        """An action of the executor. Gradients that the step has made since count as such."""
        self.meter.label("gradient", (p.grad for p in owners))
        self.place, self.kind = str(action), action.kind
        self.actions[action.kind] += 1
        self.work = self.works.setdefault(self.place.partition(".")[0], Work())
        self.work.times += 1
        before = len(self.ledger.calls)
        made = act(action, received)
        self._note_messages(self.ledger.calls[before:])
        self.work = Work()  # of no action
        return made

    def _note_messages(self, calls: list[Call]) -> None:
        for call in calls:
            of_axis = self.work.messages.setdefault(call.axis, {})
            name = call.op if call.waits else f"{call.op}, {UNDER_WAY}"
            number, size = of_axis.get(name, (0, 0))
            of_axis[name] = number + 1, size + call.bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        result, count = func(*args, **(kwargs or {})), self.counts.get(func.overloadpacket)
        if count is not None:
            flops = count(*args, **(kwargs or {}), out_val=result)
            self.flops[self.kind] += flops
            if "attention" in func.overloadpacket.__name__:
                causal = any(x is True for x in args)
                self.work.attention += flops * (CAUSAL if causal else 1.0)
            else:
                self.work.matmuls += flops
        elif not (func.is_view or func.overloadpacket.__name__ in UNTOUCHED):
            self.work.moved += _bytes(args) + _bytes((result,))
            self.work.operators += 1
        if self.meter.peak is not self.seen:
            self.seen, self.peak_at = self.meter.peak, self.place
        return result


def _bytes(tree: Any) -> int:
    """Of all tensors in nested lists and tuples."""
    if isinstance(tree, Tensor):
        return tree.nbytes
    return sum(map(_bytes, tree)) if isinstance(tree, list | tuple) else 0


def formulas() -> dict[Any, Callable]:
    """What an operator computes: torch's formulas, and some that it lacks: attention for a CPU,
    addmm with a dtype of the result."""
    from torch.utils.flop_counter import flop_registry  # imports more than training needs

    aten, (forward, backward) = torch.ops.aten, ATTENTION
    there, back = partial(_attention, forward, 0), partial(_attention, backward, 1)
    return {
        **flop_registry,
        aten.addmm: _addmm,
        aten.addmm_: _addmm,
        aten._scaled_dot_product_flash_attention: there,
        aten._scaled_dot_product_flash_attention_backward: back,
        aten._scaled_dot_product_flash_attention_for_cpu: there,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: back,
    }


def _addmm(_: Tensor, x_NF: Tensor, y_FD: Tensor, *others: Any, **more: Any) -> int:
    return 2 * x_NF.numel() * y_FD.shape[1]


def _attention(matmuls: int, first: int, *args: Any, **others: Any) -> int:
    """2 B H T S C for each matmul; q [B, H, T, C] and k [B, K, S, C] are arguments `first` on."""
    q_BHTC, k_BKSC = args[first : first + 2]
    return matmuls * 2 * q_BHTC.numel() * k_BKSC.shape[2]


def traffic(calls: list) -> dict[str, dict[str, tuple[int, int]]]:
    """{axis: {operation: (calls, payload bytes)}}."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for call in calls:
        of_axis = found.setdefault(call.axis, {})
        number, size = of_axis.get(call.op, (0, 0))
        of_axis[call.op] = number + 1, size + call.bytes
    return found
