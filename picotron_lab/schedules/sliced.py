"""Sequences cut into slices that follow each other through the pipeline, as micro-batches do.

Letters  p ranks, m micro-batches, n slices of each, r a rank;
         tF, tB, tW times of a whole micro-batch on one stage, M its activations there
A later slice attends to the keys and values of the earlier ones, so forwards go through a sequence
from its start to its end, and backwards from its end to its start.
"""

from picotron_lab.schedules.actions import Action, Schedule
from picotron_lab.schedules.basic import alternate, straight


def seq1f1b(p: int, m: int, n: int = 4) -> Schedule:
    """1F1B over slices: the pipeline fills n times faster, and holds less.

    Rank r  stage r: p-r-2+n forward slices, then F and BW of one slice in turn. The k-th forward is
            slice k % n of micro-batch k // n, the k-th backward slice n-1 - k % n of k // n
    Bubble  (p-1)(tF+tB+tW) / n for slices that take equal times
    Peak    min(m n, p-r-1+n) slices, of M/n each
    Needs   nothing to run; m n >= p + n - 1 for the peak above on all ranks
    Source  Seq1F1B, arXiv 2406.03488
    """
    lists = []
    for r in range(p):
        forwards = [Action("F", r, i, k) for i in range(m) for k in range(n)]
        backwards = [Action("BW", r, i, k) for i in range(m) for k in reversed(range(n))]
        lists.append(alternate(forwards, backwards, p - r - 2 + n))
    return Schedule("seq1f1b", tuple(lists), straight(p), m, slices=n)
