"""This machine as so many ranks find it, by measurements of a few seconds.

Measured  in processes that all run at once, over gloo, with one thread each as torchrun gives
          them: they share cores, caches and memory, so alone each would be faster. Medians, of the
          slowest rank: a training step also gets a machine as busy as it is
What      matmuls of 1024 cubed, and of the model's own shapes in all three directions; one layer
          of the model, fused, forward and backward; a copy of memory; all_reduce of some sizes.
          A layer less its matmuls is operators: on a CPU it is their reads and writes, and starting
          them, that takes the time
Not       a benchmark: it says what this machine gives today, beside whatever else it does; nor
          for layers that take minutes here
Hardware  as run.py plan takes it: planner_show.py
Dims      B micro-batch  T sequence  D width  F outputs
Tests     tests/test_hardware.py; beside run.py: benchmarks/this_machine.py
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from picotron_lab.comm import Axis
from picotron_lab.config import ModelConfig, TrainConfig, require
from picotron_lab.dropout import Where
from picotron_lab.fused import fuse
from picotron_lab.model import Llama, initial_value, rotary_angles
from picotron_lab.precision import DTYPES
from picotron_lab.processes import run_processes

SIDE, COPIED = 1024, 2**25  # of the large matmul; bytes of the copy
MESSAGES = (2**12, 2**16, 2**20, 2**22)  # bytes
TOKENS = 1024  # of the measured layer, at most
BATCH = 8  # sequences of it, at most
BUDGET, MOST = 4.0, 100  # seconds for all of them, and tries of each
PER_CORE = 4  # ranks that may share a core: more would only wait for one another


@dataclass(frozen=True)
class Measured:
    """What a rank reaches while all others do the same. Rates per second, times in seconds.

    best, matmuls   FLOP/s of a large matmul, and of the matmuls of a layer
    layer           seconds of one layer, forward and backward, of `training`'s micro-batch
    copies          bytes read and written per second in a copy
    messages        (payload bytes, seconds) of all_reduce over the ranks; none for one rank
    """

    ranks: int
    model: ModelConfig
    training: TrainConfig
    best: float
    matmuls: float
    layer: float
    copies: float
    messages: tuple[tuple[int, float], ...]

    @property
    def memory_bytes(self) -> float:
        """A rank's share of physical memory; where the system does not tell, what is certain: 0."""
        names = getattr(os, "sysconf_names", {})
        if "SC_PHYS_PAGES" not in names:
            return 0.0
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / self.ranks


def measure(model: ModelConfig, cfg: TrainConfig, ranks: int) -> Measured:
    """What this machine gives each of so many ranks that train this model.

    cfg     dtype and sequence length count; the measured layer gets TOKENS tokens at most
    Raises  ConfigError for a model or a number of ranks that cannot be measured
    """
    cores = os.cpu_count() or 1
    require(
        ranks <= PER_CORE * cores,
        f"--gpus {ranks} with --measure are processes here, and {cores} cores take at most "
        f"{PER_CORE * cores}; try --gpus {cores}.",
    )
    require(
        model.experts == 0,
        f"--measure times a dense layer, and --experts {model.experts} gives as many rows as "
        "routers decide; leave out --measure, or name a dense model such as --model tiny.",
    )
    length = min(cfg.sequence_length, TOKENS)
    batch = min(BATCH, TOKENS // length)
    run = TrainConfig(batch, batch, length, dtype=cfg.dtype)
    found = run_processes(_rank, ranks, replace(model, layers=1), run)
    best, matmuls, layer, copy, *messages = (max(times) for times in zip(*found, strict=True))
    own = 6 * batch * length * sum(F * D for F, D in shapes(model))
    return Measured(
        ranks, model, run, 2 * SIDE**3 / best, own / matmuls, layer, 2 * COPIED / copy,
        tuple(zip(MESSAGES, messages, strict=False)),
    )  # fmt: skip


def shapes(model: ModelConfig) -> list[tuple[int, int]]:
    """(outputs, inputs) of the seven matrices of a dense layer: q, k, v, o, gate, up, down."""
    D, F = model.hidden_size, model.ffn_size
    q, k = model.heads * model.head_width, model.kv_heads * model.head_width
    return [(q, D), (k, D), (k, D), (D, q), (F, D), (F, D), (D, F)]


# ---- in the process of a rank


def _rank(axis: Axis, model: ModelConfig, cfg: TrainConfig) -> list[float]:
    """Seconds: the large matmul, the layer's matmuls, the layer, the copy, messages."""
    dtype = DTYPES[cfg.dtype]
    x, room = torch.ones(SIDE, SIDE, dtype=dtype), torch.ones(COPIED // 4)
    out, target = torch.empty_like(x), torch.empty_like(room)
    layer, matmuls = _layer(model, cfg, dtype), _matmuls(model, cfg, dtype)
    works = [lambda: torch.mm(x, x, out=out), matmuls, layer, lambda: target.copy_(room)]
    if axis.size > 1:
        buffers = [torch.ones(size // 4) for size in MESSAGES]
        works += [lambda buffer=buffer: axis.all_reduce(buffer) for buffer in buffers]
    return _medians(axis, works)


def _medians(axis: Axis, works: list[Callable[[], object]]) -> list[float]:
    """Seconds of the median of each, tried in turn, so that all meet the same busy machine."""
    for work in works:
        work()
    start = time.perf_counter()
    for work in works:
        work()
    once = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
    mean = axis.all_reduce(once).item() / axis.size  # the same on all ranks, as is what follows
    rounds = max(3, min(MOST, int(BUDGET / mean)))
    seconds = [[_seconds(work) for work in works] for _ in range(rounds)]
    return [max(statistics.median(times), 1e-9) for times in zip(*seconds, strict=True)]


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _matmuls(model: ModelConfig, cfg: TrainConfig, dtype: torch.dtype) -> Callable[[], object]:
    """The matmuls of a layer: outputs, gradients of inputs and of weights."""
    rows = cfg.micro_batch_size * cfg.sequence_length
    dice = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=dice).to(dtype)

    each = [(draw(rows, D), draw(F, D), draw(rows, F)) for F, D in shapes(model)]
    return lambda: [(x @ w.T, out @ w, out.T @ x) for x, w, out in each]


def _layer(model: ModelConfig, cfg: TrainConfig, dtype: torch.dtype) -> Callable[[], object]:
    """Forward and backward of a layer; gradients add up, as over micro-batches."""
    whole, dice = Llama(replace(model, vocab_size=1)), torch.Generator().manual_seed(0)
    fuse(whole)
    block: nn.Module = whole.layers[0]
    for name, weight in block.named_parameters():
        weight.data = initial_value(name, tuple(weight.shape), dice).to(dtype)
    where = Where.first(torch.zeros(cfg.micro_batch_size, cfg.sequence_length, dtype=torch.int64))
    angles = rotary_angles(where.positions_T, model.head_width, model.rope_theta)
    shape = cfg.micro_batch_size, cfg.sequence_length, model.hidden_size
    x_BTD = torch.randn(shape, generator=dice).to(dtype).requires_grad_()
    upstream = torch.randn(shape, generator=dice).to(dtype)

    def work() -> None:
        x_BTD.grad = None
        block(x_BTD, angles, where).backward(upstream)

    return work
