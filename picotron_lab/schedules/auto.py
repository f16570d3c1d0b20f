"""auto: the list with the smallest makespan, for given times of every stage and a memory limit.

Idea    start from the schedules that people made and vary what they fix for even stages
Tried   1. each of them as it is, if it fits the limit, and zb-auto: so auto is never worse
        2. each with its W's put anew, for these times, where a rank would wait
        3. the best of these with more or fewer forwards before the first backward of some ranks,
           as long as that helps (found on a shorter step, if there are many micro-batches)
Limits  each stage on one rank (no second copy of the weights, as DualPipe has: it is not tried),
        whole sequences, activations held until W, and no change of the order in which
        micro-batches pass a stage
Time    uneven stages take longest: a second for p = 8, m = 32, v = 2, four for p = 32, m = 256, but
        a minute for p = 64, m = 1024
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice, product
from operator import itemgetter

from picotron_lab.schedules import basic, dual_pipe, v_shape, vocab, zero_bubble
from picotron_lab.schedules.actions import Action, Schedule, ScheduleError, parts
from picotron_lab.schedules.costs import Costs
from picotron_lab.schedules.search import CLOSE, zb_auto
from picotron_lab.schedules.simulate import Run, check_factors, peaks, simulate

Way = Callable[[int, int], Schedule]  # (p, m) -> a schedule to start from
Orders = tuple[tuple[Action, ...], ...]  # of every rank, without W's
SHARES = (1.0, 0.5, 0.0)  # of a W's time that a gap must have for the W to be put there
TRIAL = 3  # micro-batches per rank of the shorter step
WORK = 40_000  # actions that all tries of 2, or of 3, may have together


class Filling(Run):
    """Runs orders without W's, and puts each W where its rank would wait or memory is full."""

    def __init__(
        self, base: Schedule, orders: Orders, costs: Costs, limit: float, share: float
    ) -> None:
        super().__init__(base, costs)
        self.limit, self.share = limit, share
        self.todo = [deque(order) for order in orders]
        self.owed: list[deque[Action]] = [deque() for _ in orders]
        self.held = [0] * len(orders)
        self.lists: list[list[Action]] = [[] for _ in orders]

    def advance(self, rank: int) -> list[int]:
        """Run a rank until it has to wait; gives the ranks that can go on because of it."""
        woken: list[int] = []
        while self.todo[rank]:
            action = self.todo[rank][0]
            start = self.start(rank, action, woken)
            full = action.kind == "F" and self.held[rank] + 1 > self.limit + CLOSE
            if start < 0 or (full and not self.owed[rank]):
                break
            if full or self._gap(rank, start):
                self._take(rank, self.owed[rank].popleft(), self.free[rank], woken)
            else:
                self._take(rank, self.todo[rank].popleft(), start, woken)
        return woken

    def _gap(self, rank: int, start: float) -> bool:
        """Whether the oldest W should run in the time until `start`."""
        gap = start - self.free[rank]
        if not self.owed[rank] or gap < CLOSE:
            return False
        return gap + CLOSE >= self.share * self.sort(self.owed[rank][0]).duration

    def _take(self, rank: int, action: Action, start: float, woken: list[int]) -> None:
        self.do(rank, action, start, woken)
        self.lists[rank].append(action)
        self.held[rank] += {"F": 1, "W": -1}.get(action.kind, 0)
        if action.kind == "B":
            self.owed[rank].append(action._replace(kind="W"))

    def result(self) -> Schedule | None:
        """The schedule; None if the limit has no room for these orders."""
        self.all_ranks()
        if any(self.todo):
            return None
        for rank, owed in enumerate(self.owed):
            while owed:
                self._take(rank, owed.popleft(), self.free[rank], [])
        return replace(self.schedule, name="auto", lists=tuple(map(tuple, self.lists)))


def one_by_one(p: int, m: int, v: int) -> Schedule:
    """A micro-batch only after the one before it is done: slow, but v activations are enough."""
    lists = []
    for r in range(p):
        stages = range(r, p * v, p)
        once = [("F", s) for s in stages] + [(k, s) for s in reversed(stages) for k in "BW"]
        lists.append(tuple(Action(kind, s, i) for i in range(m) for kind, s in once))
    return Schedule("one-by-one", tuple(lists), basic.looped(p, v), m)


def rounded(p: int, m: int, v: int) -> Schedule:
    """interleaved-zb for any m: with as many micro-batches as it needs, without those too many."""
    base = zero_bubble.interleaved_zb(p, -(-m // p) * p, v)
    lists = (tuple(action for action in items if action.microbatch < m) for items in base.lists)
    return replace(base, lists=tuple(lists), microbatches=m)


def ways(v: int, vocabulary: int, costs: Costs) -> list[Way]:
    """What to start from, for v stages per rank; of several that are as good the first is taken."""
    if vocabulary:
        straight = {1: vocab.vocab_1, 2: vocab.vocab_2}[vocabulary]
        folded = {1: vocab.v_half_vocab_1, 2: vocab.v_half_vocab_2}[vocabulary]
        return [partial(straight, costs=costs) if v == 1 else folded]
    alone = {
        1: [basic.one_f_one_b, basic.afab, basic.eager_1f1b, zero_bubble.zb_h1, zero_bubble.zb_h2],
        2: [v_shape.zb_v, v_shape.v_half, v_shape.v_min, v_shape.v_1f1b, dual_pipe.dual_pipe_v],
    }
    looped = [basic.interleaved, zero_bubble.interleaved_zb, rounded] if v > 1 else []
    return [*alone.get(v, []), *(partial(way, v=v) for way in (*looped, one_by_one))]


def built(found: list[Way], p: int, m: int) -> Iterator[Schedule]:
    """Those that p and m allow."""
    for way in found:
        try:
            yield way(p, m)
        except ScheduleError:  # not for these numbers
            continue


def orders_of(schedule: Schedule) -> Orders:
    """A schedule without its W's, every BW a B, every pair its members."""
    lists = []
    for items in schedule.lists:
        actions = [action for item in items for action in parts(item) if action.kind != "W"]
        lists.append(tuple(a._replace(kind="B") if a.kind == "BW" else a for a in actions))
    return tuple(lists)


def forwards_first(orders: Orders, counts: tuple[int, ...]) -> Orders:
    """The same F's and B's: so many F's of each rank, then one F and one B in turn."""
    changed = []
    for order, count in zip(orders, counts, strict=True):
        forwards = [action for action in order if action.kind == "F"]
        changed.append(basic.alternate(forwards, [a for a in order if a.kind == "B"], count))
    return tuple(changed)


def first_counts(orders: Orders) -> tuple[int, ...]:
    """How many F's each rank has before its first B."""
    return tuple(next(i for i, action in enumerate(o) if action.kind == "B") for o in orders)


@dataclass(frozen=True)
class Plan:
    """A way to make a schedule: whose orders, how many forwards first, when a gap gets a W."""

    way: Way
    counts: tuple[int, ...]
    share: float

    def fill(self, base: Schedule, costs: Costs, limit: float) -> Filling:
        """The schedule, with the orders of a base that `way` built."""
        orders = forwards_first(orders_of(base), self.counts)
        return Filling(base, orders, costs, limit, self.share)

    def moved(self, ranks: range, change: int) -> "Plan":
        """So many forwards more on these ranks."""
        counts = (max(0, n + change * (r in ranks)) for r, n in enumerate(self.counts))
        return replace(self, counts=tuple(counts))


def tries(base: Schedule) -> int:
    """How many schedules of this size WORK allows, and at least one for every share."""
    return max(len(SHARES), WORK // sum(map(len, base.lists)))


def vary(found: list[Way], p: int, m: int, costs: Costs, limit: float) -> Plan:
    """The best plan that WORK allows to find for a step of so many micro-batches."""
    bases = {way: base for way in found for base in built([way], p, m)}

    def makespan(plan: Plan) -> float:
        filling = plan.fill(bases[plan.way], costs, limit)
        return max(filling.free) if filling.result() else float("inf")

    plans = (
        Plan(way, first_counts(orders_of(base)), share)
        for way, base in bases.items()
        for share in SHARES
    )
    most = max(map(tries, bases.values()))
    timed = [(plan, makespan(plan)) for plan in islice(plans, most)]
    best, time = min(timed, key=itemgetter(1))
    ranks = [span for r in range(p) for span in (range(r, r + 1), range(r + 1), range(r, p))]
    moves = cycle([(span, change) for span in ranks for change in (1, -1)])
    vain = 0  # moves since the last one that helped
    for _ in range(most - len(timed)):
        other = best.moved(*next(moves))
        after = makespan(other) if other != best else time
        vain += 1
        if after < time - CLOSE:
            best, time, vain = other, after, 0
        if vain == 6 * p:
            break
    return best


def shortest(bases: Iterable[Schedule], costs: Costs) -> float:
    """No list with these placements can be shorter: a rank's work, after the way to its first F."""
    bounds = []
    for base in bases:
        ways_in = [0.0]
        for stage in range(base.stages):
            ways_in.append(ways_in[-1] + costs.of(Action("F", stage)))
        works = [sum(map(costs.of, orders)) for orders in base.lists]
        bounds.append(max(w + ways_in[min(s)] for w, s in zip(works, base.placement, strict=True)))
    return min(bounds)


def auto(p: int, m: int, v: int, costs: Costs, limit: float = 0.0, vocabulary: int = 0) -> Schedule:
    """The best list that is found; never slower than the best one made by hand that fits.

    Rank r  v stages, placed as in the schedule that it was made from
    Bubble  searched, for makespan (zb-auto: for the span of a stage)
    Peak    limit, in activations of one stage and micro-batch held until W; 0: no limit
    Needs   limit >= v; with a split vocabulary (1 or 2: by that algorithm) v of 1 or 2
    """
    room = limit or float(m * v)
    check_factors(costs, p * v)
    _check(v, room, vocabulary)
    best, found = Best(costs, room), ways(v, vocabulary, costs)
    bases = {way: base for way in found for base in built([way], p, m)}
    times = {way: best.offer(base) for way, base in bases.items()}
    if v == 1 and not vocabulary:
        best.offer(zb_auto(p, m, costs, room))
    found = sorted(bases, key=times.get)
    bound = shortest(bases.values(), costs) + CLOSE
    for way, share in islice(product(found, SHARES), tries(bases[found[0]])):
        if best.makespan > bound:
            best.offer(Filling(bases[way], orders_of(bases[way]), costs, room, share).result())
    if best.makespan > bound and not vocabulary:
        plan = vary(found, p, min(m, TRIAL * p), costs, room)
        best.offer(plan.fill(bases[plan.way], costs, room).result())
    if best.schedule is None:
        least = min(max(peaks(base)) for base in bases.values())
        raise ScheduleError(
            f"memory_limit {limit:g} is too small for auto with a split vocabulary: give {least:g}."
        )
    return replace(best.schedule, name="auto")


def _check(v: int, limit: float, vocabulary: int) -> None:
    if vocabulary not in (0, 1, 2):
        raise ScheduleError(f"vocabulary {vocabulary} is no algorithm for auto: give 0, 1 or 2.")
    if vocabulary and v > 2:
        raise ScheduleError(
            f"virtual stages {v} do not go with a split vocabulary in auto: give 1 or 2."
        )
    if limit < v:
        raise ScheduleError(
            f"memory_limit {limit:g} is too small for auto: give {v} or more, the activations of "
            "one micro-batch on all stages of a rank."
        )


@dataclass
class Best:
    """The fastest schedule so far that fits."""

    costs: Costs
    limit: float
    schedule: Schedule | None = None
    makespan: float = float("inf")

    def offer(self, schedule: Schedule | None) -> float:
        """Take it if it fits and is faster; gives its makespan."""
        if schedule is None:
            return float("inf")
        makespan = simulate(schedule, self.costs).makespan
        fits = max(peaks(schedule)) <= self.limit + CLOSE
        if fits and makespan < self.makespan - CLOSE:
            self.schedule, self.makespan = schedule, makespan
        return makespan
