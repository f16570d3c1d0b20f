"""How long a step takes, told from a dry run: what was traced, at the rates of a device.

Idea     dryrun.py watches what actions compute, move and send. Each takes as long as a device
         needs for it; the simulator plays the schedule with these times, and around it gradients
         are summed and the optimizer steps. So the step's time follows from the program itself
Beside   step_time.py, which has closed forms and no program. The constants are its own, but for
           memory     here every operator's reads and writes, at the rate of streams (`copies`);
                      there the least traffic, at a rate fitted to programs that move more
           kernels    here every operator that moves bytes; there a count by hand
           messages   here those that an action does not wait for hide under its matmuls, those of
                      cp under its attention, of replicas under all that it computes; there a rule
                      for each technique
           attention  of a plain path is matmuls here
Stages   of as many layers are alike, but for the first and the last: one of each is traced, with
         few micro-batches. What the first and the last micro-batch do besides counts in the mean
Not      as in step_time.py; slices are taken for equally long; of replicas, what the rank sends
         that computes most. Where dryrun.py takes a CPU's way (experts, float64, no triton), its
         many small operators are timed: small experts seem slower than they are
Units    seconds, bytes
Read     traced_ranks -> traced -> from_trace -> pass_of
Tests    tests/test_dryrun_time.py
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from picotron_lab.analysis import cost, dryrun
from picotron_lab.analysis.dryrun import UNDER_WAY, Report, Work
from picotron_lab.analysis.hardware import Hardware
from picotron_lab.analysis.layer_time import ATTENTION, KERNELS, MATMULS, MEMORY, Parts, Place
from picotron_lab.analysis.step_time import BUBBLE, COMPUTE, OPTIMIZER, stepped_bytes
from picotron_lab.checks import layers_of, schedule_of, slices_of
from picotron_lab.config import MeshConfig, ModelConfig, TrainConfig
from picotron_lab.mesh import grid
from picotron_lab.schedules.actions import VOCABULARY, Schedule, parts
from picotron_lab.schedules.costs import Costs
from picotron_lab.schedules.simulate import Timeline, simulate

REPLICAS = ("dp", "replica", "expert_replica")
KNOWN = (*REPLICAS, "tp", "cp", "ep", "pp")
Kind = tuple[int, bool, bool]  # layers, whether the first stage, whether the last


@dataclass(frozen=True)
class TracedTime:
    """A step; `parts` are those of the busiest pipeline rank and add up to `seconds`."""

    parts: dict[str, float]
    line: Timeline
    tokens_per_second: float
    mfu: float

    @property
    def seconds(self) -> float:
        """The time of the step."""
        return sum(self.parts.values())

    @property
    def bubble(self) -> float:
        """Share of the step in which the busiest rank waits for others."""
        return self.parts[BUBBLE] / self.seconds

    @property
    def exposed(self) -> dict[str, float]:
        """Seconds of each axis's messages that nothing hides."""
        known = (*COMPUTE, BUBBLE, OPTIMIZER)
        return {name: time for name, time in self.parts.items() if name not in known}


# ---- which ranks to trace


def traced_ranks(model: ModelConfig, mesh: MeshConfig, cfg: TrainConfig) -> list[int]:
    """First ranks of pipeline positions that together have a stage of every kind."""
    schedule = _schedule(mesh, cfg)
    kinds = _kinds(schedule, layers_of(model, mesh, cfg))
    found, missing = [], set(kinds)
    for place in (0, *range(schedule.ranks - 1, 0, -1)):  # the ends have most of them
        new = missing & {kinds[stage] for stage in schedule.placement[place]}
        if new:
            missing -= new
            found.append(int(grid(mesh.pp, mesh.dp, mesh.cp, mesh.tp)[place, 0, 0, 0]))
    return sorted(found)


def _schedule(mesh: MeshConfig, cfg: TrainConfig) -> Schedule:
    return schedule_of(mesh, cfg, len(slices_of(mesh, cfg) or (0,)))


def _kinds(schedule: Schedule, counts: Sequence[int]) -> list[Kind]:
    last = schedule.stages - 1
    return [(layers, stage == 0, stage == last) for stage, layers in enumerate(counts)]


def shorter(mesh: MeshConfig, cfg: TrainConfig) -> TrainConfig:
    """With micro-batches that are enough to see each action twice: 2 for each pipeline rank."""
    size = cfg.micro_batch_size * mesh.dp
    few = min(cfg.micro_batches(mesh.dp), 2 * mesh.pp)
    return replace(cfg, global_batch_size=few * size)


def traced(
    model: ModelConfig, mesh: MeshConfig, cfg: TrainConfig, reports: Sequence[Report]
) -> list[Report]:
    """`reports`, and what is missing of `traced_ranks`, of a shorter step."""
    done = {report.rank for report in reports}
    missing = [rank for rank in traced_ranks(model, mesh, cfg) if rank not in done]
    few = shorter(mesh, cfg)
    return [*reports, *(dryrun.dry_run(model, mesh, few, rank) for rank in missing)]


# ---- the time of a step


def from_trace(
    model: ModelConfig,
    mesh: MeshConfig,
    cfg: TrainConfig,
    device: Hardware,
    reports: Sequence[Report],
) -> TracedTime:
    """The step's time from `traced` reports; model.vocab_size must be known."""
    at = Place(model, mesh, cfg, device)
    schedule = _schedule(mesh, cfg)
    passes = _passes(at, reports)
    stages = _of_stages(schedule, _kinds(schedule, layers_of(model, mesh, cfg)), passes)
    costs = _costs(at, schedule, stages, passes, reports)
    line = simulate(schedule, costs)
    busiest, work = max(
        ((rank, _work(schedule, rank, stages, passes)) for rank in range(schedule.ranks)),
        key=lambda found: found[1].total(),
    )
    found = Parts(work)
    found[BUBBLE] = max(0.0, line.makespan - work.total())
    own = schedule.placement[busiest]
    backward = sum(_computing(stages[s][kind]) for s in own for kind in "BW")
    nearest = min(reports, key=lambda report: abs(report.stages[0] - own[0]))
    found["replica"] += _replicas(at, nearest, backward)
    found[OPTIMIZER] = optimizer(at, nearest.stepped)
    tokens = cfg.global_batch_size * cfg.sequence_length
    useful = cost.flops_per_token(model, cfg.sequence_length) * tokens
    seconds = found.total()
    return TracedTime(
        dict(found), line, tokens / seconds, useful / (seconds * at.peak() * mesh.size)
    )


def _passes(at: Place, reports: Sequence[Report]) -> dict[str, Parts]:
    """Seconds of one action, by its name in Report.works. Of ranks that share one, the mean."""
    works: dict[str, list[Work]] = {}
    for report in reports:
        for name, work in report.works.items():
            works.setdefault(name, []).append(work)
    found = {}
    for name, each in works.items():
        found[name] = Parts()
        for work in each:
            found[name].update(_times(pass_of(at, work), 1 / len(each)))
    return found


def pass_of(at: Place, work: Work) -> Parts:
    """Seconds of one of those actions, by part."""
    rate = at.hardware.memory_bandwidth * at.constants.copies
    found = Parts({
        MATMULS: at.matmul(work.matmuls / work.times),
        ATTENTION: work.attention / work.times / (at.peak() * at.constants.attention),
        MEMORY: work.moved / work.times / rate,
        KERNELS: work.operators / work.times * at.constants.kernel,
    })  # fmt: skip
    hides = {"tp": found[MATMULS], "cp": found[ATTENTION], "replica": _computing(found)}
    sent = {True: Parts(), False: Parts()}
    for axis, op, waits, calls, size in _messages(work):
        if axis in REPLICAS and at.mesh.zero != 3:
            continue  # they are summed after the last backward, or under it
        name = "replica" if axis in REPLICAS else axis
        sent[waits][name] += calls / work.times * at.message(op, size / calls, axis)
    for name in sent[True] | sent[False]:
        found[name] = sent[True][name] + at.left(sent[False][name], hides.get(name, 0.0))
    return found


def _messages(work: Work) -> Iterator[tuple[str, str, bool, int, int]]:
    """Axis, operation, whether the action waits, calls, bytes; those alone that take time."""
    for name, of_axis in work.messages.items():
        axis = name.partition(".")[0]
        for told, (calls, size) in of_axis.items():
            op, _, under_way = told.partition(", ")
            if axis in KNOWN and size and op not in ("recv", "barrier"):
                yield axis, op, under_way != UNDER_WAY, calls, size


def _of_stages(
    schedule: Schedule, kinds: Sequence[Kind], passes: dict[str, Parts]
) -> list[dict[str, Parts]]:
    """F, B and W of every stage; where B and W are one action, it is B, and W takes nothing."""
    own: dict[Kind, dict[str, Parts]] = {}
    for stage, kind in enumerate(kinds):
        if f"F{stage}" in passes:
            both = passes.get(f"BW{stage}", Parts())
            own[kind] = {
                "F": passes[f"F{stage}"],
                "B": passes.get(f"B{stage}", both),
                "W": passes.get(f"W{stage}", Parts()),
            }
    return [own[kind] for kind in kinds]


def _costs(
    at: Place,
    schedule: Schedule,
    stages: list[dict[str, Parts]],
    passes: dict[str, Parts],
    reports: Sequence[Report],
) -> Costs:
    """What the simulator needs: totals."""
    n = schedule.slices
    factors = tuple(tuple(each[kind].total() for kind in "FBW") for each in stages)
    shared = {kind: passes[kind].total() for kind in VOCABULARY if kind in passes}
    sent = [
        size / calls
        for report in reports
        for axis in ("pp.F", "pp.B")
        for op, (calls, size) in report.traffic.get(axis, {}).items()
        if op == "send"
    ]
    transfer = at.message("send", max(sent), "pp") if sent else 0.0
    barrier = at.message("all_reduce", at.stream / n, "pp") if shared else 0.0
    return Costs(**shared, transfer=transfer, barrier=barrier, factors=factors)


def _work(
    schedule: Schedule, rank: int, stages: list[dict[str, Parts]], passes: dict[str, Parts]
) -> Parts:
    """Seconds of all that a rank does, by part."""
    actions = (action for item in schedule.lists[rank] for action in parts(item))
    total = Parts()
    for (kind, stage), times in Counter((a.kind, a.stage) for a in actions).items():
        for single in ("B", "W") if kind == "BW" else (kind,):
            one = passes[kind] if kind in VOCABULARY else stages[stage][single]
            total.update(_times(one, times))
    return total


def _times(each: Parts, times: float) -> Parts:
    return Parts({name: seconds * times for name, seconds in each.items()})


def _computing(each: Parts) -> float:
    """Seconds of a pass in which something is computed, and nothing waited for."""
    return sum(each[name] for name in COMPUTE)


# ---- replicas


def _replicas(at: Place, report: Report, backward: float) -> float:
    """Seconds of messages between replicas that nothing hides: sums of gradients hide under the
    last backward, of ZeRO-2 under each one; weights, gathered after the step, under nothing."""
    if at.mesh.zero == 3:
        return 0.0  # in the passes
    calls = [(a, op, *count) for a in REPLICAS for op, count in report.traffic.get(a, {}).items()]
    rounds = report.actions["F"] if at.mesh.zero == 2 else 1
    sums = _seconds(at, calls, lambda op: op != "all_gather")
    weights = _seconds(at, calls, lambda op: op == "all_gather")
    return rounds * at.left(sums / rounds, backward) + weights


def _seconds(at: Place, calls: list, wanted: Callable[[str], bool]) -> float:
    return sum(n * at.message(op, size / n, axis) for axis, op, n, size in calls if wanted(op))


def optimizer(at: Place, parameters: int) -> float:
    """Seconds of norm, clipping and the step, as in step_time.py: no trace has its kernel."""
    passes = 1.0 if at.fused else 3.0  # of separate operators over all parameters
    rate = at.hardware.memory_bandwidth * at.constants.copies
    return passes * stepped_bytes(at) * parameters / rate
