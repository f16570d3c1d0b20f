"""Lesson 00, ranks and axes. Read README.md first; this is the only file that you edit."""

from torch import Tensor

from lessons import TODO
from picotron_lab.comm import Axis


def coordinates(rank: int, sizes: dict[str, int]) -> dict[str, int]:  # Task 00.1
    """Where a world rank sits on every axis of the mesh.

    sizes   {"pp": 2, "dp": 3, "cp": 1, "tp": 4}: always in the order in which the axes are nested,
            the first runs slowest, the last fastest
    Before  rank: a number from 0 to pp * dp * cp * tp - 1
    After   {axis: coordinate} for all four axes, each from 0 to its size - 1.
            Here rank 0 has tp 0, rank 1 has tp 1, rank 4 has dp 1 and tp 0
    Budget  no loop over ranks is needed: // and % do it
    """
    raise TODO("00.1")


def groups(sizes: dict[str, int], axis: str) -> list[list[int]]:  # Task 00.2
    """The groups of world ranks that form an axis: ranks that differ in that coordinate alone.

    Before  sizes as above
    After   every rank is in exactly one group; each group has sizes[axis] ranks, in rising order;
            the groups are in the order of their first ranks
    Budget  nothing is sent: every rank finds out by itself
    """
    raise TODO("00.2")


def sum_over(world: Axis, sizes: dict[str, int], axis: str, x: Tensor) -> Tensor:  # Task 00.3
    """The sum of x over the ranks of my group of that axis.

    `world.split(name, groups)` makes an Axis of the group that holds me. Every rank must call it,
    with the same groups.

    Before  x: a tensor of this rank
    After   a new tensor: the sum of the x of all ranks that differ from me in that coordinate
            alone; x is as it was
    Budget  one all_reduce of x, on an axis with the name of that axis; nothing on the world
    """
    raise TODO("00.3")


def pass_on(world: Axis, sizes: dict[str, int], x: Tensor) -> Tensor:  # Task 00.4
    """Give x to the next pipeline stage, and return what the previous one gave.

    The stages are the coordinates on pp. The next stage is the rank with the same dp, cp and tp.
    On an Axis ranks count from 0 to axis.size - 1: send(x, to=...) and recv(like, source=...) take
    these numbers, not world ranks. A send waits for its recv.

    Before  x: a tensor of this rank, of the same shape everywhere
    After   the x of the previous stage; zeros on the first stage, which nobody sends to
    Budget  one message of x to the next stage, on an axis named pp; nothing on the world, and
            nothing from the last stage
    """
    raise TODO("00.4")
