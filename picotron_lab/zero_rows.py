"""Rows: a tensor that is cut along dim 0 among n ranks, on its way from and to the wire.

Idea    ZeRO gives every rank some rows of each tensor, ceil(rows / n) of them; the last ranks have
        fewer or none. So a shard stays a rectangle, which its record can describe. On the wire all
        parts must be equal: rows that a rank lacks are sent as padding and dropped on arrival.
Plain   gather_rows, scatter_sum: a call for each tensor, results are new tensors
Fused   Group: one flat wire, rank after rank, so that one call serves many tensors
        Flights: such calls under way, each on a wire of its own
Read    shard_rows -> gather_rows -> scatter_sum | Group -> Flights
Tests   tests/test_zero.py
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

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
    """shard -> replicated (all_gather, all rows): the full tensor.

    No gradient flows through: zero_units.Boundary calls the transpose, scatter_sum, itself.
    """
    return axis.all_gather(pad(shard.detach(), -(-rows // axis.size)))[:rows]


def scatter_sum(part: Tensor, axis: Axis) -> Tensor:
    """partial -> shard (reduce_scatter, all rows): my rows of the sum over ranks.

    Not a mean: the loss was divided by the token count of the global batch already.
    """
    rows, held = -(-len(part) // axis.size), mine(part, axis)
    return axis.reduce_scatter(pad(part, rows * axis.size))[: held.stop - held.start]


def pad(x: Tensor, rows: int) -> Tensor:
    """x with zeros below until there are `rows`; x itself if it has them.

    Zeros, because padding is sent: unset memory would be noise.
    """
    before_and_after = (0, 0) * (x.dim() - 1) + (0, rows - len(x))  # F.pad begins with the last dim
    return F.pad(x, before_and_after) if len(x) < rows else x


# ---- gradients between steps


def set_to_zero(parameters: Sequence[nn.Parameter]) -> None:
    """Zero every gradient where it lies; make it if need be: no token may use the parameter."""
    for p in parameters:
        if p.grad is None:
            p.grad = sharding.zero_gradient(p)
        p.grad.zero_()


def forget(parameters: Sequence[nn.Parameter]) -> None:
    """Free the full gradients."""
    for parameter in parameters:
        parameter.grad = None


# ---- many tensors in one call


class Group:
    """Tensors that travel together on a wire [n, size / n].

    Row r of the wire has, tensor after tensor, rank r's rows and padding up to ceil(rows / n).

    like   tensors of the full shapes, and of one dtype
    parts  shapes of what each rank has of them on the wire
    size   elements of the wire
    """

    def __init__(self, like: Sequence[Tensor], axis: Axis):
        dtypes = {x.dtype for x in like}
        assert len(dtypes) <= 1, (
            f"tensors of dtypes {sorted(map(str, dtypes))} cannot travel on one wire: give the "
            "weights of a model one dtype."
        )
        self.axis = axis
        self.parts = [(-(-len(x) // axis.size), *x.shape[1:]) for x in like]
        self.size = axis.size * sum(map(math.prod, self.parts))

    def gather(self, shards: Sequence[Tensor], wire: Tensor) -> Handle:
        """shard -> replicated (all_gather, the group), under way: all shards lie on the wire."""
        for place, shard in zip(self.mine(shards, wire), shards, strict=True):
            place.copy_(shard.detach())
        return self.axis.all_gather(self._own(wire), out=wire, wait=False)

    def reduce(self, gradients: Sequence[Tensor | None], wire: Tensor) -> Handle:
        """partial -> shard (reduce_scatter, the group), under way: the sum lies in my row.

        gradients   full ones; None counts as zero: other ranks may have one
        """
        for place, gradient in zip(self._places(wire), gradients, strict=True):
            if gradient is None:
                place.zero_()
                continue
            for there, here in pairs(place, gradient):
                there.copy_(here)
        return self.axis.reduce_scatter(wire, out=self._own(wire), wait=False)

    def mine(self, shards: Sequence[Tensor], wire: Tensor) -> list[Tensor]:
        """Of each tensor my rows on the wire, of the shape of my shard."""
        places = zip(self._places(wire), shards, strict=True)
        return [place[self.axis.rank, : len(shard)] for place, shard in places]

    def add_sums(self, shards: Sequence[nn.Parameter], wire: Tensor) -> None:
        """Add what reduce has brought to every shard.grad."""
        for shard, total in zip(shards, self.mine(shards, wire), strict=True):
            shard.grad += total

    def unpack(self, fulls: Sequence[Tensor], wire: Tensor) -> None:
        """Copy what lies on the wire into full tensors."""
        for place, full in zip(self._places(wire), fulls, strict=True):
            for there, here in pairs(place, full):
                here.copy_(there)

    def _own(self, wire: Tensor) -> Tensor:
        return wire[self.axis.rank :][:1]

    def _places(self, wire: Tensor) -> list[Tensor]:
        """Where each tensor lies: [n, ceil(rows / n), ...]."""
        pieces = wire.split([math.prod(part) for part in self.parts], 1)
        return [piece.unflatten(1, part) for piece, part in zip(pieces, self.parts, strict=True)]


def pairs(place: Tensor, full: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of equal shape on the wire and of a full tensor, a pair per rank: all but padding."""
    for rank, part in enumerate(full.split(max(1, place.shape[1]))):
        yield place[rank, : len(part)], part


class Memory:
    """Flat bytes that grow to their largest use and then stay: later uses allocate nothing."""

    def __init__(self, device: torch.device | str = "cpu", size: int = 0):
        self.bytes = torch.zeros(size, dtype=torch.uint8, device=device)

    def elements(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """`size` elements; those taken before lie in the same place."""
        needed = size * dtype.itemsize
        if len(self.bytes) < needed:  # zeros, because padding is sent
            self.bytes = torch.zeros(needed, dtype=torch.uint8, device=device)
        return self.bytes[:needed].view(dtype)


class Flights:
    """Reduce-scatters and all-gathers of groups under way, each on a wire of its own.

    size   bytes of a wire to begin with
    """

    def __init__(self, wires: int, device: torch.device, size: int = 0):
        self.device = device
        self.free = deque(Memory(device, size) for _ in range(wires))
        self.under_way: deque[tuple[Memory, Handle, Callable[[], None]]] = deque()

    @property
    def buffers(self) -> list[Tensor]:
        """The wires; those of calls under way are missing."""
        return [memory.bytes for memory in self.free]

    def start(
        self,
        group: Group,
        dtype: torch.dtype,
        send: Callable[[Tensor], Handle],
        landed: Callable[[Tensor], None],
    ) -> None:
        """send(wire) starts a call; when it is over, landed(wire) takes what it brought.

        Where no wire is free, the oldest call must land first.
        """
        if not self.free:
            self._land()
        memory, n = self.free.popleft(), group.axis.size
        wire = memory.elements(group.size, dtype, self.device).view(n, group.size // n)
        self.under_way.append((memory, send(wire), partial(landed, wire)))

    def land(self) -> None:
        """Wait for all calls."""
        while self.under_way:
            self._land()

    def _land(self) -> None:
        memory, call, landed = self.under_way.popleft()
        call.wait()
        landed()
        self.free.append(memory)
