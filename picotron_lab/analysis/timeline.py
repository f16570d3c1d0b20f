"""What a simulated step tells: makespan, bubbles, memory over time; as JSON and as a trace.

Two bubbles      makespan: from 0 to the last end, minus the work of the busiest rank
                 stage: the longest time that a rank waits between its own first start and last
                 end. ZB-H2 and ZB-V have none only by this one: their ranks start and end one after
                 the other, which helps if the optimizer's step does not wait for all of them
Two ratios       of a bubble to all the time, (p-1)/(m+p-1) for 1F1B with equal stages, or to the
                 time of the work alone, (p-1)/m. Papers use either and rarely say which
Two peaks        of activations held until W, which frees their last part, or only until B: the
                 truth lies between, as B frees what W does not need (`kept` says how much stays)
Units            times in those of the costs; activations in those of one stage and micro-batch
Dims             W and B in names are the actions, not sizes
"""

import json
from dataclasses import asdict, dataclass
from math import fsum
from operator import sub
from pathlib import Path
from typing import Any

from picotron_lab.schedules.actions import Pair, parts
from picotron_lab.schedules.simulate import Timeline, peaks

MICROSECONDS = 1000  # of a trace for one unit of the costs, which is shown as a millisecond


@dataclass(frozen=True)
class Metrics:
    """The numbers of a timeline; names and meanings are those of the JSON."""

    makespan: float
    bubble_makespan: float
    bubble_stage: float
    bubble_ratio: float  # bubble_makespan of the makespan
    bubble_ratio_of_work: float  # bubble_makespan of the busiest rank's work
    bubble_ratio_stage: float  # bubble_stage of the time from that rank's first start to last end
    peak_until_W: tuple[float, ...]  # per rank
    peak_until_B: tuple[float, ...]


def metrics(timeline: Timeline) -> Metrics:
    """Makespan, bubbles and peaks of a simulated step."""
    busy, spans = [], []
    for starts, ends in zip(timeline.starts, timeline.ends, strict=True):
        busy.append(fsum(map(sub, ends, starts)))
        spans.append(ends[-1] - starts[0] if ends else 0.0)
    bubble = timeline.makespan - max(busy)
    waits = [span - work for span, work in zip(spans, busy, strict=True)]
    stage = max(waits)
    return Metrics(
        makespan=timeline.makespan,
        bubble_makespan=bubble,
        bubble_stage=stage,
        bubble_ratio=_share(bubble, timeline.makespan),
        bubble_ratio_of_work=_share(bubble, max(busy)),
        bubble_ratio_stage=_share(stage, spans[waits.index(stage)]),
        peak_until_W=peaks(timeline.schedule),
        peak_until_B=peaks(timeline.schedule, kept=0.0),
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def activations(timeline: Timeline, rank: int, kept: float = 1.0) -> list[tuple[float, float]]:
    """What a rank holds from each moment on: (time, activations), in order.

    F adds 1 when it starts; when they end, B leaves the share `kept` of it, W and BW nothing.
    """
    held, curve = 0.0, {0.0: 0.0}  # of what happens at one moment the end counts
    unit = 1 / timeline.schedule.slices
    frees = {"B": 1.0 - kept, "W": kept, "BW": 1.0}
    times = zip(timeline.starts[rank], timeline.ends[rank], strict=True)
    for item, (start, end) in zip(timeline.schedule.lists[rank], times, strict=True):
        kinds = [action.kind for action in parts(item)]
        new = unit * kinds.count("F")
        freed = unit * sum(frees.get(kind, 0.0) for kind in kinds)
        if new:
            curve[start] = held + new
        if freed:
            curve[end] = held + new - freed
        held += new - freed
    return list(curve.items())


def as_dict(timeline: Timeline) -> dict[str, Any]:
    """The JSON of `run.py schedule --json`; every list has one entry per rank.

    order        actions as strings: F2.3 is the forward of stage 2 on micro-batch 3, likewise B, W,
                 BW; S.3, T.3, IF.3, IB.3 vocabulary passes; F2.3/1 slice 1; F0.4&BW7.1 a pair
    placement    stages of the rank;   starts, ends   times of its actions
    activations  [time, activations held from then on until W], in order
    and the fields of Metrics
    """
    schedule = timeline.schedule
    ranks = range(schedule.ranks)
    return {
        "schedule": schedule.name,
        "microbatches": schedule.microbatches,
        "order": [[str(item) for item in items] for items in schedule.lists],
        "placement": [list(stages) for stages in schedule.placement],
        **{name: _rounded(value) for name, value in asdict(metrics(timeline)).items()},
        "starts": _rounded(timeline.starts),
        "ends": _rounded(timeline.ends),
        "activations": [_rounded(activations(timeline, rank)) for rank in ranks],
    }


def _rounded(value: Any) -> Any:
    """Without the last digits, in which sums of times differ from what one would write."""
    return round(value, 9) if isinstance(value, float) else [_rounded(part) for part in value]


def trace(timeline: Timeline) -> dict[str, Any]:
    """Chrome trace events, which Perfetto opens: a process per rank, with what it holds."""
    events: list[dict[str, Any]] = []
    for rank, items in enumerate(timeline.schedule.lists):
        where = {"pid": rank, "tid": 0}
        events.append({"ph": "M", "name": "process_name", "args": {"name": f"rank {rank}"}} | where)
        times = zip(timeline.starts[rank], timeline.ends[rank], strict=True)
        for item, (start, end) in zip(items, times, strict=True):
            kind = "pair" if isinstance(item, Pair) else item.kind
            when = {"ts": start * MICROSECONDS, "dur": (end - start) * MICROSECONDS}
            events.append({"ph": "X", "name": str(item), "cat": kind} | when | where)
        for time, held in activations(timeline, rank):
            count = {"ph": "C", "name": "activations", "args": {"held": held}}
            events.append(count | {"ts": time * MICROSECONDS} | where)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_trace(timeline: Timeline, path: Path) -> None:
    """Write the trace to a file."""
    path.write_text(json.dumps(trace(timeline)), encoding="utf-8")
