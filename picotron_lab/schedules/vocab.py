"""Both vocabulary layers split over all ranks, so that no stage is slower for having one.

Passes   IF.i  every rank looks up the tokens of its rows; the sum goes to stage 0
         S.i   logits and softmax of its rows, from the last stage's output, which all ranks get
         T.i   the softmax becomes right by the sums over ranks (barrier C1); gradients of its rows
         IB.i  gradients of its rows of the input layer
Barriers each lets an activation live one period longer. Algorithm 1 has two: T gives the gradient
         for the last stage's backward. Algorithm 2 has one: S gives it, so T may run at any time
Order    every rank runs the passes in the same order, so their collectives can share a communicator
Peaks    of activations. S and T also hold the softmax of one micro-batch, n V/p numbers
Letters  p ranks, m micro-batches, r a rank; tF, tBW times on a stage, M its activations
Source   Vocabulary Parallelism, arXiv 2411.05288, sections 5 and 6
"""

from bisect import bisect_left
from dataclasses import dataclass, field, replace
from functools import partial

from picotron_lab.schedules.actions import VOCABULARY, Action, Schedule, ScheduleError
from picotron_lab.schedules.basic import straight
from picotron_lab.schedules.costs import Costs
from picotron_lab.schedules.simulate import INTERLACED, simulate
from picotron_lab.schedules.squeeze import PERIOD, Block, finite
from picotron_lab.schedules.v_shape import v_half_block


@dataclass
class Writer:
    """Writes one rank's list: every kind has its own next micro-batch, and stops after m."""

    rank: int
    m: int
    visits: int = 0  # T of one micro-batch and S of the next, made so far
    actions: list[Action] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def run(self, *kinds: str) -> None:
        """The next action of each kind, if there is one."""
        for kind in kinds:
            i = self.counts.get(kind, 0)
            if i < self.m:
                self.counts[kind] = i + 1
                self.actions.append(Action(kind, 0 if kind in VOCABULARY else self.rank, i))

    def visit(self) -> None:
        """Algorithms 1 and 2: T of the micro-batch before, and S."""
        self.run(*(["T"] if self.visits else []), "S")
        self.visits += 1


# ---- 1F1B


def vocab_1(p: int, m: int, costs: Costs = Costs()) -> Schedule:  # noqa: B008
    """1F1B with a split vocabulary, Algorithm 1: two barriers, two more micro-batches in flight.

    Rank r  stage r; p-r+2 forwards ahead, then BW, T and S, F in turn, or BW, F, T and S
    Bubble  about that of 1f1b, (p-1)(tF+tBW), less what vocabulary passes fill of it
    Peak    min(m, p+2-r) M
    Needs   tBW >= tF; barriers shorter than tF stay hidden
    Source  arXiv 2411.05288, section 5.2; the order is that of the authors' code
    """
    return _with_vocabulary("1f1b-vocab1", 1, (p, m), costs)


def vocab_2(p: int, m: int, costs: Costs = Costs()) -> Schedule:  # noqa: B008
    """1F1B with a split vocabulary, Algorithm 2: one barrier, one more micro-batch in flight.

    Rank r  stage r; p-r+1 forwards ahead, then BW, T and S, F in turn, or BW, F, T and S
    Bubble  about that of 1f1b, (p-1)(tF+tBW), less what vocabulary passes fill of it
    Peak    min(m, p+1-r) M
    Needs   tBW >= tF; barriers shorter than tF stay hidden
    Source  arXiv 2411.05288, section 5.2; the order is that of the authors' code
    """
    return _with_vocabulary("1f1b-vocab2", 2, (p, m), costs)


def _with_vocabulary(name: str, algorithm: int, size: tuple[int, int], costs: Costs) -> Schedule:
    p, m = size
    forward, backward = costs.F, costs.B + costs.W
    if backward < forward:
        raise ScheduleError(
            f"costs B={costs.B} and W={costs.W} are together less than F={forward}, and {name} "
            f"needs backwards that take as long as forwards: give W={forward - costs.B} or more."
        )
    early = phases(p, forward, backward)
    ahead = visits_ahead(early)
    lists = (_one_f_one_b(r, (p, m), algorithm, early[r], (ahead[0], ahead[r])) for r in range(p))
    return Schedule(name, tuple(lists), straight(p), m, vocabulary=algorithm)


def phases(p: int, forward: float, backward: float) -> list[bool]:
    """Whether a rank's period is BW, TS, F (True) or BW, F, TS.

    The last rank sets the time of TS for all; a rank so many hops away is then at another point
    of its own period.
    """
    early, offset = [True], 0.0  # from the last rank to the first
    while len(early) < p:
        if offset - forward >= -backward:
            offset -= forward
            early.append(True)
        else:
            offset += backward - forward
            early += [False, True]
    return early[:p][::-1]


def visits_ahead(early: list[bool]) -> list[int]:
    """TS visits of every rank between its warm-up and its first backward."""
    ahead = [0]
    for mine, after in zip(early[-2::-1], early[:0:-1], strict=True):
        ahead.append(ahead[-1] + (0 if mine and not after else 1))
    return ahead[::-1]


def _one_f_one_b(
    r: int, size: tuple[int, int], algorithm: int, early: bool, ahead: tuple[int, int]
) -> tuple[Action, ...]:
    """The list of a rank: forwards, then visits (T of one, S of the next), then backwards.

    Before the first backward: p-r forwards, each after the IF of the next micro-batch; a visit and
    a forward (Algorithm 1: both twice); as many visits as `ahead` says, for rank 0 and this one.
    Then in turn BW, a visit with IF and IB, F, or if not `early` BW, F, a visit.
    """
    p, m = size
    extra = algorithm == 1  # a second barrier: one more visit, one more forward ahead
    first, warm = min(p, m), min(m, p - r)
    total, shift = m + extra, ahead[0] + 1 + extra
    writer = Writer(r, m)
    writer.run(*["IF"] * (first - warm + 1), *["IF", "F"] * warm)
    writer.visit()
    writer.run(*["IF", "F"] if extra else ["F"])
    if extra:
        writer.visit()
        writer.run("F")
    for k in range(ahead[1]):
        if writer.visits < total:
            writer.visit()
            writer.run(*["IF"] if k + 1 >= ahead[0] else [])
    for _ in range(m):
        before = writer.visits
        writer.run("BW", *["F"] if not early else [])
        if before < total:
            writer.visit()
            writer.run(*["IF"] if writer.visits >= shift else [])
        writer.run(*["IB"] if before > shift else [])
        writer.run(*["F"] if early else [])
    writer.run(*["IB"] * m, "T")
    return tuple(writer.actions)


def interlaced(p: int, m: int) -> Schedule:
    """1F1B whose vocabulary passes all ranks start together, as tensor parallelism would.

    Rank r  stage r; 3p/2 - r forwards first, then S and T before each forward and backward
    Bubble  that of 1f1b, (p-1)(tF+tBW), and the collectives, which nothing hides
    Peak    min(m, 3p//2 - r) M
    Needs   nothing to run (the authors' code needs an even p)
    Source  arXiv 2411.05288, section 6.1, for comparison; after nnScaler
    """
    lists = (_interlaced(r, p, m) for r in range(p))
    return Schedule("1f1b-interlaced", tuple(lists), straight(p), m, vocabulary=INTERLACED)


def _interlaced(r: int, p: int, m: int) -> tuple[Action, ...]:
    writer, period = Writer(r, m), 3 * p // 2
    ahead = min(m, period - r)  # forwards before anything else
    passes = min(m, p - r)  # S and T before the first backward
    alone = max(0, ahead - passes - (p - r - 1) // 2)  # backwards before the next forward

    def output(k: int) -> None:
        """S and T of micro-batch k, and the input passes whose time has then come."""
        writer.run("S", "T")
        writer.run(*["IF"] if k >= min(p, m) - 1 else [])
        writer.run(*["IB"] if k >= min(p, m) + 1 - p % 2 else [])

    writer.run(*["IF"] * (min(period, m) - ahead + 1), *["IF", "F"] * ahead)
    for k in range(passes):
        output(k)
    for k in range(m):
        forward = alone <= k < alone + m - ahead
        both = ["F", "BW"] if (p - r) % 2 == 0 else ["BW", "F"]
        writer.run(*both if forward else ["BW"])
        if passes + k < m:
            output(passes + k)
        else:
            writer.run("IB")
    writer.run(*["IB"] * m)
    return tuple(writer.actions)


# ---- V-Half


def v_half_vocab_1(p: int, m: int) -> Schedule:
    """V-Half with a split vocabulary, Algorithm 1.

    Rank r  stages r and 2p-1-r; the block of v-half with its backwards two periods later
    Bubble  that of v-half, and at most 5 units of a chunk for barriers as long as its F
    Peak    v-half's and 4 chunks: p+6 (p even) or p+5 (p odd)
    Needs   nothing to run
    Source  arXiv 2411.05288, section 5.3
    """
    return _v_half("v-half-vocab1", 1, p, m)


def v_half_vocab_2(p: int, m: int) -> Schedule:
    """V-Half with a split vocabulary, Algorithm 2.

    Rank r  stages r and 2p-1-r; the block of v-half with its backwards one period later
    Bubble  that of v-half, and at most 5 units of a chunk for barriers as long as its F
    Peak    v-half's and 2 chunks: p+4 (p even) or p+3 (p odd)
    Needs   nothing to run
    Source  arXiv 2411.05288, section 5.3
    """
    return _v_half("v-half-vocab2", 2, p, m)


def _v_half(name: str, algorithm: int, p: int, m: int) -> Schedule:
    late = PERIOD * (3 - algorithm)
    starts = tuple((fa, fz, bz + late, ba + late) for fa, fz, bz, ba in v_half_block(p).starts)
    return finite(name, Block(starts, wait=late), m, partial(weave, algorithm=algorithm))


def weave(base: Schedule, algorithm: int) -> Schedule:
    """Vocabulary passes in a schedule whose last B waits long enough after its F.

    Each pass gets one time for all ranks, in units of F = B = W = 1: S one unit after the last
    stage's F, T a period later (Algorithm 1: but before that stage's B), IF before the first
    stage's F of the micro-batch before, IB a period after its B. A rank runs a pass before all that
    it starts then or later.
    """
    line = simulate(replace(base, vocabulary=0))
    last, moments, starts = base.stages - 1, [], {}
    for rank in {base.rank_of(0), base.rank_of(last)}:
        starts |= zip(base.lists[rank], line.starts[rank], strict=True)
    for i in range(base.microbatches):
        back = starts["B", last, i, 0]
        output = min(starts["F", last, i, 0] + 2, back)
        after = min(output + PERIOD, back) if algorithm == 1 else output + PERIOD
        moments += [
            (starts["F", 0, i - 1, 0] if i else -1.0, 2 * i, Action("IF", 0, i)),
            (output, 2 * i, Action("S", 0, i)),
            (after, 2 * i + 1, Action("T", 0, i)),
            (starts["B", 0, i, 0] + 1 + PERIOD, 2 * i, Action("IB", 0, i)),
        ]
    moments.sort()
    lists = tuple(
        _merge(actions, times, moments)
        for actions, times in zip(base.lists, line.starts, strict=True)
    )
    return replace(base, lists=lists, vocabulary=algorithm)


def _merge(
    actions: tuple[Action, ...], starts: tuple[float, ...], moments: list
) -> tuple[Action, ...]:
    """A rank's list with every pass of `moments` (time, order, pass) put at its time."""
    merged: list[Action] = []
    done = 0
    for time, _, action in moments:
        upto = bisect_left(starts, time, done)
        merged += [*actions[done:upto], action]
        done = upto
    return (*merged, *actions[done:])
