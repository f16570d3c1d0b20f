"""Rows: a tensor that is cut along dim 0 among ranks, on its way from and to the wire.

Idea    ZeRO gives every rank some rows of each tensor, ceil(rows / n) of them; the last ranks have
        fewer or none. So a shard stays a rectangle, which its record can describe. On the wire all
        parts must be equal: rows that a rank lacks are sent as padding and dropped on arrival.
        One tensor     gather_rows, scatter_sum: a call each, results are new tensors
        Many at once   Group: one flat wire, rank after rank, so that one call serves them all
Dims    N ranks  K elements that each rank holds of a group of tensors, with padding
Read    shard_rows -> gather_rows -> scatter_sum -> Group -> Flights
Tests   tests/test_zero.py
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from picotron_lab import sharding
from picotron_lab.comm import Axis, Handle


def mine(full: Tensor, axis: Axis) -> slice:
    """The rows of a full tensor that this rank holds."""
    return slice(*sharding.bounds(len(full), axis.size, axis.rank))


def shard_rows(parameter: nn.Parameter, axis: Axis) -> nn.Parameter:
    """This rank's rows of a parameter, a view of them; the record knows that no other has them."""
    others = {
        field: tuple(name for name in getattr(parameter.record, field) if name != axis.name)
        for field in ("replicas", "partial")
    }
    rows = mine(parameter, axis)
    shard = sharding.narrow(parameter, 0, rows.start, rows.stop, **others)
    shard.data = parameter.data[rows]  # narrow makes a copy, which would be memory for nothing
    shard.grad_dtype = parameter.grad_dtype
    return shard


def gather_rows(shard: Tensor, rows: int, axis: Axis) -> Tensor:
    """shard -> replicated (all_gather, all rows): the full tensor. Backward: scatter_sum."""
    return axis.all_gather(pad(shard.detach(), -(-rows // axis.size)))[:rows]


def scatter_sum(part: Tensor, axis: Axis) -> Tensor:
    """partial -> shard (reduce_scatter, all rows): my rows of the sum over ranks.

    Not a mean: the loss was divided by the token count of the global batch already.
    """
    rows, held = -(-len(part) // axis.size), mine(part, axis)
    return axis.reduce_scatter(pad(part, rows * axis.size))[: held.stop - held.start]


def pad(x: Tensor, rows: int) -> Tensor:
    """x with rows of zeros added until there are `rows`; x itself if it has them."""
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, rows - len(x))) if len(x) < rows else x


class Group:
    """Tensors that travel together: row r of wire_NK holds rank r's rows of each, then padding.

    shapes   of the full tensors
    size     elements of wire_NK
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], axis: Axis):
        self.axis, self.shapes = axis, list(shapes)
        self.parts = [(-(-rows // axis.size), *rest) for rows, *rest in self.shapes]
        self.sizes = [math.prod(part) for part in self.parts]
        self.size = axis.size * sum(self.sizes)

    def gather(self, wire_NK: Tensor, shards: Sequence[Tensor]) -> Handle:
        """shard -> replicated (all_gather, the group), under way: all shards lie on the wire."""
        own_1K = self._own(wire_NK)
        for part, shard in zip(self.mine(wire_NK, shards), shards, strict=True):
            part.copy_(shard.detach())
        return self.axis.all_gather(own_1K, out=wire_NK, wait=False)

    def reduce(self, wire_NK: Tensor, gradients: Sequence[Tensor | None]) -> Handle:
        """partial -> shard (reduce_scatter, the group), under way: the sum lies in my row.

        gradients   full ones; None counts as zero: other ranks may have one
        """
        for place, gradient in zip(self._places(wire_NK), gradients, strict=True):
            if gradient is None:
                place.zero_()
            else:
                for there, here in pairs(place, gradient):
                    there.copy_(here)
        return self.axis.reduce_scatter(wire_NK, out=self._own(wire_NK), wait=False)

    def mine(self, wire_NK: Tensor, shards: Sequence[Tensor]) -> list[Tensor]:
        """Of each tensor my rows on the wire, of the shape of my shard."""
        parts = self._own(wire_NK)[0].split(self.sizes)
        return [part[: s.numel()].view(s.shape) for part, s in zip(parts, shards, strict=True)]

    def unpack(self, wire_NK: Tensor, fulls: Sequence[Tensor]) -> None:
        """Copy what lies on the wire into full tensors."""
        for place, full in zip(self._places(wire_NK), fulls, strict=True):
            for there, here in pairs(place, full):
                here.copy_(there)

    def fulls(self, flat: Tensor) -> list[Tensor]:
        """Full tensors one after the other in flat memory of `size` elements."""
        pieces = flat.split([self.axis.size * size for size in self.sizes])
        n, shapes = self.axis.size, zip(self.parts, self.shapes, strict=True)
        shapes = [((n * rows, *rest), shape[0]) for (rows, *rest), shape in shapes]
        return [x.view(padded)[:rows] for x, (padded, rows) in zip(pieces, shapes, strict=True)]

    def _own(self, wire_NK: Tensor) -> Tensor:
        return wire_NK[self.axis.rank :][:1]

    def _places(self, wire_NK: Tensor) -> list[Tensor]:
        """Where each tensor lies: [N, rows, ...]."""
        pieces = zip(wire_NK.split(self.sizes, 1), self.parts, strict=True)
        return [piece.unflatten(1, part) for piece, part in pieces]


def pairs(place: Tensor, full: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of equal shape of [N, rows, ...] on the wire and of a full tensor: all but padding."""
    rows = place.shape[1]
    whole, rest = divmod(len(full), rows)
    yield place[:whole], full[: whole * rows].unflatten(0, (whole, rows))
    if rest:
        yield place[whole, :rest], full[whole * rows :]


class Memory:
    """Flat bytes that grow to their largest use and then stay: later uses allocate nothing."""

    def __init__(self) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8)

    def elements(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """`size` elements; those taken before lie in the same place."""
        needed = size * dtype.itemsize
        if len(self.bytes) < needed:
            self.bytes = torch.zeros(needed, dtype=torch.uint8, device=device)
        return self.bytes[:needed].view(dtype)


class Flights:
    """Reduce-scatters and all-gathers of groups under way, each on a wire of its own.

    Who finds no wire free waits for the oldest call first.
    """

    def __init__(self, wires: int):
        self.free = [Memory() for _ in range(wires)]
        self.under_way: deque[tuple[Memory, Handle, Callable[[], None]]] = deque()

    def wire(self, group: Group, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Room for a group: [N, K]. The call that will use it must `start` before the next asks."""
        if not self.free:
            self._land()
        return self.free[0].elements(group.size, dtype, device).view(group.axis.size, -1)

    def start(self, call: Handle, landed: Callable[[], None]) -> None:
        """The call on the last wire given is under way; when it is over, `landed` is called."""
        self.under_way.append((self.free.pop(0), call, landed))

    def land(self) -> None:
        """Wait for all calls."""
        while self.under_way:
            self._land()

    def _land(self) -> None:
        memory, call, landed = self.under_way.popleft()
        call.wait()
        landed()
        self.free.append(memory)
