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
Not     what an allocator loses between tensors, NCCL's buffers, workspaces of matmuls: add 1 to 3
        GiB to compare with a GPU. Attention counts the full square, as if not causal. Not experts:
        how many rows each gets is decided by values.
Dims    B micro-batch  T queries  S keys  H/K query/kv heads  C head width
        N rows  F, D columns: [N, F] times [F, D]
Time    what values and clocks decide is not here: show prints step_time.py's prediction beside it
Read    dry_run -> Rehearsal -> observe -> Tally -> Report; show
Tests   tests/test_dryrun.py
"""

import argparse
import dataclasses
import importlib.util
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from picotron_lab import corpus, data, nobody, optim
from picotron_lab.analysis import hardware, step_time
from picotron_lab.analysis.meter import CATEGORIES, Meter
from picotron_lab.config import ConfigError, MeshConfig, ModelConfig, TrainConfig, require
from picotron_lab.mesh import grid
from picotron_lab.precision import DTYPES
from picotron_lab.schedules.actions import Action
from picotron_lab.trainer import Trainer
from picotron_lab.zero_units import Sharded

GIB, TERA = 2**30, 1e12
UNITS = (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10))
UPDATE = "update"  # what follows the last action: clipping, the optimizer, new weights
ATTENTION = 2, 5  # matmuls of T x T scores: forward; backward, which forms the scores again


@dataclass(frozen=True)
class Report:
    """What one rank holds, computes and sends in a step.

    parameters  how many this rank holds; kept   bytes that stay between steps, by category
    peak        bytes at the moment when they are most, by category; peak_at  the action then under
                way, such as F0.3: the last one that began, or `update`
    actions     how many there are of each kind (F, BW, ...); flops  operations of matmuls by kind
    traffic     {axis: {operation: (calls, payload bytes)}}, payload as in ledger.py
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
    seconds: float = 0.0

    @property
    def peak_bytes(self) -> int:
        """The most bytes held."""
        return sum(self.peak.values())


def dry_run(
    model: ModelConfig, mesh: MeshConfig, cfg: TrainConfig, rank: int, as_gpu: bool = True
) -> Report:
    """What rank `rank` of this job holds, computes and sends in one step.

    as_gpu  the fused path as it runs on a GPU, if triton is there to tell the shapes of kernels;
            else as on a CPU, whose operators keep more for backward
    raises  ConfigError for options that no run accepts, and for what only values can tell
    """
    _check(model, mesh)
    start = time.perf_counter()
    with nobody.pretend(as_gpu and has_kernels()):
        trainer = Rehearsal(model, mesh, cfg, nobody.seat(rank, mesh.size))
        trainer.train_step(0)
        report = observe(trainer)
    return dataclasses.replace(report, seconds=time.perf_counter() - start)


def has_kernels() -> bool:
    """Whether the kernels of the fused path can be imported, here or on a GPU."""
    return importlib.util.find_spec("triton") is not None


def ranks(mesh: MeshConfig, every_stage: bool = False) -> list[int]:
    """The first rank of the first and of the last pipeline position, or of every one."""
    firsts = grid(mesh.pp, mesh.dp, mesh.cp, mesh.tp)[:, 0, 0, 0].tolist()
    return firsts if every_stage else sorted({firsts[0], firsts[-1]})


def _check(model: ModelConfig, mesh: MeshConfig) -> None:
    require(
        model.experts == 0,
        f"--experts {model.experts} get as many rows as routers decide, by values that a dry run "
        "has not; leave it out, or train with --ranks.",
    )
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
    with Meter() as meter, Tally(meter) as tally:
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
    """Operations of matmuls by kind of action, and during which action the Meter saw its peak."""

    def __init__(self, meter: Meter):
        super().__init__()
        self.meter, self.seen = meter, meter.peak
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
        return act(action, received)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        result, count = func(*args, **(kwargs or {})), self.counts.get(func.overloadpacket)
        if count is not None:
            self.flops[self.kind] += count(*args, **(kwargs or {}), out_val=result)
        if self.meter.peak is not self.seen:
            self.seen, self.peak_at = self.meter.peak, self.place
        return result


def formulas() -> dict[Any, Callable]:
    """What an operator computes: torch's formulas, and some that it lacks: attention for a CPU,
    addmm with a dtype of the result."""
    from torch.utils.flop_counter import flop_registry  # imports more than training needs

    aten, (forward, backward) = torch.ops.aten, ATTENTION
    there, back = partial(_attention, forward, 0), partial(_attention, backward, 1)
    return {
        **flop_registry,
        aten.addmm: _addmm,
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


# ---- the command line


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of run.py dryrun, beside those of training."""
    group = parser.add_argument_group("dry run")
    group.add_argument("--gpus", type=int, required=True, metavar="N", help="ranks of the job")
    group.add_argument("--hardware", default="h100", metavar="NAME", help="such as h100 (default)")
    group.add_argument("--all-stages", action="store_true", help="not only the first and the last")
    group.add_argument("--json", action="store_true", help="everything, as JSON")


def show(model: ModelConfig, mesh: MeshConfig, cfg: TrainConfig, given: dict[str, Any]) -> None:
    """Print the reports. `given` are the options of the command line.

    Raises  ConfigError, one sentence that names the option, its value and one that works
    """
    device = hardware.hardware(given["hardware"])
    reports = [dry_run(model, mesh, cfg, rank) for rank in ranks(mesh, "all_stages" in given)]
    told = predicted(model, mesh, cfg, device)
    if "json" in given:
        each = [dataclasses.asdict(report) | {"predicted": told} for report in reports]
        print(json.dumps(each, indent=1))
        return
    batches = f"{cfg.micro_batches(mesh.dp)} micro-batches of {cfg.micro_batch_size} sequences"
    print(f"{model.name} on {mesh.size} GPUs: {batches} of {cfg.sequence_length} tokens")
    way = "kernels of a GPU" if has_kernels() and cfg.impl == "fused" else "operators of a CPU"
    print(f"{cfg.dtype}, --impl {cfg.impl}, memory as with the {way}")
    for report in reports:
        print("\n".join(_lines(report, device, DTYPES[cfg.dtype])))
    print("\n".join(_told(told, device.name)))


def predicted(
    model: ModelConfig, mesh: MeshConfig, cfg: TrainConfig, device: hardware.Hardware
) -> dict[str, Any]:
    """What step_time.py says of the whole job: {"step_seconds", "tokens_per_second", "mfu",
    "bubble_share", "exposed_seconds": {axis: seconds that nothing hides}}, or {"refused": why}."""
    size = model.vocab_size or vocabulary(cfg)
    try:
        step = step_time.predict(dataclasses.replace(model, vocab_size=size), mesh, cfg, device)
    except ConfigError as error:
        return {"refused": str(error)}
    return {
        "step_seconds": step.seconds,
        "tokens_per_second": step.tokens_per_second,
        "mfu": step.mfu,
        "bubble_share": step.bubble,
        "exposed_seconds": step.exposed,
    }


def _told(told: dict[str, Any], name: str) -> list[str]:
    """The prediction for people."""
    if "refused" in told:
        return ["", f"no step time predicted: {told['refused']}"]
    waits = told["exposed_seconds"]
    axes = ", ".join(f"{axis} {seconds:.3g}" for axis, seconds in waits.items() if seconds)
    return [
        "",
        f"predicted   {told['step_seconds']:.3g} s a step on {name}, not traced",
        f"  speed     {told['tokens_per_second']:,.0f} tokens/s, MFU {told['mfu']:.1%}",
        f"  waiting   bubble {told['bubble_share']:.1%} of the step; messages that nothing hides "
        f"{sum(waits.values()):.3g} s" + (f": {axes}" if axes else ""),
    ]


def _lines(report: Report, device: hardware.Hardware, dtype: torch.dtype) -> list[str]:
    """A report for people, at most 100 columns wide."""
    stages = ", ".join(map(str, report.stages))
    flops, peak = sum(report.flops.values()), device.peak.get(dtype)
    least = f", {flops / peak:.3f} s at the peak of {device.name}" if peak else ""
    by_kind = ", ".join(f"{kind} {n / TERA:.2f}" for kind, n in report.flops.items())
    lines = [
        "",
        f"rank {report.rank}, stage {stages}: {report.parameters:,} parameters (traced in "
        f"{report.seconds:.1f} s)",
        f"memory      {_size(report.peak_bytes)} at most, during {report.peak_at}; {device.name}: "
        f"{device.memory_bytes / GIB:.1f} GiB",
    ]
    lines += [f"  {name:10}{_size(report.peak[name])}" for name in CATEGORIES]
    lines.append(f"operations  {flops / TERA:8.2f} T{least}: {by_kind}")
    for axis, ops in report.traffic.items():
        for op, (calls, size) in ops.items():
            lines.append(f"sent        {_size(size)} in {calls} {op} on {axis}")
    return lines


def _size(count: int) -> str:
    """Bytes in a unit that leaves at most four digits before the point."""
    unit, factor = next(((u, f) for u, f in UNITS if count >= f), UNITS[-1])
    return f"{count / factor:8.2f} {unit}"
