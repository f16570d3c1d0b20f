"""DualPipe: micro-batches enter at both ends, so each rank pairs a forward with another's backward.

Letters  p ranks, m micro-batches, r a rank; H ranks from one end to the middle, h of them before
         this rank, n micro-batches of each direction; BW a whole backward, F&BW an overlapped pair
The pair hides the communication of one (all-to-all of the experts, above all) behind the compute of
the other. With F&BW = F + BW, as where only compute takes time, nothing is gained by it.
"""

from collections.abc import Iterator

from picotron_lab.schedules.actions import Action, Item, Pair, Schedule, ScheduleError
from picotron_lab.schedules.basic import folded


def steps(half: int, before: int, n: int) -> list[str]:
    """A rank's list, without micro-batches: 0 is the direction that enters nearer to it.

    n forwards and n backwards of both directions; a plain W is that of the oldest split B
    """
    rest = half - before - 1  # ranks between this one and the middle
    pairs = ["F0&BW1", "F1&BW0"] * (n - 2 * half + before + 1)
    if rest == 0:
        pairs[:1] = ["F0", "BW1"]  # in the middle the first pair would only make others wait
    backwards = ["BW"] * (before + 1) + ["B"] * (before + 1)
    return [
        *["F0"] * (2 * rest),
        *["F0", "F1"] * (before + 1),
        *["B1", "W", "F1"] * rest,
        *pairs,
        *["BW1", "F1&BW0"] * rest,
        *(kind + "10"[i % 2] for i, kind in enumerate(backwards)),
        *["W", "B0"] * rest,
        *["W"] * (before + 1),
    ]


def numbered(names: list[str], stages: tuple[int, int], firsts: tuple[int, int]) -> Iterator[Item]:
    """The items of those steps: direction d is on stages[d], its micro-batches from firsts[d]."""
    count = {(way, d): firsts[d] for way in "FB" for d in (0, 1)}
    split: list[Action] = []

    def action(name: str) -> Action:
        kind, d = name[:-1], int(name[-1])
        i = count[kind[0], d]
        count[kind[0], d] += 1
        return Action(kind, stages[d], i)

    for name in names:
        if name == "W":
            yield split.pop(0)._replace(kind="W")
            continue
        actions = [action(part) for part in name.split("&")]
        split += [a for a in actions if a.kind == "B"]
        yield Pair(*actions) if len(actions) == 2 else actions[0]


def dual_pipe(p: int, m: int) -> Schedule:
    """Two pipelines through the same ranks in opposite directions, each with its own parameters.

    Gradients of stage s must be summed between ranks s and p-1-s, which both hold it.

    Rank r  stage r for micro-batches 0..m/2-1, stage p-1-r for the others. steps() with H = p/2,
            h = min(r, p-1-r), n = m/2
    Bubble  (p/2-1)(tF&BW + tBW - 3tW) if tF = tB, and tW is no longer; (p/2-1)(3tF - tW) without
            gain from pairs. With gain it is the makespan minus the work of the ranks in the middle,
            which run most pairs
    Peak    (p+1) M on every rank, and every parameter twice
    Needs   p even, m even, m >= 2p
    Source  DeepSeek-V3, arXiv 2412.19437, section 3.2.1 and the authors' repository
    """
    if p % 2:
        raise ScheduleError(
            f"dualpipe needs an even number of ranks, which face each other, not {p}: "
            f"choose dualpipe-v, or the even number {p + 1}."
        )
    if m % 2 or m < 2 * p:
        raise ScheduleError(
            f"dualpipe with {p} ranks needs an even number of micro-batches, {2 * p} or more, "
            f"not {m}: choose {max(2 * p, m + m % 2)}."
        )
    lists = []
    for r in range(p):
        names = steps(p // 2, min(r, p - 1 - r), m // 2)
        ways = [(r, 0), (p - 1 - r, m // 2)]  # stage and first micro-batch of each direction
        stages, firsts = zip(*(ways if r < p // 2 else ways[::-1]), strict=True)
        lists.append(tuple(numbered(names, stages, firsts)))
    placement = tuple((r, p - 1 - r) for r in range(p))
    return Schedule("dualpipe", tuple(lists), placement, m, replicated=True)


def dual_pipe_v(p: int, m: int) -> Schedule:
    """DualPipe cut in half: the second direction is the way back through the same ranks.

    Rank r  stages r and 2p-1-r. steps() with H = p, h = r, n = m
    Bubble  (p-1)(tF&BW + tBW - 3tW), times of one stage, half a rank's layers; see dual_pipe
    Peak    min(2p+1, 2m) stages = (p+1/2) M on every rank; every parameter once
    Needs   m >= 2p
    Source  the authors' repository, after "Cut-in-half" by Sea AI Lab
    """
    if m < 2 * p:
        raise ScheduleError(
            f"dualpipe-v with {p} ranks needs {2 * p} or more micro-batches, not {m}: "
            f"choose {2 * p}."
        )
    placement = folded(p)
    lists = [tuple(numbered(steps(p, r, m), placement[r], (0, 0))) for r in range(p)]
    return Schedule("dualpipe-v", tuple(lists), placement, m)
