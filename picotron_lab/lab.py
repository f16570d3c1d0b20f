"""The lab: N ranks as threads of one process, which a laptop, a notebook and a test can watch.

    def step(axis):                      # an ordinary function, also one from a notebook cell
        return axis.all_reduce(torch.tensor([float(axis.rank)]))
    run_ranks(step, 4)                   # [tensor([6.]), tensor([6.]), tensor([6.]), tensor([6.])]

Idea    A baton (baton.py) lets exactly one rank run; it changes hands only inside communication. So
        prints come in one order, breakpoint() stops the whole world, and a deadlock is known at
        once: nobody can run.
Rules   Each rank has its own random state (torch, numpy, random), as in a process of its own.
        Tensors and modules that several ranks can reach are shared: make them inside the function.
        A rank's dispatch modes (a memory meter) see its own tensors, not the lab's copies: what
        the lab does with copies, it does `unmetered`.
        `seed=` fuzzes who runs next: what depends on luck in real life fails here for some seed. A
        send waits for its recv, as it may in real life. An input changed before wait() is an error,
        and so is a call that not every rank made.
Time    `network=` gives ranks a virtual time (clock.py); without it, now() and spend() are real.
Not     faster than one rank. Reductions add in rank order in the dtype of the tensor.
Read    run_ranks -> Threads -> Meeting, then baton.py        Tests  tests/test_lab.py
"""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from picotron_lab.alone import Work
from picotron_lab.baton import Baton
from picotron_lab.buffers import describe, unmetered
from picotron_lab.clock import Clock, Network, VirtualClock
from picotron_lab.comm import Axis
from picotron_lab.ledger import Call, CommError, Ledger, wire_bytes
from picotron_lab.notes import rows_disagree


def run_ranks(
    function: Callable[..., Any],
    size: int,
    *args: Any,
    seed: int | None = None,
    network: Network | None = None,
) -> list[Any]:
    """Call function(axis, *args) on `size` ranks; return their results in rank order.

    seed     None: ranks take turns in order. A number: a random but repeatable order.
    network  of the model by which the virtual time of ranks passes; None: time is real
    raises   the exception of the first rank that failed, with a note of its number; CommError when
             ranks cannot go on together
    """
    if size < 1:
        raise CommError(f"run_ranks needs at least 1 rank, it was asked for {size}.")
    baton, meeting = Baton(size, seed), Meeting()
    results: list[Any] = [None] * size

    def rank_main(rank: int) -> None:
        # backward must run in this thread: a collective inside it needs the baton
        with torch.autograd.set_multithreading_enabled(False):
            clock = VirtualClock(network) if network else Clock()
            world = Threads(baton, meeting, clock, rank, range(size), "world")
            axis = Axis("world", range(size), rank, world, Ledger(), clock)
            results[rank] = function(axis, *args)

    baton.run(rank_main)
    meeting.check_empty()
    return results


# ---- where ranks meet


@dataclass
class Slot:
    """One collective of one group: filled by each rank, read by each rank."""

    call: Call  # of the rank that came first
    parts: dict[int, Any] = field(default_factory=dict)
    results: list[Any] | None = None
    arrival: float = 0.0  # of what the ranks sent that have come

    def there(self) -> float:
        """When the result is there for all; inf while a rank has not come."""
        return math.inf if self.results is None else self.arrival


@dataclass
class Parcel:
    """One send or recv, until its counterpart comes."""

    call: Call
    x: Tensor  # a copy of what is sent, or room for what is received
    arrival: float | None  # of what is sent; None: this is a recv
    there: float = math.inf  # when its rank may go on; inf while its counterpart has not come

    @property
    def sends(self) -> bool:
        """Whether this is a send."""
        return self.arrival is not None


class Meeting:
    """The table on which ranks leave tensors for each other; shared by all ranks of a world."""

    def __init__(self) -> None:
        self.calls: dict[tuple, int] = defaultdict(int)  # collectives of each rank on each group
        self.slots: dict[tuple, Slot] = {}  # the k-th collectives of a group meet in one slot
        self.mail: dict[tuple, deque[Parcel]] = defaultdict(deque)

    def check_empty(self) -> None:
        """All ranks are done: no call may be left over that another rank never made."""
        left = [
            f"no other rank than {', '.join(map(str, slot.parts))} ever made {slot.call.in_full()}."
            for slot in self.slots.values()
        ]
        left += [
            f"nobody answered {parcel.call.in_full()} or waited for it."
            for queue in self.mail.values()
            for parcel in queue
        ]
        if left:
            raise CommError(left[0])


class Threads:
    """The world of one rank-thread on one group of ranks."""

    def __init__(
        self, baton: Baton, meeting: Meeting, clock: Clock, me: int, ranks: Sequence[int], name: str
    ) -> None:
        self._baton, self._meeting, self._clock, self._me = baton, meeting, clock, me
        self._ranks, self._group = tuple(ranks), (name, *ranks)

    def all_reduce(self, call: Call, out: Tensor, op: str) -> Work:
        return self._meet(call, out, out, lambda xs: [_reduce(xs, op)] * len(xs))

    def all_gather(self, call: Call, out: Tensor, x: Tensor) -> Work:
        return self._meet(call, x, out, lambda xs: [torch.cat(xs)] * len(xs))

    def reduce_scatter(self, call: Call, out: Tensor, x: Tensor, op: str) -> Work:
        return self._meet(call, x, out, lambda xs: _reduce(xs, op).tensor_split(len(xs)))

    def broadcast(self, call: Call, out: Tensor, source: int) -> Work:
        return self._meet(call, out, out, lambda xs: [xs[source]] * len(xs))

    def barrier(self, call: Call) -> Work:
        with unmetered():
            nothing = torch.empty(0)
        return self._meet(call, nothing, nothing, lambda xs: xs)

    def all_to_all(
        self, call: Call, out: Tensor, x: Tensor, receive_rows: list[int], send_rows: list[int]
    ) -> Work:
        def deal(xs: list[Tensor], counts: list[tuple]) -> list[Tensor]:
            for i, (send, _) in enumerate(counts):
                for j, (_, receive) in enumerate(counts):
                    if send[j] != receive[i]:
                        ranks = self._ranks[i], self._ranks[j]
                        raise CommError(rows_disagree(call, ranks, send[j], receive[i]))
            shards = [x.split(send) for x, (send, _) in zip(xs, counts, strict=True)]
            return [torch.cat([mine[j] for mine in shards]) for j in range(len(xs))]

        return self._meet(call, x, out, deal, (send_rows, receive_rows))

    def exchange(self, call: Call, sends: list, receives: list) -> Work:
        self._baton.enter(self._me, call.in_full())
        given = [(x, _copy(x)) for x, _ in sends]
        parcels = [
            self._post(Parcel(call, copy, self._clock.send(copy.nbytes)), self._me, self._ranks[to])
            for (_, copy), (_, to) in zip(given, sends, strict=True)
        ]
        parcels += [
            self._post(Parcel(call, out, None), self._ranks[source], self._me)
            for out, source in receives
        ]

        def collect() -> None:
            for x, copy in given:
                _check_unchanged(call, x, copy)

        def there() -> float:
            return max(parcel.there for parcel in parcels)

        return Waiting(self._baton, self._clock, self._me, call, there, collect)

    def split(self, call: Call, mine: list[int]) -> "Threads":
        return Threads(self._baton, self._meeting, self._clock, self._me, mine, call.axis)

    def _meet(
        self, call: Call, x: Tensor, out: Tensor, combine: Callable, counts: Any = None
    ) -> Work:
        """Leave my part; whoever comes last combines all parts; wait() copies my share to out."""
        self._baton.enter(self._me, call.in_full())
        copy = _copy(x)
        slot = self._join_slot(call)
        slot.parts[self._me] = (copy, counts)
        size = wire_bytes(call.op, call.bytes, len(self._ranks))
        slot.arrival = max(slot.arrival, self._clock.send(size))
        if len(slot.parts) == len(self._ranks):
            parts = [slot.parts[r] for r in self._ranks]
            xs, all_counts = [x for x, _ in parts], [c for _, c in parts]
            with unmetered():
                slot.results = combine(xs) if counts is None else combine(xs, all_counts)
            _settle(x)

        def collect() -> None:
            _check_unchanged(call, x, copy)
            with unmetered():
                out.copy_(slot.results[self._ranks.index(self._me)])

        return Waiting(self._baton, self._clock, self._me, call, slot.there, collect)

    def _join_slot(self, call: Call) -> Slot:
        """The slot where the ranks of this group meet for their k-th collective."""
        self._meeting.calls[self._group, self._me] += 1
        key = self._group, self._meeting.calls[self._group, self._me]
        slot = self._meeting.slots.setdefault(key, Slot(call))
        if (call.op, call.detail) != (slot.call.op, slot.call.detail):
            first = next(iter(slot.parts))
            raise CommError(
                f"ranks disagree: rank {self._me} calls {call.in_full()}, but rank {first} calls "
                f"{slot.call.in_full()}."
            )
        if len(slot.parts) == len(self._ranks) - 1:
            del self._meeting.slots[key]  # I am the last one
        return slot

    def _post(self, mine: Parcel, source: int, target: int) -> Parcel:
        """Pair the k-th send with the k-th recv between two ranks; the second to come copies."""
        queue = self._meeting.mail[self._group, source, target]
        if not queue or queue[0].sends == mine.sends:
            queue.append(mine)
            return mine
        other = queue.popleft()
        sent, received = (mine, other) if mine.sends else (other, mine)
        if describe(sent.x) != describe(received.x):
            raise CommError(
                f"ranks disagree: rank {source} sends {describe(sent.x)} in {sent.call}, but rank "
                f"{target} expects {describe(received.x)} in {received.call}."
            )
        with unmetered():
            received.x.copy_(sent.x)
        _settle(sent.x)
        sent.there, received.there = 0.0, sent.arrival  # a sender does not wait for the arrival
        return mine


class Waiting:
    """Work of the thread world: wait() hands the baton on until the others have come.

    there  when all is there, in the time of `clock`; inf while another rank has not come
    """

    def __init__(
        self, baton: Baton, clock: Clock, rank: int, call: Call, there: Callable, collect: Callable
    ) -> None:
        self._baton, self._clock, self._rank, self._words = baton, clock, rank, call.in_full()
        self._there, self._collect = there, collect

    def wait(self) -> None:
        """Return when all ranks have come, with the result in its place."""
        if self._collect is not None:
            self._baton.wait_until(self._rank, self._have_come, self._words)
            self._collect()
            self._collect = None
            self._clock.reach(self._there())

    def done(self) -> bool:
        """Whether all is there by now; if a rank has not come, others go on first."""
        if not self._have_come():
            self._baton.pause(self._rank, self._words, self._clock.place_in_line())
        return self._there() <= self._clock.now()

    def _have_come(self) -> bool:
        return self._there() < math.inf


def _reduce(xs: list[Tensor], op: str) -> Tensor:
    total = xs[0].clone()
    for x in xs[1:]:
        total = torch.maximum(total, x) if op == "max" else total.add_(x)
    return total.div_(len(xs)) if op == "mean" else total


def _copy(x: Tensor) -> Tensor:
    with unmetered():
        copy = x.clone()
    _settle(x)
    return copy


def _settle(x: Tensor) -> None:
    """Ranks that share a GPU may use different streams: what one leaves must be there for all."""
    if x.is_cuda:
        torch.cuda.current_stream(x.device).synchronize()


def _bits(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8)


def _check_unchanged(call: Call, x: Tensor, copy: Tensor) -> None:
    """Compares bits, for a NaN does not equal itself."""
    with unmetered():
        unchanged = torch.equal(_bits(x), _bits(copy))
    if not unchanged:
        raise CommError(
            f"the tensor given to {call} changed before wait(): leave it alone until then, and let "
            "no other rank reach it."
        )
