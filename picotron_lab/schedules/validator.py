"""validate: are these lists one correct training step? Run before every execution.

1  placement  every stage is on one rank (on two, one per direction, if replicated)
2  each list  only the rank's own stages; of every micro-batch and slice F, then BW or B and W, each
              once; slices forwards in ascending, backwards in descending order; members of a pair
              without need of each other; every vocabulary pass once, all ranks in the same order
3  together   all ranks come to the end of their lists, see walk.py
The first wrong action is named, with the rule and what to do.
"""

from collections import defaultdict
from collections.abc import Iterator

from picotron_lab.schedules.actions import (
    DATA,
    VOCABULARY,
    Action,
    Item,
    Pair,
    Schedule,
    ScheduleError,
    parts,
)
from picotron_lab.schedules.needs import needs
from picotron_lab.schedules.simulate import simulate
from picotron_lab.schedules.walk import Walk

NEW, FORWARD, BACKWARD, COMPLETE = range(4)  # how far a stage is with a slice of a micro-batch
STEPS = {
    "F": (NEW, FORWARD),
    "B": (FORWARD, BACKWARD),
    "W": (BACKWARD, COMPLETE),
    "BW": (FORWARD, COMPLETE),
}
Passes = dict[tuple[str, int], None]  # (kind, micro-batch), in the order of the list
RULE = "every stage needs F, then BW or B and W, once for every micro-batch"


def validate(schedule: Schedule, memory_limit: float | None = None) -> None:
    """Accept the schedule, or name what is wrong.

    memory_limit  activations, of one stage and micro-batch, that a rank may hold from F until W
                  (a slice counts 1/slices); None or 0: any number
    Raises        ScheduleError with the first wrong action, the rule and what to do
    """
    _check_placement(schedule)
    _check_same_order(schedule, [_check_list(schedule, rank) for rank in range(schedule.ranks)])
    if memory_limit:
        for rank in range(schedule.ranks):
            _check_memory(schedule, rank, memory_limit)
    walk = Walk(schedule)
    walk.check_order()
    if schedule.vocabulary:
        simulate(schedule)  # knows barriers, which the walk does not; raises Deadlock
    else:
        walk.check_end()


# ---- placement


def _check_placement(schedule: Schedule) -> None:
    name, placement = schedule.name, schedule.placement
    if not any(placement):
        raise ScheduleError(f"{name} places no stages: give every rank a tuple of its stages.")
    if len(schedule.lists) != len(placement):
        raise ScheduleError(
            f"{name} has {len(schedule.lists)} lists for a placement on {len(placement)} ranks: "
            "give one list and one tuple of stages for each rank."
        )
    if schedule.replicated:
        ways = [[stages[way : way + 1] for stages in placement] for way in (0, 1)]
    else:
        ways = [list(placement)]
    for way in ways:
        _check_cover(name, schedule.stages, way)


def _check_cover(name: str, stages: int, way: list[tuple[int, ...]]) -> None:
    """Every stage on exactly one rank."""
    owners = defaultdict(list)
    for rank, own in enumerate(way):
        for stage in own:
            owners[stage].append(rank)
    for stage in sorted({*range(stages), *owners}):
        if len(owners[stage]) != 1 or stage < 0:
            ranks = " and ".join(map(str, owners[stage])) or "none"
            raise ScheduleError(
                f"{name} places stage {stage} on ranks: {ranks}; every stage from 0 needs exactly "
                "one rank (DualPipe: one in each direction): mend the placement."
            )


# ---- each list


def _check_list(schedule: Schedule, rank: int) -> Passes:
    """Everything once, in an order that this rank alone could run; gives its vocabulary passes."""
    state = dict.fromkeys(_expected(schedule, rank), NEW)
    seen: Passes = {}
    for item in schedule.lists[rank]:
        pair = isinstance(item, Pair)
        for action in (item.first, item.second) if pair else (item,):
            if action.kind in STEPS:
                _check_step(schedule, rank, action, state)
            else:
                _check_vocabulary(schedule, rank, action, seen)
        if pair and item.first.microbatch == item.second.microbatch:
            _check_pair(schedule, rank, item)
    for key, reached in state.items():
        if reached != COMPLETE:
            missing = Action(("F", "B", "W")[reached], *key)
            _refuse(schedule, rank, missing, f"is missing: {RULE}")
    for i in range(schedule.microbatches if schedule.vocabulary else 0):
        for kind in VOCABULARY:
            if (kind, i) not in seen:
                _refuse(schedule, rank, Action(kind, 0, i), "is missing: every rank has a part")
    return seen


def _check_step(
    schedule: Schedule, rank: int, action: Action, state: dict[tuple[int, int, int], int]
) -> None:
    """Take note of an F, B, W or BW, if it is its turn."""
    key = action[1:]
    before, after = STEPS[action.kind]
    if state.get(key) != before:
        _refuse(schedule, rank, action, _why(schedule, rank, action, state.get(key, NEW)))
    if schedule.slices > 1:
        _check_slices(schedule, rank, action, state)
    state[key] = after


def _expected(schedule: Schedule, rank: int) -> Iterator[tuple[int, int, int]]:
    """(stage, micro-batch, slice) of everything that a rank has to do."""
    m = schedule.microbatches
    half = (m + 1) // 2
    for chunk, stage in enumerate(schedule.placement[rank]):
        mine = (range(half), range(half, m))[chunk] if schedule.replicated else range(m)
        for i in mine:
            for part in range(schedule.slices):
                yield stage, i, part


def _refuse(schedule: Schedule, rank: int, what: Item, why: str) -> None:
    raise ScheduleError(f"{schedule.name}, rank {rank}: {what} {why}.")


def _why(schedule: Schedule, rank: int, action: Action, reached: int) -> str:
    """What is wrong with an F, B, W or BW, when so much of it has been done before."""
    kind, stage, i, part = action
    for what, value, count in (
        ("stage", stage, schedule.stages),
        ("micro-batch", i, schedule.microbatches),
        ("slice", part, schedule.slices),
    ):
        if not 0 <= value < count:
            return f"is out of range: {what} {value} of {count}, counted from 0"
    home = schedule.rank_of(stage, i)
    if home != rank:
        return f"is on the wrong rank: stage {stage} of micro-batch {i} belongs to rank {home}"
    if reached >= STEPS[kind][1]:
        return f"is one too many, its work has been done: {RULE}"
    if kind == "BW":
        return (
            f"does again what B{stage}.{i} has done: follow a B by a W" if reached else _late("F")
        )
    return _late({"B": "F", "W": "B"}[kind])


def _late(needed: str) -> str:
    return f"comes before its own {needed}, which it needs: move it behind"


def _check_pair(schedule: Schedule, rank: int, pair: Pair) -> None:
    """Both members start at once, so neither can wait for the other."""
    for mine, other in ((pair.first, pair.second), (pair.second, pair.first)):
        result = other._replace(kind=other.kind[0])  # a BW gives what a B gives
        if (rank, result) in needs(schedule, rank, mine):
            _refuse(schedule, rank, pair, f"cannot run as one, {mine} needs {other}: separate them")


def _check_slices(
    schedule: Schedule, rank: int, action: Action, state: dict[tuple[int, int, int], int]
) -> None:
    """A slice needs keys and values of those before it, and their gradients of those after it."""
    kind, stage, i, part = action
    if kind == "F" and part and state[stage, i, part - 1] == NEW:
        before = Action("F", stage, i, part - 1)
        _refuse(schedule, rank, action, f"needs {before} first: forwards go from slice 0 up")
    last = schedule.slices - 1
    if kind in ("B", "BW") and part < last and state[stage, i, part + 1] < BACKWARD:
        after = Action(kind, stage, i, part + 1)
        _refuse(schedule, rank, action, f"needs {after} first: backwards go from slice {last} down")


def _check_vocabulary(schedule: Schedule, rank: int, action: Action, seen: Passes) -> None:
    """S, T, IF and IB: only with a split vocabulary, each once per micro-batch, S before T."""
    kind, i = action.kind, action.microbatch
    if kind in DATA:
        why = "is no part of a schedule: the executor gathers and reduces where it has to"
    elif not schedule.vocabulary:
        why = "is a vocabulary pass, but this schedule does not split the vocabulary: leave it out"
    elif not 0 <= i < schedule.microbatches:
        why = f"is out of range: micro-batch {i} of {schedule.microbatches}, counted from 0"
    elif (kind, i) in seen:
        why = "is there twice: every rank runs it once for every micro-batch"
    elif kind == "T" and ("S", i) not in seen:
        why = f"comes before S.{i}, which it needs: move it behind"
    else:
        seen[kind, i] = None
        return
    _refuse(schedule, rank, action, why)


def _check_same_order(schedule: Schedule, passes: list[Passes]) -> None:
    """All ranks meet in every vocabulary pass, so they have to come to them in one order."""
    orders = list(map(list, passes))
    for rank, order in enumerate(orders):
        if order != orders[0]:
            pairs = zip(order, orders[0], strict=True)
            mine, other = next((mine, other) for mine, other in pairs if mine != other)
            first = Action(other[0], 0, other[1])
            why = f"comes where rank 0 has {first}: all ranks need one order of these passes"
            _refuse(schedule, rank, Action(mine[0], 0, mine[1]), why)


def _check_memory(schedule: Schedule, rank: int, limit: float) -> None:
    """No more activations between F and W than the limit."""
    held = 0
    for item in schedule.lists[rank]:
        for action in parts(item):
            held += {"F": 1, "W": -1, "BW": -1}.get(action.kind, 0)
            if held > limit * schedule.slices:
                share = held / schedule.slices
                _refuse(
                    schedule, rank, action,
                    f"makes the rank hold {share:g} activations, more than the limit {limit:g}: "
                    "run a BW or W before it, or raise the limit",
                )  # fmt: skip
