"""needs: which results an action waits for. Read by validator, simulator and executor alike."""

from picotron_lab.schedules.actions import Action, Schedule

EVERYONE = -1  # in the place of a rank: that action of every rank, a barrier
Need = tuple[int, Action]


def needs(schedule: Schedule, rank: int, action: Action) -> list[Need]:
    """(rank, action) pairs that must be done before this action of this rank may start.

    A backward that is needed is always called B here, be it a B or the first half of a BW.

    F   the stage before, the slice before; of stage 0 with a split vocabulary IF of every rank
    B   its F, the stage after, the slice after; of the last stage with a split vocabulary what
        makes its gradient: T of every rank, or in Algorithm 2 already S of every rank
    W   its B
    S   F of the last stage        T   S of every rank        IB   B of stage 0
    """
    kind, stage, i, part = action
    if kind == "F":
        return _forward(schedule, rank, action)
    if kind in ("B", "BW"):
        return _backward(schedule, rank, action)
    if kind == "W":
        return [(rank, Action("B", stage, i, part))]
    if kind == "S":
        last = schedule.stages - 1
        return [(schedule.rank_of(last, i), Action("F", last, i))]
    if kind == "T":
        return [(EVERYONE, Action("S", 0, i))]
    return [(schedule.rank_of(0, i), Action("B", 0, i))] if kind == "IB" else []


def _forward(schedule: Schedule, rank: int, action: Action) -> list[Need]:
    _, stage, i, part = action
    found = []
    if stage:
        found.append((schedule.rank_of(stage - 1, i), Action("F", stage - 1, i, part)))
    elif schedule.vocabulary:
        found.append((EVERYONE, Action("IF", 0, i)))
    if part:
        found.append((rank, Action("F", stage, i, part - 1)))
    return found


def _backward(schedule: Schedule, rank: int, action: Action) -> list[Need]:
    _, stage, i, part = action
    found = [(rank, Action("F", stage, i, part))]
    if stage + 1 < schedule.stages:
        found.append((schedule.rank_of(stage + 1, i), Action("B", stage + 1, i, part)))
    elif schedule.vocabulary:
        found.append((EVERYONE, Action("S" if schedule.vocabulary == 2 else "T", 0, i)))
    if part + 1 < schedule.slices:
        found.append((rank, Action("B", stage, i, part + 1)))
    return found
