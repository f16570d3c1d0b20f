"""Sequences cut into slices that follow each other through the pipeline, as micro-batches do.

Letters  p ranks, m micro-batches, n slices of each, r a rank;
         tF, tB, tW times of a whole micro-batch on one stage, M its activations there
A later slice attends to the keys and values of the earlier ones, so forwards go through a sequence
from its start to its end, and backwards from its end to its start.
"""

from collections.abc import Iterator
from dataclasses import replace

from picotron_lab.schedules.actions import (
    Action,
    Item,
    Pair,
    Schedule,
    ScheduleError,
    parts,
)
from picotron_lab.schedules.basic import alternate, straight


def within(schedule: Schedule, n: int) -> Schedule:
    """The same order of micro-batches, each action now one on each slice of its micro-batch.

    Forwards take the slices from first to last, backwards from last to first; a pair of a forward
    and a backward becomes n pairs.
    Source  TeraPipe, arXiv 2102.07988, appendix on gradient accumulation, for 1F1B
    """
    if n > 1 and schedule.vocabulary:
        raise ScheduleError(
            f"token slices {n} do not fit {schedule.name}, which runs whole sequences: choose "
            "seq1f1b, or 1f1b."
        )
    lists = [tuple(part for item in items for part in _cut(item, n)) for items in schedule.lists]
    return replace(schedule, lists=tuple(lists), slices=n)


def _cut(item: Item, n: int) -> Iterator[Item]:
    """One item for each slice, in order."""
    for k in range(n):
        if isinstance(item, Pair):
            yield Pair(*(_on(action, k, n) for action in parts(item)))
        else:
            yield _on(item, k, n)


def _on(action: Action, k: int, n: int) -> Action:
    """An action on the slice that comes k-th in its direction."""
    return action._replace(slice=k if action.kind == "F" else n - 1 - k)


def terapipe(p: int, m: int, n: int = 4) -> Schedule:
    """All slices of all sequences forward, then all backward in the opposite order.

    Bubble  (p-1)(tF+tB+tW) / n for slices that take equal times; for any others the time of a step
            is sum of all + (p-1) (longest F + longest BW)
    Peak    m: as afab, for all slices wait for their backward
    Needs   nothing to run; which slices: slicing.py
    Source  TeraPipe, arXiv 2102.07988, section 3
    """
    order = [(i, k) for i in range(m) for k in range(n)]
    lists = [
        tuple(Action("F", r, i, k) for i, k in order)
        + tuple(Action("BW", r, i, k) for i, k in reversed(order))
        for r in range(p)
    ]
    return Schedule("terapipe", tuple(lists), straight(p), m, slices=n)


def seq1f1b(p: int, m: int, n: int = 4) -> Schedule:
    """1F1B over slices: the pipeline fills n times faster, and holds less.

    Rank r  stage r: p-r-2+n forward slices, then F and BW of one slice in turn. The k-th forward is
            slice k % n of micro-batch k // n, the k-th backward slice n-1 - k % n of k // n
    Bubble  (p-1)(tF+tB+tW) / n for slices that take equal times
    Peak    min(m n, p-r-1+n) slices, of M/n each
    Needs   nothing to run
    Source  Seq1F1B, arXiv 2406.03488
    """
    lists = []
    for r in range(p):
        forwards = [Action("F", r, i, k) for i in range(m) for k in range(n)]
        backwards = [Action("BW", r, i, k) for i in range(m) for k in reversed(range(n))]
        lists.append(alternate(forwards, backwards, p - r - 2 + n))
    return Schedule("seq1f1b", tuple(lists), straight(p), m, slices=n)
