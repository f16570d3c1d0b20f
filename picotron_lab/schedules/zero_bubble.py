"""Zero bubble: split the backward, and let weight gradients, which nobody waits for, fill gaps.

Letters  p ranks, m micro-batches, v stages per rank, r a rank, g a group of micro-batches;
         tF, tB, tW times on a p-th of the model, M the activations of one micro-batch there
B sends its result to the rank before, so it runs early; W can run any time later. Until then it
needs activations: the peaks count all of M up to W.
"""

from picotron_lab.schedules.actions import Action, Schedule
from picotron_lab.schedules.basic import chunk_order, group_size, looped, straight


def deferred(
    forwards: list[Action], backwards: list[Action], first: int, delay: int
) -> tuple[Action, ...]:
    """So many forwards first, then forward and B in turn; the W of each B so many Bs later."""
    weights = [action._replace(kind="W") for action in backwards]
    actions = forwards[:first]
    for k, backward in enumerate(backwards):
        actions += [*forwards[first + k : first + k + 1], backward]
        if k >= delay:
            actions.append(weights[k - delay])
    return (*actions, *weights[max(0, len(weights) - delay) :])


def _one_stage(name: str, p: int, m: int, factor: int) -> Schedule:
    """Rank r, with one stage: factor * (p-1-r) forwards ahead, W's factor * r B's behind."""
    lists = []
    for r in range(p):
        forwards = [Action("F", r, i) for i in range(m)]
        backwards = [Action("B", r, i) for i in range(m)]
        lists.append(deferred(forwards, backwards, factor * (p - 1 - r), factor * r))
    return Schedule(name, tuple(lists), straight(p), m)


def zb_h1(p: int, m: int) -> Schedule:
    """1F1B with its bubble cut to a third, in the memory of 1F1B's first rank.

    Rank r  stage r: p-1-r forwards, then F and B in turn; each W r B's later: all end together
    Bubble  (p-1)(tF+tB-tW), if tW is no longer than tF and tB
    Peak    min(m, p) M on every rank, held until W; held until B min(m, p-r) M
    Needs   nothing to run; m >= p for the bubble above
    Source  Zero Bubble, arXiv 2401.10241, section 2.2
    """
    return _one_stage("zb-h1", p, m, 1)


def zb_h2(p: int, m: int) -> Schedule:
    """No bubble in the steady state, for twice the memory: a parallelogram instead of a trapezoid.

    Ranks start and end staggered, so the gain is lost where the optimizer waits for all ranks.

    Rank r  stage r: 2(p-1-r) forwards, then F and B in turn; each W 2r B's later
    Bubble  per stage, from its first start to its last end: (p-1)(tF+tB-2tW), 0 for equal times, if
            tW is no longer than tF and tB
    Peak    min(m, 2p-1) M on every rank, held until W
    Needs   nothing to run; m >= 2p-1 for the bubble above
    Source  Zero Bubble, arXiv 2401.10241, section 2.3
    """
    return _one_stage("zb-h2", p, m, 2)


def interleaved_zb(p: int, m: int, v: int = 2) -> Schedule:
    """Interleaved 1F1B with split backwards.

    Rank r  stages r, r+p, ...; min(mv, (v-1)g+(p-1-r)) forwards, then F and B in turn; each W r B's
            later. Groups g and their order as in interleaved
    Bubble  (p-1)(tF+tB-tW) / v, if tW is no longer than tF and tB
    Peak    v p chunks = p M on every rank, held until W
    Needs   m a multiple of p for the above; else as interleaved
    Source  the zero-bubble order of torch.distributed.pipelining (ScheduleInterleavedZeroBubble)
    """
    group = group_size("interleaved-zb", p, m)
    forwards, backwards = chunk_order(p, v, m, group)
    lists = []
    for r in range(p):
        ahead = [Action("F", r + chunk * p, i) for chunk, i in forwards]
        back = [Action("B", r + chunk * p, i) for chunk, i in backwards]
        lists.append(deferred(ahead, back, (v - 1) * group + p - 1 - r, r))
    return Schedule("interleaved-zb", tuple(lists), looped(p, v), m)
