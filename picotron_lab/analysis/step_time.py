"""How long a training step takes on a cluster that one does not have: a prediction, with its parts.

Idea     A stage's F, B and W take as long as its layers do (layer_time.py); the schedule says who
         waits for whom, and the simulator how long. Around it: gradients are reduced, the
         optimizer steps, weights are gathered. Every second of the busiest rank belongs to a part,
         and the largest part is what to work on.
Hidden   Data parallelism sends during the backward pass of the last micro-batch; ZeRO-2 during
         those of all; ZeRO-3 gathers a unit while the one before computes. What does not fit under
         `overlap` of the computing in that time, which experts and the rest share, is waited for.
         ZeRO-1 and -2 wait for all of the stepped weights.
Between  stages an activation takes its time to travel, and no rank is busy with it.
Not      ranks that come late, allocation, data loading, checkpoints; networks whose upper levels
         are thin; small messages once a step (norm, loss, gradients of tied or shared weights); the
         sum of gradients of DualPipe's two copies
MFU      useful operations (cost.py: 6 N + 12 L H C T) per second, of the peak; HFU counts what is
         recomputed as well
Units    seconds
Read     StepTime -> predict -> stage_passes -> replicas -> _optimizer
Tests    tests/test_step_time.py; beside published measurements: benchmarks/published.py
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from picotron_lab.analysis import cost
from picotron_lab.analysis.hardware import Hardware
from picotron_lab.analysis.layer_time import (
    CONSTANTS,
    Constants,
    Parts,
    Passes,
    Place,
    dense_parameters,
    embedding,
    expert_parameters,
    head,
    layer,
)
from picotron_lab.checks import check_run, layers_of, schedule_of
from picotron_lab.config import MeshConfig, ModelConfig, TrainConfig, require
from picotron_lab.precision import DTYPES
from picotron_lab.schedules.actions import VOCABULARY, Schedule, parts
from picotron_lab.schedules.costs import Costs
from picotron_lab.schedules.simulate import INTERLACED, simulate

BUBBLE, OPTIMIZER = "bubble", "optimizer"
COMPUTE = ("matmuls", "attention", "memory", "kernels")


@dataclass(frozen=True)
class StepTime:
    """A predicted step; `parts` are those of the busiest rank and add up to `seconds`.

    parts     matmuls, attention, memory, kernels; tp, cp, ep, replica, pp: messages that nothing
              hides; bubble; optimizer
    useful, done   operations per step of all ranks: of the model, and with what is recomputed
    """

    parts: dict[str, float]
    tokens: int
    ranks: int
    peak: float  # FLOP/s of one rank
    useful: float
    done: float
    schedule: Schedule = field(repr=False)

    @property
    def seconds(self) -> float:
        """The time of the step."""
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks."""
        return self.tokens / self.seconds

    @property
    def tokens_per_second_per_rank(self) -> float:
        """Of one GPU."""
        return self.tokens_per_second / self.ranks

    @property
    def mfu(self) -> float:
        """Share of the peak that useful operations take."""
        return self.useful / (self.seconds * self.peak * self.ranks)

    @property
    def hfu(self) -> float:
        """Share of the peak that all operations take, recomputed ones too."""
        return self.done / (self.seconds * self.peak * self.ranks)

    @property
    def bubble(self) -> float:
        """Share of the step in which the busiest rank of the pipeline waits for others."""
        return self.parts[BUBBLE] / self.seconds

    @property
    def exposed(self) -> dict[str, float]:
        """Seconds of each axis's messages that nothing hides."""
        known = (*COMPUTE, BUBBLE, OPTIMIZER)
        return {name: time for name, time in self.parts.items() if name not in known}

    @property
    def bottleneck(self) -> str:
        """The largest part."""
        return max(self.parts, key=self.parts.__getitem__)


def predict(
    model: ModelConfig,
    mesh: MeshConfig,
    cfg: TrainConfig,
    hardware: Hardware,
    constants: Constants = CONSTANTS,
) -> StepTime:
    """The time of one step. Raises ConfigError for a run that cannot be."""
    check_run(model, mesh, cfg)
    _check(model, mesh)
    at = Place(model, mesh, cfg, hardware, constants)
    schedule = schedule_of(mesh, cfg)
    counts = layers_of(model, mesh, cfg)
    stages, shared = stage_passes(at, schedule, counts), _shared(at, schedule)
    line = simulate(schedule, _costs(at, stages, shared))
    busiest, work = max(
        (_work(schedule, rank, stages, shared) for rank in range(schedule.ranks)),
        key=lambda found: found[1].total(),
    )
    found = Parts(work)
    found[BUBBLE] = max(0.0, line.makespan - work.total())
    own = held(at, schedule, busiest, counts)
    backward = sum(_computing(stages[s][k]) for s in schedule.placement[busiest] for k in "BW")
    exposed, stepped = replicas(at, own, backward)
    found["replica"] += exposed
    found[OPTIMIZER] = stepped
    flops = cost.flops_per_token(model, cfg.sequence_length)
    tokens = cfg.global_batch_size * cfg.sequence_length
    layers = cost.flops_per_token(replace(model, vocab_size=0), cfg.sequence_length)
    done = flops + (layers / 3 if cfg.recompute == "full" else 0)  # their forward, once more
    return StepTime(
        dict(found), tokens, mesh.size, at.peak(), flops * tokens, done * tokens, schedule
    )


def _check(model: ModelConfig, mesh: MeshConfig) -> None:
    require(
        model.vocab_size > 0,
        f"--vocab-size {model.vocab_size} must be known to tell the time of the head; try "
        "--vocab-size 32000.",
    )
    require(
        mesh.token_slices == "1",
        f"--token-slices {mesh.token_slices}: the time of slices of sequences is not predicted; "
        "leave it out.",
    )


# ---- stages


def stage_passes(at: Place, schedule: Schedule, counts: Sequence[int]) -> list[Passes]:
    """Seconds of F, B and W of one micro-batch, by part, for every stage of so many layers."""
    one = layer(at)
    if at.mesh.zero == 3:
        _gather_units(
            at, one, {"replica": dense_parameters(at), "expert_replica": expert_parameters(at)}
        )
    found = [{kind: _times(each, n) for kind, each in one.items()} for n in counts]
    if schedule.vocabulary:
        return found
    ends = [(0, embedding(at)), (-1, head(at))]
    if at.mesh.zero == 3:
        for _, passes in ends:
            words = at.model.vocab_size * at.model.hidden_size / at.mesh.tp
            _gather_units(at, passes, {"replica": words})
    for stage, passes in ends:
        for kind, more in passes.items():
            found[stage][kind].update(more)
    return found


def _shared(at: Place, schedule: Schedule) -> dict[str, Parts]:
    """Seconds of vocabulary passes, which all pipeline ranks share."""
    if not schedule.vocabulary:
        return {}
    out, words = head(at, at.mesh.pp), embedding(at, at.mesh.pp)
    early = schedule.vocabulary in (2, INTERLACED)  # whether the input's gradient is computed in S
    first = {"S": out["F"] + out["B"], "T": out["W"]}
    second = {"S": out["F"], "T": out["B"] + out["W"]}
    return (first if early else second) | {"IF": words["F"], "IB": words["B"] + words["W"]}


def _costs(at: Place, stages: list[Passes], shared: dict[str, Parts]) -> Costs:
    """What the simulator needs: totals."""
    factors = tuple(tuple(passes[kind].total() for kind in "FBW") for passes in stages)
    seconds = {kind: each.total() for kind, each in shared.items()}
    size = at.stream / (at.mesh.tp if at.mesh.sequence_parallel else 1)
    transfer = at.message("send", size, "pp") if at.mesh.pp > 1 else 0.0
    barrier = at.message("all_reduce", at.stream, "pp") if shared else 0.0
    return Costs(**seconds, transfer=transfer, barrier=barrier, factors=factors)


def _work(
    schedule: Schedule, rank: int, stages: list[Passes], shared: dict[str, Parts]
) -> tuple[int, Parts]:
    """(rank, seconds of all it does, by part)."""
    actions = (action for item in schedule.lists[rank] for action in parts(item))
    counts = Counter((action.kind, action.stage) for action in actions)
    total = Parts()
    for (kind, stage), times in counts.items():
        for single in ("B", "W") if kind == "BW" else (kind,):
            passes = shared if kind in VOCABULARY else stages[stage]
            total.update(_times(passes[single], times))
    return rank, total


def _times(each: Parts, times: float) -> Parts:
    return Parts({name: seconds * times for name, seconds in each.items()})


# ---- replicas


def _gather_units(at: Place, passes: Passes, sizes: dict[str, float]) -> None:
    """ZeRO-3: a unit's weights are gathered for F and again for B, its gradients reduced.

    sizes   parameters of the unit by axis; the messages of all axes hide under the same computing
    """
    gather = sum(at.message("all_gather", at.element * n, axis) for axis, n in sizes.items())
    reduce = sum(at.message("reduce_scatter", wire(at) * n, axis) for axis, n in sizes.items())
    backward = _computing(passes["B"]) + _computing(passes["W"])
    passes["F"]["replica"] += at.left(gather, _computing(passes["F"]))
    passes["B"]["replica"] += at.left(gather + reduce, backward)


def _computing(each: Parts) -> float:
    """Seconds of a pass in which something is computed, and nothing waited for."""
    return sum(each[name] for name in COMPUTE)


def wire(at: Place) -> int:
    """Bytes of a gradient on its way to other replicas."""
    return DTYPES[at.cfg.reduce_dtype].itemsize if at.cfg.reduce_dtype else at.wide


def held(at: Place, schedule: Schedule, rank: int, counts: Sequence[int]) -> dict[str, float]:
    """Parameters of a pipeline rank, before ZeRO cuts them, by the axis that sums gradients."""
    layers = sum(counts[stage] for stage in schedule.placement[rank])
    words = at.model.vocab_size * at.model.hidden_size / at.mesh.tp
    ends = [stage for stage in schedule.placement[rank] if stage in (0, schedule.stages - 1)]
    if schedule.stages == 1:
        ends = [0] if at.model.tied else [0, 0]
    vocabulary = 2 * words / at.mesh.pp if schedule.vocabulary else words * len(ends)
    norm = at.model.hidden_size if schedule.stages - 1 in ends or schedule.stages == 1 else 0
    return {
        "replica": layers * dense_parameters(at) + vocabulary + norm,
        "expert_replica": layers * expert_parameters(at),
    }


def replicas(at: Place, own: dict[str, float], backward: float) -> tuple[float, float]:
    """(seconds of data-parallel messages that nothing hides, seconds of the optimizer).

    own       what `held` says
    backward  seconds that one micro-batch's backward computes on the stages of the rank: messages
              of all axes together hide under it
    """
    stage, gradients, weights, stepped = at.mesh.zero, 0.0, 0.0, 0.0
    for axis, size in own.items():
        sums = "reduce_scatter" if stage else "all_reduce"
        gradients += at.message(sums, wire(at) * size, axis)
        weights += at.message("all_gather", at.element * size, axis)
        stepped += size / (cost.axis_size(at.mesh, axis) if stage else 1)
    rounds = {0: 1, 1: 1, 2: at.rounds, 3: 0}[stage]  # stage 3 reduces unit by unit, see above
    waited = rounds * at.left(gradients, backward) + (weights if stage in (1, 2) else 0.0)
    return waited, _optimizer(at, stepped)


def _optimizer(at: Place, parameters: float) -> float:
    """Seconds of norm, clipping and the optimizer, which memory bounds."""
    passes = 1.0 if at.fused else 3.0  # of separate operators over all parameters
    rate = at.hardware.memory_bandwidth * at.constants.copies
    return passes * stepped_bytes(at) * parameters / rate


def stepped_bytes(at: Place) -> int:
    """Bytes that an update moves for a parameter, g: bytes of a gradient that adds up.

    norm g; scaling gradients 2 g; the step: gradient g, master weight 2 g; AdamW's moments 4 g;
    narrow weights e. bfloat16: 42 with AdamW, 26 with SGD
    """
    moments = 4 if at.cfg.optimizer == "adamw" else 0
    return (6 + moments) * at.wide + (at.element if at.element < at.wide else 0)
