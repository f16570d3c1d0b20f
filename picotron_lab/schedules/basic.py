"""Schedules with whole backwards: all forwards first, one-forward-one-backward, interleaved.

Letters  p ranks, m micro-batches, v stages per rank, r a rank, g a group of micro-batches;
         tF, tB, tW times on a p-th of the model, M the activations of one micro-batch there
All of them are one rule: some forwards first, then a forward and a backward in turn.
They differ in how many come first (more hide more, and hold more) and in who owns which stage.
"""

from collections.abc import Callable

from picotron_lab.schedules.actions import Action, Schedule, ScheduleError


def alternate(forwards: list[Action], backwards: list[Action], first: int) -> tuple[Action, ...]:
    """So many forwards first, then one forward and one backward in turn, while there are any."""
    actions = forwards[:first]
    for k, backward in enumerate(backwards):
        actions += [*forwards[first + k : first + k + 1], backward]
    return tuple(actions)


def straight(p: int) -> tuple[tuple[int, ...], ...]:
    """Placement with one stage per rank: rank r owns stage r."""
    return tuple((r,) for r in range(p))


def looped(p: int, v: int) -> tuple[tuple[int, ...], ...]:
    """Placement with v stages per rank, dealt like cards: rank r owns r, r + p, r + 2p, ..."""
    return tuple(tuple(range(r, p * v, p)) for r in range(p))


def folded(p: int) -> tuple[tuple[int, ...], ...]:
    """Placement with two stages per rank in a V, down and up again: rank r owns r and 2p-1-r."""
    return tuple((r, 2 * p - 1 - r) for r in range(p))


def _one_stage(name: str, p: int, m: int, first: Callable[[int], int]) -> Schedule:
    """One stage per rank; first(r) forwards before the first backward's turn."""
    lists = []
    for r in range(p):
        forwards = [Action("F", r, i) for i in range(m)]
        backwards = [Action("BW", r, i) for i in range(m)]
        lists.append(alternate(forwards, backwards, first(r)))
    return Schedule(name, tuple(lists), straight(p), m)


def afab(p: int, m: int) -> Schedule:
    """All forwards, then all backwards (GPipe): the simplest, and m micro-batches in memory.

    Rank r  stage r: F r.0 ... F r.m-1, BW r.0 ... BW r.m-1. The paper draws the backwards in
            descending order; ascending costs the same, and is what engines run
    Bubble  (p-1)(tF+tB+tW)
    Peak    m M on every rank
    Needs   nothing
    Source  GPipe, arXiv 1811.06965, section 2.3
    """
    return _one_stage("afab", p, m, lambda r: m)


def one_f_one_b(p: int, m: int) -> Schedule:
    """1F1B: a backward as soon as there is one, so early micro-batches free their memory.

    Rank r  stage r: p-1-r forwards, then F and BW in turn, then the remaining BW
    Bubble  (p-1)(tF+tB+tW), that of afab: only the memory is less
    Peak    min(m, p-r) M
    Needs   nothing
    Source  Megatron-LM, arXiv 2104.04473, section 2.2.1
    """
    return _one_stage("1f1b", p, m, lambda r: p - 1 - r)


def eager_1f1b(p: int, m: int) -> Schedule:
    """1F1B with twice the forwards ahead, so a message has a whole period to arrive.

    Rank r  stage r: 2(p-1-r) forwards, then F and BW in turn, then the remaining BW
    Bubble  (p-1)(tF+tB+tW); slow transfers, up to half a period each, add less than in 1F1B
    Peak    min(m, 2(p-r)-1) M
    Needs   nothing
    Source  JaxPP, arXiv 2412.14374
    """
    return _one_stage("eager-1f1b", p, m, lambda r: 2 * (p - 1 - r))


def group_size(name: str, p: int, m: int) -> int:
    """How many micro-batches pass one chunk before a rank turns to its next: p, or near it.

    Raises  ScheduleError if the m micro-batches do not fall into equal groups of at least p
    """
    groups = max(1, m // p)
    if m % groups:
        raise ScheduleError(
            f"{name} with {p} ranks cannot group {m} micro-batches evenly into {groups}: "
            f"choose a multiple of {p}, such as {groups * p}."
        )
    return m // groups


def chunk_order(p: int, v: int, m: int, group: int) -> list[list[tuple[int, int]]]:
    """(chunk, micro-batch) of every forward and of every backward of an interleaved rank."""
    ks = range(m * v)
    numbers = [(k // group % v, k // (group * v) * group + k % group) for k in ks]
    return [numbers, [(v - 1 - chunk, i) for chunk, i in numbers]]


def interleaved(p: int, m: int, v: int = 2) -> Schedule:
    """1F1B over v stages per rank: the pipeline fills v times faster, for v times the messages.

    Rank r  stages r, r+p, ..., r+(v-1)p; min(mv, (v-1)g+2(p-1-r)) forwards, then F and BW in turn.
            Micro-batches come in groups of g = p: the k-th forward is of chunk k // g % v
    Bubble  (p-1)(tF+tB+tW) / v
    Peak    min(mv, (v-1)p + 2(p-1-r) + 1) M/v; on rank 0 (1 + (p-1)/(pv)) p M, more than 1F1B
    Needs   m a multiple of p for the above; to run, one of max(1, m // p): g = m / max(1, m // p)
    Source  Megatron-LM, arXiv 2104.04473, section 2.2.2
    """
    group = group_size("interleaved", p, m)
    forwards, backwards = chunk_order(p, v, m, group)
    lists = []
    for r in range(p):
        ahead = [Action("F", r + chunk * p, i) for chunk, i in forwards]
        back = [Action("BW", r + chunk * p, i) for chunk, i in backwards]
        lists.append(alternate(ahead, back, (v - 1) * group + 2 * (p - 1 - r)))
    return Schedule("interleaved", tuple(lists), looped(p, v), m)
