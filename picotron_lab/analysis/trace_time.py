"""Where the time of a step goes: a recorded trace, read as a table of time by category.

Idea    profile.py records what a rank does as nested events, each with a start and a duration. What
        an operation is counted as follows from its name and from the named range around it; an
        operation of backward belongs where its forward was (torch gives both one sequence number).
CPU     Each moment of the rank's thread counts for the innermost event. idle: no operation runs, so
        it is Python's time. communication exposed: the time inside a call to other ranks, which
        includes waiting until they have come
CUDA    Each moment counts for the kernel that runs; of several, for the one that began first, and
        for communication only if nothing else runs. idle: no kernel of this rank runs
Sum     of all categories: the time of the step, exactly
matmul  every matrix product outside attention and optimizer, that of the head too
Source  events as torch.profiler.profile.export_chrome_trace writes them; times in microseconds
Read    time_by_category -> Walk -> busy;  show, name_ranks        Tests  tests/test_profile.py
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

MATMUL, ATTENTION, POINTWISE, LOSS, OPTIMIZER, COMMUNICATION, IDLE = CATEGORIES = (
    "matmul", "attention", "norm and pointwise", "loss", "optimizer", "communication exposed",
    "idle",
)  # fmt: skip
WORDS = {  # that the name of a range begins with
    "comm": COMMUNICATION, "optimizer": OPTIMIZER, "attention": ATTENTION, "loss": LOSS,
}  # fmt: skip
PASSES = re.compile(r"[ST]\.\d")  # of a split vocabulary
OPERATIONS = {
    COMMUNICATION: re.compile(r"^(nccl|gloo|c10d)\b|^record_param_comms"),
    ATTENTION: re.compile(r"scaled_dot_product|(flash|efficient|cudnn)_attention", re.I),
    LOSS: re.compile(r"cross_?entropy|nll_loss|log_softmax", re.I),
}
PRODUCT = re.compile(
    r"(?:^|::|: )_?(linear|matmul|b?mm|b?addb?mm|grouped_mm|scaled_mm|einsum)_?(Backward\d*)?$",
    re.I,
)
STEP = re.compile(r"rank (\d+) step (\d+)$")
OPERATION, RANGE, LAUNCH = ("cpu_op",), ("user_annotation",), ("cuda_runtime", "cuda_driver")
KERNEL = ("kernel", "gpu_memcpy", "gpu_memset")
SHOWN = 8  # ranks, beside their mean
Event = dict[str, Any]
Segment = tuple[float, float, str]  # start, end, category


class Step(NamedTuple):
    """One step of one rank, by its thread."""

    rank: int
    thread: tuple
    start: float
    end: float


class Frame(NamedTuple):
    """An event under way: what its own time counts as, and the range that it lies in."""

    end: float
    region: str
    category: str


def step_name(rank: int, step: int) -> str:
    """The name of the range around one step of a rank."""
    return f"rank {rank} step {step}"


def steps_of(events: Iterable[Event]) -> list[Step]:
    """The steps of all ranks that were recorded."""
    found = []
    for event in events:
        match = STEP.match(event["name"]) if event.get("cat") in RANGE else None
        if match:
            start, end = event["ts"], event["ts"] + event["dur"]
            found.append(Step(int(match[1]), _thread(event), start, end))
    return found


def _thread(event: Event) -> tuple:
    return event["pid"], event["tid"]


# ---- one thread


class Walk:
    """Goes through the events of a thread in order.

    segments   its time, in pieces of one category
    launched   correlation number of each kernel that it started -> category
    regions    sequence number of each operation of forward -> region; begins as those of the
               thread in which forward ran, if that is another
    """

    def __init__(self, regions: dict[int, str] | None = None) -> None:
        self.segments: list[Segment] = []
        self.launched: dict[int, str] = {}
        self.regions = dict(regions or {})
        self._stack: list[Frame] = []
        self._now = -math.inf

    def through(self, events: Iterable[Event]) -> "Walk":
        """See all of these events; returns itself."""
        for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
            self._go_to(event["ts"])
            above = self._stack[-1] if self._stack else Frame(math.inf, "", IDLE)
            self._stack.append(self._enter(event, above))
        self._go_to(math.inf)
        return self

    def _enter(self, event: Event, above: Frame) -> Frame:
        end, details = min(event["ts"] + event["dur"], above.end), event.get("args", {})
        number = details.get("Sequence number")
        if event["cat"] in RANGE:
            region = _region_of_range(event["name"]) or above.region
            known = region in (COMMUNICATION, OPTIMIZER)
            return Frame(end, region, region if known else IDLE)
        region = next((r for r, name in OPERATIONS.items() if name.search(event["name"])), "")
        if not region and details.get("Fwd thread id"):  # an operation of backward
            region = self.regions.get(number, "")
        region = region or above.region
        if number is not None and not details.get("Fwd thread id"):
            self.regions[number] = region  # the last of those with a number has the backward
        category = _category(event["name"], region, above)
        if event["cat"] in LAUNCH and "correlation" in details:
            self.launched[details["correlation"]] = category
        return Frame(end, region, category)

    def _go_to(self, time: float) -> None:
        """Let the time pass; what ends on the way is left."""
        while self._stack and self._stack[-1].end <= time:
            self._spend(self._stack[-1].end)
            self._stack.pop()
        self._spend(time)

    def _spend(self, time: float) -> None:
        if self._stack and time > self._now:
            self.segments.append((self._now, time, self._stack[-1].category))
        self._now = max(self._now, time)


def _region_of_range(name: str) -> str:
    if PASSES.match(name):
        return LOSS
    return WORDS.get(name.split(" ")[0], "")


def _category(name: str, region: str, above: Frame) -> str:
    if region in (COMMUNICATION, OPTIMIZER, ATTENTION):
        return region
    if above.category == MATMUL or PRODUCT.search(name):
        return MATMUL
    return region or POINTWISE


# ---- a rank


def time_by_category(events: Sequence[Event]) -> dict[int, list[float]]:
    """{rank: seconds of a step by category, in the order of CATEGORIES}: means over its steps."""
    steps = steps_of(events)
    threads: dict[tuple, list[Event]] = {}
    for event in events:
        if event.get("cat") in OPERATION + RANGE + LAUNCH:
            threads.setdefault(_thread(event), []).append(event)
    homes = {step.rank: step.thread for step in steps}
    found = {}
    for rank, home in sorted(homes.items()):
        walk = Walk().through(threads[home])
        launched = dict(walk.launched)
        if len(homes) == 1:  # backward on a GPU has threads of its own
            others = [thread for thread in threads if thread != home]
            for thread in others:
                launched |= Walk(walk.regions).through(threads[thread]).launched
        segments = kernels(events, launched) or walk.segments
        mine = [step for step in steps if step.rank == rank]
        found[rank] = _mean([busy(segments, step.start, step.end) for step in mine])
    return found


def kernels(events: Iterable[Event], launched: dict[int, str]) -> list[Segment]:
    """What ran on the GPU for the rank that launched it."""
    found = []
    for event in events:
        number = event.get("args", {}).get("correlation")
        if event.get("cat") in KERNEL and number in launched:
            category = COMMUNICATION if "nccl" in event["name"].lower() else launched[number]
            found.append((event["ts"], event["ts"] + event["dur"], category))
    return found


def busy(segments: Iterable[Segment], start: float, end: float) -> list[float]:
    """Seconds between two moments by category, each moment counted once (see CPU, CUDA above)."""
    inside = [(max(a, start), min(b, end), c) for a, b, c in segments if a < end and b > start]
    inside.sort()
    # at one moment what ends comes before what begins
    points = [(a, 1, i) for i, (a, _, _) in enumerate(inside)]
    points += [(b, 0, i) for i, (_, b, _) in enumerate(inside)]
    total, active, now = dict.fromkeys(CATEGORIES, 0.0), {}, start
    for time, begins, i in [*sorted(points), (end, 0, None)]:
        names = [c for c in active.values() if c != COMMUNICATION] or [*active.values(), IDLE]
        total[names[0]] += time - now
        now = time
        if begins:
            active[i] = inside[i][2]
        else:
            active.pop(i, None)
    return [total[category] / 1e6 for category in CATEGORIES]


def _mean(rows: Sequence[Sequence[float]]) -> list[float]:
    return [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]


# ---- what people see


def show(times: dict[int, Sequence[float]]) -> str:
    """A table: milliseconds of a step by category, of each rank and as the mean of all."""
    ranks = list(times)[:SHOWN]
    mean = _mean(list(times.values()))
    header = [*(f"rank {rank}" for rank in ranks), "mean", "share"]
    lines = [f"{'ms per step':22}" + "".join(f"{word:>9}" for word in header)]
    whole = math.fsum(mean)
    for i, category in enumerate(CATEGORIES):
        row = [times[rank][i] for rank in ranks] + [mean[i]]
        share = mean[i] / whole if whole else 0.0
        lines.append(_line(category, row) + f"{share:9.1%}")
    sums = [math.fsum(times[rank]) for rank in ranks] + [whole]
    lines.append(_line("step", sums))
    if len(times) > SHOWN:
        lines.append(f"(the first {SHOWN} of {len(times)} ranks; the mean is of all)")
    return "\n".join(lines)


def _line(name: str, seconds: Iterable[float]) -> str:
    return f"{name:22}" + "".join(f"{1e3 * s:9.2f}" for s in seconds)


def name_ranks(events: Iterable[Event]) -> list[Event]:
    """The events, with the threads of ranks called by their rank, in order."""
    events = list(events)
    ranks = {step.thread: step.rank for step in steps_of(events)}
    replaced = ("thread_name", "thread_sort_index")
    kept = [
        event for event in events
        if event["name"] not in replaced or _thread(event) not in ranks
    ]  # fmt: skip
    for (process, thread), rank in ranks.items():
        where = {"ph": "M", "pid": process, "tid": thread}
        kept.append({"name": "thread_name", "args": {"name": f"rank {rank}"}} | where)
        kept.append({"name": "thread_sort_index", "args": {"sort_index": rank}} | where)
    return kept
