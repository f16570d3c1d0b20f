"""Cut a model into pipeline stages: consecutive layers, of which a rank holds one run or several.

Idea    A stage is a module of its own: it takes what the stage before gives. What ends up on two
        ranks is a copy on each, whose gradients add up: a tied embedding (first and last stage),
        and all parameters of DualPipe, where ranks r and p-1-r hold the same stages.
Dims    as in pipeline_parallel.py
Read    Stage -> split -> copies
Tests   tests/test_pipeline_parallel.py
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from picotron_lab import sharding
from picotron_lab.comm import Axis
from picotron_lab.model import Llama, rotary_angles
from picotron_lab.schedules.actions import Schedule


class Stage(nn.Module):
    """Consecutive layers of a model; the first stage also embeds, the last one has norm and head.

    x  [B, T] tokens for the first stage, else [B, T, D]; gives [B, T, D], or what the head gives:
       the sum of token losses, without labels logits [B, T, V]
    """

    def __init__(self, model: Llama, layers: range, first: bool, last: bool):
        super().__init__()
        self.cfg, self.sequence_parts = model.cfg, 1
        self.embed = model.embed if first else None
        self.embed_dropout = model.embed_dropout if first else None
        self.layers = nn.ModuleDict({str(i): model.layers[i] for i in layers})
        self.norm = model.norm if last else None
        self.head = model.head if last else None

    def forward(self, x: Tensor, labels_BT: Tensor | None, where: Any) -> Tensor:
        if self.embed is not None:
            x = self.embed(x)
        x_BTD = x if self.embed_dropout is None else self.embed_dropout(x, where)
        angles = rotary_angles(where.positions_T, self.cfg.head_width, self.cfg.rope_theta)
        for layer in self.layers.values():
            x_BTD = layer(x_BTD, angles, where)
        if self.norm is not None:
            x_BTD = self.norm(x_BTD)
        return x_BTD if self.head is None else self.head(x_BTD, labels_BT)

    def boundary(self, tokens_BT: Tensor) -> Tensor:
        """A tensor of the shape, dtype and device of what flows between stages; without memory."""
        B, T = tokens_BT.shape
        one = next(self.parameters()).detach().new_empty(1)
        return one.expand(B, T // self.sequence_parts, self.cfg.hidden_size)


class Part(nn.Module):
    """What one rank holds of a model that is cut into stages.

    stages       by their numbers
    embed, head  this rank's words, where the vocabulary is split over the stages' ranks, else None
    axes         over which copies of a parameter lie on two ranks, by name
    """

    def __init__(self, stages: dict[int, Stage], axes: dict[str, Axis]):
        super().__init__()
        self.stages = nn.ModuleDict({str(number): stage for number, stage in stages.items()})
        self.embed, self.head, self.axes = None, None, axes

    def shared(self) -> list[nn.Parameter]:
        """Parameters of several stages, tied copies on two ranks, and the words': complete when all
        else is. Not DualPipe's copies: a stage's last backward completes this rank's part."""
        users = Counter(p for stage in self.stages.values() for p in stage.parameters())
        return [p for p in self.parameters() if users[p] != 1 or "tie" in p.record.replicas]


def split(
    model: Llama, axis: Axis, schedule: Schedule, counts: Sequence[int], sequence_parts: int = 1
) -> Part:
    """This rank's part of a model on the meta device: the last change before weights are drawn.

    counts          layers of each stage
    sequence_parts  ranks that share a sequence out between layers (sequence parallelism)
    With a split vocabulary embedding and head belong to no stage. A tied embedding that two ranks
    use becomes a copy on each, and DualPipe has two of everything: gradients of copies are partial
    over the axes "tie" and "mirror".
    """
    last, ends = schedule.stages - 1, [sum(counts[:s]) for s in range(schedule.stages + 1)]
    stages = {}
    for s in sorted(schedule.placement[axis.rank]):  # the order in which copies add up
        stages[s] = Stage(model, range(ends[s], ends[s + 1]), s == 0, s == last)
        stages[s].sequence_parts = sequence_parts
        if schedule.vocabulary:
            stages[s].embed = stages[s].head = None
    part = Part(stages, copies(model, axis, schedule))
    if schedule.vocabulary:
        part.embed, part.head = model.embed, model.head
    return part


def copies(model: Llama, axis: Axis, schedule: Schedule) -> dict[str, Axis]:
    """The axes that join copies of parameters; the parameters' records say so."""
    p, ends = axis.size, {schedule.rank_of(0), schedule.rank_of(schedule.stages - 1)}
    if schedule.replicated:
        mirror = pair_up(axis, "mirror", [{r, p - 1 - r} for r in range(p // 2)])
        for parameter in model.parameters():
            sharding.add_axis(parameter, mirror, partial=True)
        return {"mirror": mirror}
    if model.cfg.tied and len(ends) == 2 and not schedule.vocabulary:
        tie = pair_up(axis, "tie", [ends])
        if axis.rank in ends:
            for weight in model.embed.parameters():  # of which there is one
                sharding.add_axis(weight, tie, partial=True)
        return {"tie": tie}
    return {}


def pair_up(axis: Axis, name: str, pairs: Sequence[set[int]]) -> Axis:
    """An axis that joins two ranks of `axis` each, and leaves the others alone."""
    alone = set(range(axis.size)) - set().union(*pairs)
    groups = [*map(sorted, pairs), *([rank] for rank in sorted(alone))]
    return axis.split(name, [[axis.ranks[rank] for rank in group] for group in groups])
