"""Where to cut a sequence, so that its slices pass fastest through a pipeline.

Source   TeraPipe, arXiv 2102.07988: sections 3.3 (tokens) and 3.4 (batch and tokens), and its code
Idea     Slices l_1 .. l_n of a sequence go one after the other through K stages that take the same
         time t_i = time(l_i, l_1 + .. + l_(i-1)) for slice i: later slices have more to attend to.
         The last stage ends at
             T = sum of t_i + (K-1) max of t_i
         for the longest slice sets the pace of filling and draining. Thin slices make its max
         small, but their sum large, since below some length a slice takes as long as a longer one.
Solved   The sum is a shortest path over places to cut, if the max is known: for a bound t_max
             S(i) = min over k of S(i-k) + time(k, i-k), where time(k, i-k) <= t_max
         Without that condition the recurrence is only the fastest way through one stage. T is the
         least S(L) + (K-1) t_max over all t_max that some slice takes; the search prunes them.
Dims     K stages  L tokens of a sequence  S work of a stage  F forward  B backward
Read     best_slices -> Paths -> search -> best_groups
Tests    tests/test_slicing.py
"""

import heapq
import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from picotron_lab.schedules.actions import ScheduleError

Time = Callable[[int, int], float]  # of l tokens after c others, on one stage
Times = Time | tuple[Time, Time]  # forward and backward at once, or apart
GroupTime = Callable[[int, int, int], float]  # of b sequences' slices of l tokens after c others
Group = tuple[int, tuple[int, ...]]  # how many sequences, and the slices into which all are cut
Limits = tuple[float, float]  # what a slice may take at most, forward and backward


class Plan(NamedTuple):
    """What the fastest way takes that keeps to some limits: no limit is exceeded."""

    work: float  # of one stage; inf: no slices keep to the limits
    peaks: Limits  # the longest slice, forward and backward
    groups: tuple[Group, ...]


def best_slices(
    length: int,
    stages: int,
    time: Times,
    granularity: int = 1,
    epsilon: float = 0.0,
    sequences: int = 1,
) -> tuple[tuple[int, ...], float]:
    """The slices (tokens each, from the first to the last) with the least latency, and that.

    time         seconds >= 0 that one stage needs for l tokens after c others. One function of
                 forward and backward together is exact where they are longest at the same slice,
                 as if backward took twice forward; else it says too little, and a pair of functions
                 is exact: sum(f + b) + (K-1)(max f + max b), all forwards before all backwards
    granularity  every slice but the last is a multiple of so many tokens
    epsilon      seconds; bounds less than this below one that is tried are left out, and the
                 latency is at most (K-1) epsilon above the least, for a pair 2(K-1) epsilon
    sequences    that follow each other, all cut alike: sequences * sum + (K-1) max
    Cost         (length / granularity)^2 / 2 times, and as many steps for each bound that is tried
    Raises       ScheduleError
    """
    _check(("length", length), ("stages", stages), ("granularity", granularity),
           ("sequences", sequences))  # fmt: skip
    if not epsilon >= 0:
        raise ScheduleError(f"epsilon {epsilon:g} is no time: give 0 or more, as epsilon=0.")
    paths = Paths(length, granularity, *_pair(time))

    def solve(limits: Limits) -> Plan:
        plan = paths.plan(1, limits)
        return plan._replace(work=sequences * plan.work)

    choices = tuple(_choices(values, epsilon) for values in paths.values())
    ((_, slices),) = search(choices, stages, solve).groups
    return slices, latency(slices, stages, time, sequences)


def latency(slices: Sequence[int], stages: int, time: Times, sequences: int = 1) -> float:
    """Seconds until a pipeline has finished: sequences * sum of t_i + (stages-1) max of t_i.

    time  one function, or a pair for forward and backward (see best_slices)
    """
    forward, backward = _pair(time)
    places = list(zip(slices, accumulate(slices, initial=0), strict=False))
    f, b = ([of(*place) for place in places] for of in (forward, backward))
    work = sum(x + y for x, y in zip(f, b, strict=True))
    return sequences * work + (stages - 1) * (max(f) + max(b))


def best_groups(
    batch: int, length: int, stages: int, time: GroupTime, granularity: int = 1
) -> tuple[list[Group], float]:
    """Groups of sequences, each cut into slices, with the least latency of all, and that.

    The groups stream through the pipeline, so it fills once: the sum over all slices of all groups
    + (K-1) max, which is what the paper's code minimises. Its text (section 3.4) adds up the
    latencies of the groups, as if the pipeline ran empty between them: an upper bound, whose least
    value is found with other groups.

    batch   sequences; time  seconds of b sequences' slices, l tokens each after c others
    Raises  ScheduleError
    """
    _check(("batch", batch), ("length", length), ("stages", stages), ("granularity", granularity))
    sizes = {}
    for size in range(1, batch + 1):
        sizes[size] = Paths(length, granularity, lambda l, c, b=size: time(b, l, c), _nothing)

    def solve(limits: Limits) -> Plan:
        plans = [paths.plan(size, limits) for size, paths in sizes.items()]
        return _fill(batch, plans)

    values = {value for paths in sizes.values() for value in paths.values()[0]}
    plan = search((sorted(values), [0.0]), stages, solve)
    return list(plan.groups), plan.work + (stages - 1) * plan.peaks[0]


def _fill(batch: int, plans: Sequence[Plan]) -> Plan:
    """The groups of 1, 2, .. sequences (plans) that make up the batch with the least work."""
    nothing, never = Plan(0.0, (0.0, 0.0), ()), Plan(math.inf, (0.0, 0.0), ())
    best = [nothing]
    for count in range(1, batch + 1):
        found = never
        for size, plan in enumerate(plans[:count], 1):
            rest = best[count - size]
            if rest.work + plan.work < found.work:
                peaks = tuple(map(max, rest.peaks, plan.peaks))
                found = Plan(rest.work + plan.work, peaks, rest.groups + plan.groups)
        best.append(found)
    return best[batch]


class Paths:
    """All ways to cut a sequence: paths over its places to cut, from 0 to its length."""

    def __init__(self, length: int, granularity: int, forward: Time, backward: Time) -> None:
        self.places = [*range(0, length, granularity), length]
        self.forward = [self._column(end, forward) for end in range(len(self.places))]
        self.backward = [self._column(end, backward) for end in range(len(self.places))]
        self.both = [
            [f + b for f, b in zip(*columns, strict=True)]
            for columns in zip(self.forward, self.backward, strict=True)
        ]

    def _column(self, end: int, time: Time) -> list[float]:
        """Times of the slices that end there, by their beginning."""
        stop = self.places[end]
        times = [time(stop - start, start) for start in self.places[:end]]
        for start, seconds in zip(self.places, times, strict=False):
            if not 0 <= seconds < math.inf:
                raise ScheduleError(
                    f"time({stop - start}, {start}) gives {seconds}, which is no time: give 0 or "
                    "more seconds for every slice."
                )
        return times

    def values(self) -> tuple[list[float], list[float]]:
        """All times that a slice may take, forward and backward, ascending."""
        sides = (self.forward, self.backward)
        return tuple(sorted({t for column in side for t in column}) for side in sides)

    def plan(self, size: int, limits: Limits) -> Plan:
        """The path of least work among slices that keep to the limits, for a group of that size."""
        most_f, most_b = limits
        work = [0.0]
        for f_column, b_column, both in zip(
            self.forward[1:], self.backward[1:], self.both[1:], strict=True
        ):
            slices = zip(work, both, f_column, b_column, strict=True)
            work.append(
                min(
                    (before + t for before, t, f, b in slices if f <= most_f and b <= most_b),
                    default=math.inf,
                )
            )
        return self._trace(size, limits, work)

    def _trace(self, size: int, limits: Limits, work: Sequence[float]) -> Plan:
        """Walk back from the end, along the slices that made each minimum."""
        end, slices, peaks = len(work) - 1, [], (0.0, 0.0)
        while end and work[-1] < math.inf:
            f_column, b_column, both = self.forward[end], self.backward[end], self.both[end]
            start = next(
                i
                for i in range(end)
                if f_column[i] <= limits[0] and b_column[i] <= limits[1]
                if work[i] + both[i] == work[end]
            )
            slices.append(self.places[end] - self.places[start])
            peaks = max(peaks[0], f_column[start]), max(peaks[1], b_column[start])
            end = start
        return Plan(work[-1], peaks, ((size, tuple(reversed(slices))),))


class Box(NamedTuple):
    """Choices of limits, low to high (indices); in a heap the most promising comes first."""

    bound: float  # no choice in it has a latency below this
    low: tuple[int, int]
    high: tuple[int, int]
    work: float  # under the limits of `high`; smaller limits cannot need less


def search(choices: tuple[Sequence[float], ...], stages: int, solve: Callable[..., Plan]) -> Plan:
    """The plan with the least work + (stages-1) peaks, over all limits (choices ascend).

    The work can only fall as limits rise. So of limits between two choices no plan can be better
    than the work under the upper + (stages-1) times the lower one; what could still be better is
    halved and looked at again. The paper goes through all limits from below instead, and stops when
    stages * t_max exceeds the best; both find the optimum.
    """

    def look(low: tuple[int, int], high: tuple[int, int], work: float) -> Box:
        least = sum(values[i] for values, i in zip(choices, low, strict=True))
        return Box(work + (stages - 1) * least, low, high, work)

    top = tuple(len(values) - 1 for values in choices)
    best = solve(_at(choices, top))
    least, boxes = best.work + (stages - 1) * sum(best.peaks), [look((0, 0), top, best.work)]
    while boxes and boxes[0].bound < least:
        _, low, high, work = heapq.heappop(boxes)
        below, above = _halve(choices, low, high)
        plan = solve(_at(choices, below))
        found = plan.work + (stages - 1) * sum(plan.peaks)
        if found < least:
            best, least = plan, found
        for box in (look(low, below, plan.work), look(above, high, work)):
            if box.bound < least:
                heapq.heappush(boxes, box)
    return best


def _halve(choices: tuple, low: tuple[int, int], high: tuple[int, int]) -> tuple[Any, Any]:
    """The upper corner of the lower half of a box, and the lower corner of the upper half."""
    gaps = [values[j] - values[i] for values, i, j in zip(choices, low, high, strict=True)]
    side = gaps.index(max(gaps))
    middle = (low[side] + high[side]) // 2
    below = tuple(middle if s == side else i for s, i in enumerate(high))
    return below, tuple(middle + 1 if s == side else i for s, i in enumerate(low))


def _at(choices: tuple, indices: tuple[int, int]) -> Limits:
    return tuple(values[i] for values, i in zip(choices, indices, strict=True))


def _choices(values: Sequence[float], epsilon: float) -> list[float]:
    """Leave out what is less than epsilon below a value that stays: from above, so that whatever
    keeps to a limit that is left out keeps to one that stays."""
    kept: list[float] = []
    for value in reversed(values):
        if not kept or kept[-1] - value >= epsilon:
            kept.append(value)
    return kept[::-1]


def _nothing(length: int, context: int) -> float:
    return 0.0


def _pair(time: Times) -> tuple[Time, Time]:
    """Forward and backward; of one function, all of it is forward."""
    return time if isinstance(time, tuple) else (time, _nothing)


def _check(*counts: tuple[str, int]) -> None:
    for name, value in counts:
        if value < 1:
            raise ScheduleError(f"{name} {value} leaves nothing to slice: give 1 or more.")
