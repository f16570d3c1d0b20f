"""One rank of `pipeline.py`: the real executor on a model whose layers sleep instead of compute.

Layer   one matmul of width 8 on 4 tokens, so that a core has next to nothing to do; gradients,
        messages, and the passes of a split vocabulary are all real
Clock   time.perf_counter, which on Linux is one clock for all processes of a machine: starts and
        ends of different ranks can be compared as they are. A barrier lets all start together
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from picotron_lab import sharding, vocab_parallel  # noqa: E402
from picotron_lab.comm import Axis  # noqa: E402
from picotron_lab.config import ModelConfig  # noqa: E402
from picotron_lab.dropout import Where  # noqa: E402
from picotron_lab.model import Llama, initial_value  # noqa: E402
from picotron_lab.pipeline_parallel import Executor, FusedExecutor, NoReplicas  # noqa: E402
from picotron_lab.pipeline_stages import split  # noqa: E402
from picotron_lab.pipeline_vocabulary import ALGORITHM, Words  # noqa: E402
from picotron_lab.schedules import registry  # noqa: E402
from picotron_lab.schedules.actions import Item, Schedule  # noqa: E402
from picotron_lab.schedules.costs import Costs  # noqa: E402
from picotron_lab.schedules.validator import validate  # noqa: E402

Step = list[tuple[float, float]]  # seconds at which each item of a rank started and ended
TOKENS, WIDTH = 4, 8


class Line(nn.Module):
    """In the place of a transformer layer: [B, T, D] -> [B, T, D]."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x_BTD: Tensor, angles: Any, where: Any) -> Tensor:
        return self.project(x_BTD)


def run_steps(axis: Axis, name: str, microbatches: int, unit: float, count: int) -> list[Step]:
    """What this rank did in `count` steps after a first one without sleep.

    unit  seconds that an action of cost 1 sleeps
    """
    schedule = registry.build(name, axis.size, microbatches)
    validate(schedule)
    executor, found = make_executor(axis, schedule), []
    tokens_BT = torch.arange(TOKENS)[None]
    batches = [(tokens_BT, tokens_BT, Where.first(tokens_BT))] * microbatches
    for step in range(count + 1):
        executor.pretend, executor.trace = sleeping(unit if step else 0.0), []
        axis.barrier()
        executor.run(batches, microbatches * TOKENS)
        found.append([(start, end) for _, start, end in executor.trace])
    return found[1:]


def sleeping(unit: float) -> Callable[[Item], float]:
    """Seconds that each item sleeps."""
    costs = Costs()
    return lambda item: unit * costs.of(item)


def make_executor(axis: Axis, schedule: Schedule) -> Executor:
    """Of the fused path, for a model with a layer per stage."""
    cfg = ModelConfig(
        vocab_size=64, hidden_size=WIDTH, layers=schedule.stages, heads=2, kv_heads=1, ffn_size=8
    )
    with torch.device("meta"):
        model = Llama(cfg)
        model.layers = nn.ModuleList(Line() for _ in model.layers)
    sharding.attach(model)
    if schedule.vocabulary:
        vocab_parallel.parallelize(model, axis, "fused", ALGORITHM[schedule.vocabulary])
    part = split(model, axis, schedule, [1] * schedule.stages)
    sharding.materialise(part, 0, initial_value)
    for parameter in part.parameters():
        parameter.grad = torch.zeros_like(parameter)
    stages = {int(number): stage for number, stage in part.stages.items()}
    words = Words(part.embed, part.head, axis, schedule) if schedule.vocabulary else None
    alone = dict.fromkeys(stages, NoReplicas())
    return FusedExecutor(stages, schedule, axis, alone, words)
