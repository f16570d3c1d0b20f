"""When each action of a schedule starts and ends: event simulation of its lists.

Rule     a rank runs its list in order; an action starts once the rank is free and all that it
         needs (`needs.py`) is there. A result takes `transfer` to reach another rank, which keeps
         no rank busy; what all ranks compute together is there `barrier` after the last of them.
         Interlaced vocabulary passes start on all ranks at once
Checked  with measured times in, this rule gives the bubble rates of Zero Bubble's Table 5 to four
         digits, and the iteration times of vocabulary parallelism within 2 % (the tests show both)
Cost     a fixed time per action, because results are found by number: a stage's F (or B) of all
         micro-batches is a row, and what F s.i needs differs from what F s.0 needs only by i
"""

from collections.abc import Iterator
from dataclasses import dataclass

from picotron_lab.schedules.actions import (
    VOCABULARY,
    Action,
    Item,
    Pair,
    Schedule,
    ScheduleError,
    parts,
)
from picotron_lab.schedules.costs import Costs
from picotron_lab.schedules.needs import needs

INTERLACED = 3
EVERYWHERE, MISSING = -1, -2  # in the place of the rank that has a result


class Deadlock(ScheduleError):
    """Ranks that wait for each other, or for what nobody does."""


@dataclass(frozen=True)
class Timeline:
    """A simulated step: starts[rank][i] and ends[rank][i] of lists[rank][i], in units of costs."""

    schedule: Schedule
    costs: Costs
    starts: tuple[tuple[float, ...], ...]
    ends: tuple[tuple[float, ...], ...]

    @property
    def makespan(self) -> float:
        """From 0 until the last rank is done."""
        return max((ends[-1] for ends in self.ends if ends), default=0.0)

    @property
    def span(self) -> float:
        """The longest time between a rank's own first start and its last end."""
        pairs = zip(self.starts, self.ends, strict=True)
        return max((ends[-1] - starts[0] for starts, ends in pairs if starts), default=0.0)


def simulate(schedule: Schedule, costs: Costs = Costs()) -> Timeline:  # noqa: B008
    """Start and end of everything in the schedule.

    Raises  Deadlock, which names the ranks that cannot go on and what each waits for;
            ScheduleError if there are factors, but not one for every stage
    """
    run = Run(schedule, costs)
    run.all_ranks()
    stuck = list(run.stuck())
    if stuck:
        raise Deadlock(
            f"{schedule.name} cannot run to its end: {'; '.join(stuck)}: each of these must come "
            "before the action that waits for it."
        )
    return Timeline(schedule, costs, tuple(map(tuple, run.starts)), tuple(map(tuple, run.ends)))


def check_factors(costs: Costs, stages: int, slices: int = 1) -> None:
    """Refuse factors that are not one for every stage, or for every slice."""
    pairs = (costs.factors, stages, "stages"), (costs.slices, slices, "slices")
    for factors, count, what in pairs:
        if factors and len(factors) != count:
            raise ScheduleError(
                f"{len(factors)} factors do not fit {count} {what}: give one for each, or none."
            )


@dataclass(frozen=True, slots=True)
class Sort:
    """What all actions share that differ in the micro-batch only."""

    needs: tuple[int, ...]  # rows of the results that it waits for
    gives: int  # row of its own; -1: nobody waits for it
    everyone: bool  # all ranks do it together
    meets: int  # row of the moments when all ranks have come to it; -1: it does not wait for them
    duration: float


class Run:
    """How far each rank has come, and which results are there."""

    def __init__(self, schedule: Schedule, costs: Costs) -> None:
        check_factors(costs, schedule.stages, schedule.slices)
        self.schedule, self.costs = schedule, costs
        self.starts: list[list[float]] = [[] for _ in schedule.lists]
        self.ends: list[list[float]] = [[] for _ in schedule.lists]
        self.free = [0.0] * schedule.ranks  # the end of what each rank did last
        self.sorts: dict[tuple[str, int, int], Sort] = {}
        self.rows: dict[str, int] = {}  # first index of the results of such an action
        self.home: list[int] = []  # the rank of each result
        self.known: list[float] = []  # when it is there
        self.waiting: dict[int, list[int]] = {}  # result -> ranks
        self.arrivals: dict[int, list[float]] = {}  # of the ranks, at what they do together

    def all_ranks(self) -> None:
        """Run every rank as far as it comes."""
        ready = list(range(self.schedule.ranks))
        while ready:
            ready += self.advance(ready.pop())

    def advance(self, rank: int) -> list[int]:
        """Run a rank until it has to wait; gives the ranks that can go on because of it."""
        items, woken = self.schedule.lists[rank], []
        for at in range(len(self.ends[rank]), len(items)):
            start = self.start(rank, items[at], woken)
            if start < 0:
                break
            self.do(rank, items[at], start, woken)
        return woken

    def start(self, rank: int, item: Item, woken: list[int]) -> float:
        """When the item can start; -1 if it needs what has not been computed yet."""
        if isinstance(item, Pair):
            first = self.start(rank, item.first, woken)
            second = self.start(rank, item.second, woken) if first >= 0 else first
            return second if second < 0 else max(first, second)
        sort, i, start = self.sort(item), item.microbatch, self.free[rank]
        for row in sort.needs:
            home = self.home[row + i]
            if home == MISSING:
                self.waiting.setdefault(row + i, []).append(rank)
                return -1.0
            arrival = self.known[row + i]
            if home != rank and home != EVERYWHERE:
                arrival += self.costs.transfer
            if arrival > start:
                start = arrival
        return start if sort.meets < 0 else self._together(rank, sort.meets + i, start, woken)

    def _together(self, rank: int, meeting: int, start: float, woken: list[int]) -> float:
        """When all ranks can start; -1 if some have not come yet."""
        if self.home[meeting] == MISSING:
            self._arrive(meeting, start, woken)
        if self.home[meeting] == MISSING:
            self.waiting.setdefault(meeting, []).append(rank)
            return -1.0
        return self.known[meeting]

    def do(self, rank: int, item: Item, start: float, woken: list[int]) -> None:
        """Run an item at that time."""
        if isinstance(item, Pair):
            end = start + self.costs.of(item)
            for action in parts(item):
                self._give(rank, self.sort(action), action.microbatch, end, woken)
        else:
            sort = self.sort(item)
            end = start + sort.duration
            self._give(rank, sort, item.microbatch, end, woken)
        self.starts[rank].append(start)
        self.ends[rank].append(end)
        self.free[rank] = end

    def _give(self, rank: int, sort: Sort, i: int, end: float, woken: list[int]) -> None:
        """Make a result known, and wake who waits for it."""
        number = sort.gives + i
        if sort.everyone:
            self._arrive(number, end + self.costs.barrier, woken)
        elif sort.gives >= 0:
            self.home[number], self.known[number] = rank, end
            if number in self.waiting:
                woken += self.waiting.pop(number)

    def _arrive(self, number: int, when: float, woken: list[int]) -> None:
        """One more rank has come to a meeting; the last one opens it to all."""
        times = self.arrivals.setdefault(number, [])
        times.append(when)
        if len(times) == self.schedule.ranks:
            self.home[number], self.known[number] = EVERYWHERE, max(times)
            woken += self.waiting.pop(number, ())

    def sort(self, action: Action) -> Sort:
        """What is known of all such actions."""
        kind, stage, _, part = action
        known = self.sorts.get((kind, stage, part))
        return known or self._new_sort(action)

    def _new_sort(self, action: Action) -> Sort:
        kind, stage, i, part = action
        everyone = kind in VOCABULARY
        together = everyone and self.schedule.vocabulary == INTERLACED
        rank = self.schedule.rank_of(stage, i)
        result = action._replace(kind="B" if kind == "BW" else kind)
        self.sorts[kind, stage, part] = Sort(
            needs=tuple(self._row(need) for _, need in needs(self.schedule, rank, action)),
            gives=-1 if kind == "W" else self._row(result),
            everyone=everyone,
            meets=self._row(f"all ranks to come to {kind}.0") if together else -1,
            duration=self.costs.of(action),
        )
        return self.sorts[kind, stage, part]

    def _row(self, result: Action | str) -> int:
        """Where the results start that differ from this one in the micro-batch only."""
        name = str(result) if isinstance(result, str) else str(result._replace(microbatch=0))
        if name not in self.rows:
            self.rows[name] = len(self.home)
            self.home += [MISSING] * self.schedule.microbatches
            self.known += [0.0] * self.schedule.microbatches
        return self.rows[name]

    def stuck(self) -> Iterator[str]:
        """The ranks that wait, each with what it waits for."""
        reasons = {rank: number for number, ranks in self.waiting.items() for rank in ranks}
        for rank, number in sorted(reasons.items()):
            item = self.schedule.lists[rank][len(self.ends[rank])]
            yield f"rank {rank} waits in {item} for {self._name(number)}"

    def _name(self, number: int) -> str:
        """A result in words."""
        row, name = max((row, name) for name, row in self.rows.items() if row <= number)
        name = name.replace(".0", f".{number - row}", 1)
        if name.startswith(VOCABULARY):
            return f"{name} of every rank"
        return f"{name} or {name.replace('B', 'BW')}" if name.startswith("B") else name


def peaks(schedule: Schedule, kept: float = 1.0) -> tuple[float, ...]:
    """The most activations that each rank holds, in those of one stage and micro-batch.

    A forward adds 1, B leaves the share `kept` of it (1: held until W, 0: until B), and W frees
    that share. A slice counts 1/slices. What vocabulary passes hold is not counted.
    """
    change = {"F": 1.0, "B": kept - 1.0, "W": -kept, "BW": -1.0}
    return tuple(_peak(items, change) / schedule.slices for items in schedule.lists)


def _peak(items: tuple[Item, ...], change: dict[str, float]) -> float:
    held = most = 0.0
    for item in items:
        for action in parts(item):
            held += change.get(action.kind, 0.0)
            if held > most:
                most = held
    return most
