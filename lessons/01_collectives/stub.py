"""Lesson 01, collectives. Read README.md first; this is the only file that you edit.

Of an Axis use `rank`, `size`, `send`, `recv` and `exchange` only: the others are what you build.
"""

from torch import Tensor

from lessons import TODO
from picotron_lab.comm import Axis


def shift(x: Tensor, axis: Axis) -> Tensor:  # Task 01.1: this is broken, repair it
    """Give x to the next rank, get the previous rank's; the last rank gives to rank 0.

    Before  x: a tensor of this rank, of the same shape everywhere
    After   rank r has what rank r - 1 had
    Budget  one message of x per rank
    """
    axis.send(x, to=(axis.rank + 1) % axis.size)
    return axis.recv(x, source=(axis.rank - 1) % axis.size)


def ring_reduce_scatter(x: Tensor, axis: Axis) -> Tensor:  # Task 01.2
    """Add up x over all n ranks, and share out the rows of the sum. S: bytes of x.

    Only chunks travel, x cut into n of them: a rank adds its own rows to a chunk that comes by, and
    sends it on.

    Before  x [n * N, ...]: a term of this rank; it must be left as it is
    After   [N, ...]: rows r * N to (r + 1) * N - 1 of the sum, on rank r
    Budget  n - 1 messages of S / n to the next rank; never more than 3 chunks of S / n beside x
    """
    raise TODO("01.2")


def ring_all_gather(x: Tensor, axis: Axis) -> Tensor:  # Task 01.3
    """Put the rows of all n ranks together. S: bytes of the result.

    Before  x [N, ...]: the rows of this rank; it must be left as it is
    After   [n * N, ...]: all rows, in the order of the ranks, alike on all ranks
    Budget  n - 1 messages of S / n to the next rank
    """
    raise TODO("01.3")


def ring_all_reduce(x: Tensor, axis: Axis) -> Tensor:  # Task 01.4
    """Add up x over all n ranks; every rank gets the sum. S: bytes of x.

    Before  x: any shape, any number of elements, also one that n does not divide; it must be left
            as it is
    After   a tensor of the shape of x, alike on all ranks
    Budget  2 (n - 1) messages of ceil(elements / n) elements to the next rank;
            2 (n - 1) (latency + chunk / bandwidth) seconds: in each step all ranks send at once
    """
    raise TODO("01.4")
