"""One rank of `pp_overlay.py`: a pipeline stage that really computes, on one thread.

Alone     ranks take turns, and each times F and BW of its own stage while the others wait; so does
          a message from rank 0 to rank 1 and back
Together  then steps of the real trainer: start and end of every action
Clock     time.perf_counter, which on Linux is one clock for all processes of a machine
Dims      as in model.py
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from picotron_lab.comm import Axis  # noqa: E402
from picotron_lab.config import MeshConfig, ModelConfig, TrainConfig  # noqa: E402
from picotron_lab.dropout import Where  # noqa: E402
from picotron_lab.trainer import Trainer  # noqa: E402

TIMES = 25  # of which the best counts, as of steps: other work disturbs it least
Actions = list[tuple[float, float]]  # seconds at which each item of a rank started and ended


@dataclass(frozen=True)
class Seen:
    """What a rank saw. Seconds.

    alone     of F and of BW of its stage, while all others wait;  message: one way
    steps     its actions in each step;  busy: processor time of the process in each step
    """

    alone: tuple[float, float]
    message: float
    steps: list[Actions]
    busy: list[float]


def run_steps(
    axis: Axis, model: ModelConfig, mesh: MeshConfig, cfg: TrainConfig, count: int
) -> Seen:
    """Build the trainer, time the stage alone, then `count` steps after one of warm-up."""
    torch.set_num_threads(1)
    trainer = Trainer(model, mesh, cfg, axis)
    executor, steps, busy = trainer.executor, [], []
    trainer.compute_gradients(0)
    alone = in_turns(axis, trainer)
    message = one_way(axis, cfg.micro_batch_size * cfg.sequence_length * model.hidden_size)
    for step in range(1, count + 1):
        executor.trace = []
        axis.barrier()
        before = time.process_time()
        trainer.compute_gradients(step)
        busy.append(time.process_time() - before)
        steps.append([(start, end) for _, start, end in executor.trace])
    return Seen(alone, message, steps, busy)


def in_turns(axis: Axis, trainer: Trainer) -> tuple[float, float]:
    """Seconds of F and BW of this rank's stage, measured one rank after the other."""
    found = 0.0, 0.0
    for rank in range(axis.size):
        if rank == axis.rank:
            found = stage_alone(trainer, rank, axis.size)
        axis.barrier()
    return found


def stage_alone(trainer: Trainer, number: int, count: int) -> tuple[float, float]:
    """Best F and BW of one of `count` stages; what it receives is random."""
    cfg, model, stage = trainer.cfg, trainer.model_cfg, trainer.executor.stages[number]
    shape = cfg.micro_batch_size, cfg.sequence_length
    dice = torch.Generator().manual_seed(number)
    tokens_BT = torch.randint(model.vocab_size, shape, generator=dice)
    rest = tokens_BT, Where.first(tokens_BT)
    forwards, backwards = [], []
    for _ in range(TIMES):
        x = tokens_BT
        if number > 0:
            x = torch.randn(*shape, model.hidden_size, generator=dice).requires_grad_()
        start = time.perf_counter()
        out = stage(x, *rest)
        middle = time.perf_counter()
        last = number == count - 1
        out.backward(torch.tensor(1e-3) if last else torch.full_like(out, 1e-3))
        forwards.append(middle - start)
        backwards.append(time.perf_counter() - middle)
    return min(forwards), min(backwards)


def one_way(axis: Axis, size: int) -> float:
    """Half of the median time of a float32 message of `size` numbers from rank 0 to 1 and back."""
    x, times = torch.zeros(size), []
    for _ in range(TIMES):
        start = time.perf_counter()
        if axis.rank == 0:
            axis.send(x, 1)
            axis.recv(x, 1)
        if axis.rank == 1:
            axis.recv(x, 0)
            axis.send(x, 0)
        times.append((time.perf_counter() - start) / 2)
        axis.barrier()
    return statistics.median(times)
