"""V-shaped placements: rank 0 holds the first and the last stage, so lifespans balance over ranks.

Letters  p ranks, m micro-batches, r a rank with stages r (a) and 2p-1-r (z); tF, tB, tW times and
         M the activations of one micro-batch on a p-th of the model, which is two stages here
In a straight pipeline rank 0 holds p micro-batches and the last one 1. On a V the rank that waits
longest for the backward of its first stage waits least for that of its second: all hold the same.
"""

from picotron_lab.schedules.actions import Action, Schedule
from picotron_lab.schedules.basic import folded
from picotron_lab.schedules.squeeze import Block, finite


def zb_v(p: int, m: int) -> Schedule:
    """No bubble in the steady state, in the memory of 1F1B.

    Ranks start and end staggered, so the gain is lost where the optimizer waits for all ranks.

    Rank r  stages r (a) and 2p-1-r (z), a fixed order made for tF = tB = tW; with fewer
            micro-batches than 2p-1 that of 2p-1, without those that do not exist
    Bubble  per stage, from its first start to its last end: 0 if tF = tB = tW
    Peak    2p chunks = p M on every rank, held until W
    Needs   nothing to run; m >= 2p-1 for the bubble above
    Source  Zero Bubble, arXiv 2401.10241, section 6
    """
    lists = []
    for r in range(p):
        names = _zb_v_names(p, r, max(m, 2 * p - 1))
        stages, count = {"a": r, "z": 2 * p - 1 - r}, dict.fromkeys(names, 0)
        actions = []
        for name in names:
            if count[name] < m:
                actions.append(Action(name[0], stages[name[1]], count[name]))
            count[name] += 1
        lists.append(tuple(actions))
    return Schedule("zb-v", tuple(lists), folded(p), m)


def _zb_v_names(p: int, r: int, m: int) -> list[str]:
    """A rank's order for m >= 2p-1, without micro-batches: the n-th Fa is that of micro-batch n."""
    later = ["Ba", "Wa", "Fz", "Bz", "Wz"]
    return [
        *["Fa"] * (2 * (p - r) - 1),
        *["Fz", "Fa"] * r,
        *["Fz", "Bz", "Wz"] * (p - r),
        *["Fa", *later] * (m - 2 * p + r + 1),  # the steady state
        *later * (p - r - 1),
        *["Ba", "Bz"] * r,
        *["Ba", "Wa"] * (p - r),
        *["Wz"] * r,
        *["Wa"] * r,
    ]


def v_half(p: int, m: int) -> Schedule:
    """Half the memory of 1F1B, and less than half of its bubble.

    Block   forwards move on every 2 units down the V and every 1 up, backwards likewise
    Bubble  for tF = tB = tW = 1 a chunk and m >= 2p: p even 3p-7 (p = 2: 1), p odd 3p-4 units of
            a chunk; 1F1B has 6(p-1)
    Peak    p+2 chunks (p even) or p+1 (p odd) on every rank, about p/2 M, held until W
    Needs   nothing to run
    Source  Pipeline Parallelism with Controllable Memory, arXiv 2405.15362, section 4
    """
    return finite("v-half", v_half_block(p), m)


def v_half_block(p: int) -> Block:
    """When the passes of micro-batch 0 run; `gap` keeps repeated blocks from colliding."""
    gap = 0 if p % 2 else 3
    starts = [
        (2 * r, 3 * p - 2 - r, 3 * p - 1 + gap + 2 * r, 6 * p - 2 + gap - r) for r in range(p)
    ]
    return Block(tuple(starts))


def v_min(p: int, m: int) -> Schedule:
    """A third of the memory of 1F1B, the least that a V can have, and two thirds of its bubble.

    Block   every pass moves on every unit
    Bubble  for tF = tB = tW = 1 a chunk and m >= 2p: at most 4p-5 units of a chunk; 1F1B has 6(p-1)
    Peak    2 ceil((p+2)/3) chunks on every rank, about p/3 M, held until W
    Needs   nothing to run
    Source  Pipeline Parallelism with Controllable Memory, arXiv 2405.15362, section 4
    """
    gap = 0 if p % 3 else 2
    starts = [(r, 2 * p - 1 - r, 2 * p + gap + r, 4 * p + gap - 1 - r) for r in range(p)]
    return finite("v-min", Block(tuple(starts)), m)


def v_1f1b(p: int, m: int) -> Schedule:
    """Whole backwards on a V: two thirds of the memory of 1F1B, and a smaller bubble.

    Block   forwards move on every unit; backwards, of 2 units, follow in threes, then 3 units wait
    Bubble  for tF = 1, tBW = 2 a chunk and m >= 2p: at most 5(p-1) units of a chunk, for p = 2 to 8
            4, 8, 15, 18, 22, 30, 33; 1F1B has 6(p-1)
    Peak    2 floor((2p+2)/3) chunks, 2 more if p is a multiple of 3: about 2p/3 M on every rank
    Needs   nothing to run
    Source  the authors' code of arXiv 2405.15362
    """
    begin = 2 * p + (0 if p % 3 else 3)
    back = [begin + 2 * k + 3 * ((k + (1 - p) % 3) // 3) for k in range(2 * p)]
    starts = [(r, 2 * p - 1 - r, back[r], back[2 * p - 1 - r]) for r in range(p)]
    return finite("v-1f1b", Block(tuple(starts), backward=2), m)
