"""From a building block to a schedule: repeat the block of one micro-batch, squeeze, run.

Block    when the passes of micro-batch 0 run on every rank of a V: the first chunk forward (FA),
         the second, on the way back, forward (FZ) and backward (BZ), the first backward (BA).
         Repeated every 6 units it never collides, and its lifespans bound the memory
Repeat   gives all micro-batches their slots, with each W in the next free slot after its B
Squeeze  moves passes, in the order of their slots, to earlier free ones, as long as what they need
         is there and no rank holds more than the block's own peak
Run      keeps the order of the moved passes only, each as early as it can, with W's in the gaps
Stretch  many micro-batches only repeat the middle, so a short schedule is made and then stretched
Source   Pipeline Parallelism with Controllable Memory, arXiv 2405.15362, sections 3 and 4
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from picotron_lab.schedules.actions import Action, Schedule
from picotron_lab.schedules.basic import folded

PERIOD = 6
FA, FZ, BZ, BA, WZ, WA = range(6)
Pass = tuple[int, int]  # which of the six, micro-batch
Finish = Callable[[Schedule], Schedule]
NEVER = 10**9


@dataclass(frozen=True)
class Block:
    """starts[rank] = (FA, FZ, BZ, BA) of micro-batch 0; backward: units of a B (2: with its W).

    wait: units between the last stage's FZ and its BZ, for the passes of a split vocabulary.
    """

    starts: tuple[tuple[int, int, int, int], ...]
    backward: int = 1
    wait: int = 0

    def units(self, kind: int) -> int:
        """How long a pass takes."""
        return self.backward if kind in (BZ, BA) else 1

    def frees(self, kind: int) -> bool:
        """Whether the memory of a forward is given back after this pass."""
        return kind in ((BZ, BA) if self.backward == 2 else (WZ, WA))

    def before(self, rank: int, kind: int) -> tuple[int, int]:
        """(rank, kind) of what a pass of the same micro-batch waits for; kind -1: nothing."""
        last = len(self.starts) - 1
        if kind in (WZ, WA):
            return rank, kind - 2
        end = 0 if kind in (FA, BZ) else last  # FA and BZ go down the ranks, FZ and BA up again
        return (rank, kind - 1) if rank == end else (rank + (1 if end else -1), kind)

    def lag(self, rank: int, kind: int) -> int:
        """Units from the start of what a pass waits for until the pass may start."""
        _, need = self.before(rank, kind)
        return self.units(need) + (self.wait if (rank, kind) == (0, BZ) else 0)


@dataclass
class Slots:
    """One rank's passes by slot, where each is, and what the rank holds during each slot."""

    passes: dict[int, Pass]
    start: dict[Pass, int] = field(default_factory=dict)
    held: list[int] = field(default_factory=list)
    busy: set[int] = field(default_factory=set)


def repeat(block: Block, rank: int, m: int) -> Slots:
    """The slots of a rank: the block m times, W's in the free slots after their B's."""
    starts = block.starts[rank]
    passes = {t + PERIOD * i: (kind, i) for kind, t in enumerate(starts) for i in range(m)}
    busy = {t + u for t, (kind, _) in passes.items() for u in range(block.units(kind))}
    waiting: deque[Pass] = deque()
    for t in range(max(busy) + 1 + 2 * m):
        if t in passes and passes[t][0] in (BZ, BA) and block.backward == 1:
            waiting.append(passes[t])
        elif t not in busy and waiting:
            kind, i = waiting.popleft()
            passes[t] = (kind + 2, i)
    slots = Slots(passes, {at: t for t, at in passes.items()}, [], busy | set(passes))
    held = 0
    for t in range(max(slots.busy) + 1):
        kind = passes.get(t, (-1, 0))[0]
        held += kind in (FA, FZ)
        slots.held.append(held)
        held -= block.frees(kind)
    return slots


def squeeze(block: Block, m: int) -> tuple[list[list[Pass]], int]:
    """Order of the F's and B's of every rank, and the peak that it keeps."""
    ranks = [repeat(block, rank, m) for rank in range(len(block.starts))]
    peak = max(max(slots.held) for slots in ranks)
    for t in range(max(len(slots.held) for slots in ranks)):
        for rank, slots in enumerate(ranks):
            if t in slots.passes:
                _move(block, slots, t, _ready(block, ranks, rank, slots.passes[t]), peak)
    orders = [sorted((t, at) for at, t in slots.start.items() if at[0] < WZ) for slots in ranks]
    return [[at for _, at in order] for order in orders], peak


def _ready(block: Block, ranks: list[Slots], rank: int, which: Pass) -> int:
    """The first slot at which what a pass needs is there."""
    kind, i = which
    other, need = block.before(rank, kind)
    ready = ranks[other].start[need, i] + block.lag(rank, kind) if need >= 0 else 0
    return max(ready, ranks[rank].start[kind, i - 1] + 1) if i else ready


def _move(block: Block, slots: Slots, t: int, ready: int, peak: int) -> None:
    """Put the pass of slot t into the first free one from `ready` on that memory allows."""
    kind, i = slots.passes[t]
    earliest = t
    if kind in (FA, FZ):
        held = slots.held
        while earliest > ready and held[earliest - 1] < peak:
            earliest -= 1
    else:
        earliest = min(t, ready)
    units = block.units(kind)
    slots.busy.difference_update(range(t, t + units))
    while earliest in slots.busy or earliest + units - 1 in slots.busy:
        earliest += 1
    slots.busy.update(range(earliest, earliest + units))
    slots.start[kind, i] = earliest
    if kind in (FA, FZ):
        slots.held[earliest:t] = [held + 1 for held in slots.held[earliest:t]]
    elif block.frees(kind):
        slots.held[earliest + 1 : t + 1] = [held - 1 for held in slots.held[earliest + 1 : t + 1]]


@dataclass
class _Rank:
    """Where a rank is in its order, what it holds, which W's it owes, and what it has run."""

    order: list[Pass]
    at: int = 0
    held: int = 0
    free: int = 0
    owed: deque[Pass] = field(default_factory=deque)
    ran: list[Pass] = field(default_factory=list)


def run(block: Block, orders: list[list[Pass]], peak: int) -> list[list[Pass]]:
    """Each rank's passes in that order, as early as they can, and a W whenever it would wait."""
    ranks = [_Rank(order) for order in orders]
    begun: dict[tuple[int, int, int], int] = {}  # (rank, kind, micro-batch) -> when
    t, busy = 0, True
    while busy:
        busy = False
        for number, rank in enumerate(ranks):
            if rank.free <= t:
                _step(block, (number, rank), (t, peak), begun)
            busy = busy or rank.free > t or rank.at < len(rank.order)
        t += 1
    return [rank.ran for rank in ranks]


def _step(
    block: Block,
    who: tuple[int, _Rank],
    when: tuple[int, int],
    begun: dict[tuple[int, int, int], int],
) -> None:
    """What a rank that is free starts now: the next of its order, or the oldest W, or nothing."""
    (number, rank), (t, peak) = who, when
    if rank.at < len(rank.order):
        kind, i = rank.order[rank.at]
        other, need = block.before(number, kind)
        ready = need < 0 or begun.get((other, need, i), NEVER) + block.lag(number, kind) <= t
        if ready and (kind in (BZ, BA) or rank.held < peak):
            rank.at += 1
            begun[number, kind, i] = t
            rank.free = t + block.units(kind)
            rank.held += 1 if kind in (FA, FZ) else -block.frees(kind)
            rank.ran.append((kind, i))
            if kind in (BZ, BA) and not block.frees(kind):
                rank.owed.append((kind + 2, i))
            return
    if rank.owed:
        rank.ran.append(rank.owed.popleft())
        rank.held -= 1
        rank.free = t + 1


def settled(p: int) -> int:
    """Micro-batches after which a list repeats itself (for large p fewer, 1.5p, are enough)."""
    return 2 * max(3, p)


def stretch(schedule: Schedule, m: int) -> Schedule:
    """The same step with more micro-batches, m: the middle of each list repeats itself.

    Needs  lists that have become periodic after the micro-batches that `settled` gives
    """
    few, lists = schedule.microbatches, []
    extra = m - few
    for actions in schedule.lists:
        length = len(actions) // few  # actions of one micro-batch
        cut = length * settled(schedule.ranks)
        middle, rest = actions[cut : cut + length], actions[cut:]
        more = (Action(kind, s, i + n) for n in range(extra) for kind, s, i, _ in middle)
        later = (Action(kind, s, i + extra) for kind, s, i, _ in rest)
        lists.append((*actions[:cut], *more, *later))
    return replace(schedule, lists=tuple(lists), microbatches=m)


def finite(name: str, block: Block, m: int, finish: Finish | None = None) -> Schedule:
    """The schedule of m micro-batches from a block: stages r and 2p-1-r on rank r.

    finish  what is done to the short schedule, before it is stretched
    """
    p = len(block.starts)
    few = min(m, settled(p) + max(3, p) + 2)
    passes = run(block, *squeeze(block, few))
    lists = tuple(_actions(block, r, passes[r]) for r in range(p))
    short = Schedule(name, lists, folded(p), few)
    short = finish(short) if finish else short
    return stretch(short, m) if m > few else short


def _actions(block: Block, rank: int, passes: list[Pass]) -> tuple[Action, ...]:
    first, second = rank, 2 * len(block.starts) - 1 - rank
    back = "BW" if block.backward == 2 else "B"
    kinds = ("F", "F", back, back, "W", "W")
    stages = (first, second, second, first, second, first)
    return tuple(Action(kinds[kind], stages[kind], i) for kind, i in passes)
