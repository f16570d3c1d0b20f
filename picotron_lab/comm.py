"""Axis: everything a rank can say to the other ranks, and a ledger of what it said.

Idea    A parallel technique needs a handful of verbs (all_reduce, all_gather, send, ...) and one
        noun: the group of ranks it speaks to. That noun is an Axis. Code that takes an Axis runs
        unchanged in four worlds: threads of one process (lab.py), processes (here, with
        processes.py or torchrun), nobody (nobody.py, a dry run), and alone (an axis of size 1,
        which sends nothing).
Rules   Results are new tensors; `out=` writes into yours instead. `wait=False` returns a Handle:
        leave input and out alone until `handle.wait()`, which gives the result. No gradient flows
        through.
Wire    payload S = bytes of the whole tensor the call is about; ledger.py says what a ring makes of
        it. On gloo one note per call goes along, by which ranks compare what they call (notes.py).
torch   all_reduce, all_gather_into_tensor, reduce_scatter_tensor, all_to_all_single, broadcast,
        batch_isend_irecv, barrier: class Processes shows the torch.distributed call behind each
        verb. No other file of this project calls torch.distributed.
Read    Axis -> Processes -> connect; then alone.py (handles; alone), nobody.py and lab.py (threads)
Tests   tests/test_comm.py, tests/test_processes.py, tests/test_clock.py
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from picotron_lab.alone import Alone, Done, Handle, Work
from picotron_lab.buffers import (
    check_counts,
    check_equal_shards,
    check_reduction,
    describe,
    empty_like,
    ready,
    room,
    rows,
)
from picotron_lab.clock import Clock
from picotron_lab.heartbeat import GRACE, Heartbeat, shorten
from picotron_lab.ledger import Call, CommError, Ledger, caller
from picotron_lab.notes import Compared

# ---- the axis


class Axis:
    """One group of `size` ranks, seen by its member `rank`, which speaks through a `world`.

    name     for the ledger and for sentences
    ranks    the members as world ranks, in rising order; `me` is the one that holds this handle
    clock    of this rank, on all of its axes; None: the machine's
    raises   CommError, from every verb, when the ranks cannot go on together
    """

    def __init__(
        self, name: str, ranks: Sequence[int], me: int, world: Any, ledger: Ledger,
        clock: Clock | None = None,
    ):  # fmt: skip
        self.name, self.ranks, self.ledger = name, tuple(ranks), ledger
        self.rank, self.size = self.ranks.index(me), len(ranks)
        self._world = world if self.size > 1 else Alone()
        self._split, self._clock = world.split, clock or Clock()
        self._calls = 0

    def all_reduce(
        self, x: Tensor, op: str = "sum", out: Tensor | None = None, wait: bool = True
    ) -> Tensor | Handle:
        """partial -> replicated: the elementwise sum, mean or max over all ranks. S = x.

        A NaN stays one in sum and mean; max may lose it.
        """
        check_reduction("all_reduce", op, x)
        buffer = ready("all_reduce", x, out)
        call = self._enter("all_reduce", f"{op} of {describe(x)}", [x], wait)
        return _answer(self._world.all_reduce(call, buffer, op), buffer, out, wait)

    def all_gather(
        self, x: Tensor, out: Tensor | None = None, wait: bool = True
    ) -> Tensor | Handle:
        """shard -> replicated: [N, ...] of each rank -> [size*N, ...] in rank order. S = result."""
        x = rows("all_gather", x)
        buffer = room("all_gather", x, self.size * x.shape[0], out)
        call = self._enter("all_gather", describe(x), [buffer], wait)
        return _answer(self._world.all_gather(call, buffer, x), buffer, out, wait)

    def reduce_scatter(
        self, x: Tensor, op: str = "sum", out: Tensor | None = None, wait: bool = True
    ) -> Tensor | Handle:
        """partial -> shard: [size*N, ...] reduced; rank r keeps rows r*N:(r+1)*N. S = x."""
        check_reduction("reduce_scatter", op, x)
        x = rows("reduce_scatter", x)
        check_equal_shards("reduce_scatter", x, self.size)
        buffer = room("reduce_scatter", x, x.shape[0] // self.size, out)
        call = self._enter("reduce_scatter", f"{op} of {describe(x)}", [x], wait)
        return _answer(self._world.reduce_scatter(call, buffer, x, op), buffer, out, wait)

    def all_to_all(
        self,
        x: Tensor,
        send_rows: Sequence[int] | None = None,
        receive_rows: Sequence[int] | None = None,
        wait: bool = True,
    ) -> Tensor | Handle:
        """Rows of dim 0 travel: send_rows[j] of mine go to rank j, receive_rows[i] come from i.

        Without counts all shards are equal. The result has the rows in rank order. S = x.
        """
        x = rows("all_to_all", x)
        if send_rows is None and receive_rows is None:
            check_equal_shards("all_to_all", x, self.size)
            send_rows = receive_rows = [x.shape[0] // self.size] * self.size
        check_counts(x, send_rows, receive_rows, self.size)
        out = room("all_to_all", x, sum(receive_rows), None)
        call = self._enter("all_to_all", f"rows of {describe(x[:0])}", [x], wait)
        counts = list(receive_rows), list(send_rows)
        return _answer(self._world.all_to_all(call, out, x, *counts), out, None, wait)

    def broadcast(
        self, x: Tensor, source: int, out: Tensor | None = None, wait: bool = True
    ) -> Tensor | Handle:
        """one -> replicated: the tensor of rank `source`; the others' x gives its shape. S = x."""
        if source != self.rank:
            self._check_rank(source)
        buffer = ready("broadcast", x, out)
        detail = f"{describe(x)} from rank {self.ranks[source]}"
        call = self._enter("broadcast", detail, [x], wait)
        return _answer(self._world.broadcast(call, buffer, source), buffer, out, wait)

    def send(self, x: Tensor, to: int, wait: bool = True) -> None | Handle:
        """Give x to rank `to`, which must call recv; waits until it was taken. S = x."""
        self._check_rank(to)
        call = self._enter("send", f"{describe(x)} to rank {self.ranks[to]}", [x], wait)
        x = x.detach().contiguous()
        return _answer(self._world.exchange(call, [(x, to)], []), None, None, wait)

    def recv(self, like: Tensor, source: int, wait: bool = True) -> Tensor | Handle:
        """Take a tensor of the shape, dtype and device of `like` from rank `source`."""
        self._check_rank(source)
        call = self._enter("recv", f"{describe(like)} from rank {self.ranks[source]}", [], wait)
        out = empty_like(like)
        return _answer(self._world.exchange(call, [], [(out, source)]), out, None, wait)

    def exchange(
        self,
        sends: Sequence[tuple[Tensor, int]],
        receives: Sequence[tuple[Tensor, int]],
        wait: bool = True,
    ) -> list[Tensor] | Handle:
        """Many sends (tensor, to) and receives (like, source) at once: no order can deadlock.

        Returns the received tensors in the order of `receives`. Between two ranks the k-th tensor
        sent is the k-th received. S = what is sent.
        """
        for _, other in [*sends, *receives]:
            self._check_rank(other)
        outs = [empty_like(like) for like, _ in receives]
        if not sends and not receives:
            return _answer(Done(), outs, None, wait)
        detail = f"to {[self.ranks[to] for _, to in sends]}, "
        detail += f"from {[self.ranks[source] for _, source in receives]}"
        call = self._enter("exchange", detail, [x for x, _ in sends], wait)
        mine = [(x.detach().contiguous(), to) for x, to in sends]
        theirs = [(out, source) for out, (_, source) in zip(outs, receives, strict=True)]
        return _answer(self._world.exchange(call, mine, theirs), outs, None, wait)

    def barrier(self) -> None:
        """Wait until every rank is here. Never needed for correctness of the calls above."""
        self._world.barrier(self._enter("barrier", "", [], True)).wait()

    def now(self) -> float:
        """The time of this rank, in seconds from some moment; virtual in a lab with a network."""
        return self._clock.now()

    def spend(self, seconds: float) -> None:
        """Be busy for so long, computing nothing: sleep, or advance the virtual time."""
        self._clock.spend(seconds)

    def split(self, name: str, groups: Sequence[Sequence[int]]) -> "Axis":
        """The sub-axis that contains me. Every rank of this axis calls this, with the same groups.

        groups  disjoint lists of world ranks, each in rising order
        """
        me = self.ranks[self.rank]
        mine = [list(group) for group in groups if me in group]
        if len(mine) != 1 or mine[0] != sorted(set(mine[0])) or not set(mine[0]) <= set(self.ranks):
            raise CommError(
                f"axis {name}: rank {me} must be in exactly one group, which lists ranks of axis "
                f"{self.name} in rising order; the groups with rank {me} are {mine}."
            )
        call = Call("split", name, 0, caller(), f"ranks {mine[0]}", 0)
        return Axis(name, mine[0], me, self._split(call, mine[0]), self.ledger, self._clock)

    def watched(self, watch: Callable[[Any], Any]) -> "Axis":
        """This axis with watch(its world) in the place of its world; so are axes split from it."""
        me, world = self.ranks[self.rank], watch(self._world)
        return Axis(self.name, self.ranks, me, world, self.ledger, self._clock)

    def _check_rank(self, other: int) -> None:
        if other == self.rank or not 0 <= other < self.size:
            others = ", ".join(str(r) for r in range(self.size) if r != self.rank) or "nobody"
            raise CommError(
                f"rank {self.rank} on axis {self.name} of size {self.size} cannot exchange with "
                f"rank {other}: the others are {others}."
            )

    def _enter(self, op: str, detail: str, payload: list[Tensor], wait: bool) -> Call:
        """Enter a call in the ledger, unless nothing is sent."""
        self._calls += 1
        size = sum(x.numel() * x.element_size() for x in payload)
        place, detail = sys.intern(caller()), sys.intern(detail)  # millions may be kept
        call = Call(op, self.name, self._calls, place, detail, size, wait)
        if self.size > 1:
            self.ledger.calls.append(call)
        return call


def _answer(work: Work, result: Any, out: Tensor | None, wait: bool) -> Any:
    """The result now, or a handle that brings it."""
    handle = Handle(work, result, out)
    return handle.wait() if wait else handle


# ---- the world of processes

REDUCE_OP = {"sum": dist.ReduceOp.SUM, "mean": dist.ReduceOp.AVG, "max": dist.ReduceOp.MAX}
# torch 2.13 gave these two new names; this is the one place that knows.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Processes:
    """A torch.distributed group, gloo on CPU and nccl on GPUs.

    limit  time after which torch gives up a call on this group
    """

    def __init__(self, group: Any, ranks: Sequence[int], heartbeat: Heartbeat, limit: timedelta):
        self._group, self._ranks = group, tuple(ranks)
        self._heartbeat, self._limit = heartbeat, limit

    def all_reduce(self, call: Call, out: Tensor, op: str) -> Work:
        return self._start(
            call, lambda: dist.all_reduce(out, REDUCE_OP[op], self._group, async_op=True)
        )

    def all_gather(self, call: Call, out: Tensor, x: Tensor) -> Work:
        return self._start(call, lambda: _all_gather(out, x, self._group, async_op=True))

    def reduce_scatter(self, call: Call, out: Tensor, x: Tensor, op: str) -> Work:
        return self._start(
            call, lambda: _reduce_scatter(out, x, REDUCE_OP[op], self._group, async_op=True)
        )

    def all_to_all(
        self, call: Call, out: Tensor, x: Tensor, receive_rows: list[int], send_rows: list[int]
    ) -> Work:
        rows = receive_rows, send_rows
        return self._start(
            call, lambda: dist.all_to_all_single(out, x, *rows, self._group, async_op=True)
        )

    def broadcast(self, call: Call, out: Tensor, source: int) -> Work:
        source = self._ranks[source]
        return self._start(call, lambda: dist.broadcast(out, source, self._group, async_op=True))

    def barrier(self, call: Call) -> Work:
        device = [torch.cuda.current_device()] if torch.cuda.is_available() else None
        return self._start(call, lambda: dist.barrier(self._group, True, device))

    def exchange(self, call: Call, sends: list, receives: list) -> Work:
        ops = [dist.P2POp(dist.isend, x, self._ranks[to], self._group) for x, to in sends]
        ops += [dist.P2POp(dist.irecv, x, self._ranks[of], self._group) for x, of in receives]
        return self._start(call, lambda: dist.batch_isend_irecv(ops))

    def split(self, call: Call, mine: list[int]) -> "Processes":
        # torch names a group by its ranks and by how many groups this process has made: so every
        # rank makes one in every split, even if it is alone in it
        with self._heartbeat.guard(call):
            group = dist.new_group(mine, timeout=self._limit, use_local_synchronization=True)
        return Processes(group, mine, self._heartbeat, self._limit)

    def _start(self, call: Call, begin: Callable[[], Any]) -> Work:
        with self._heartbeat.guard(call):
            return Pending(begin(), call, self._heartbeat)


class Pending:
    """torch's work objects of one call; a peer that is lost or stuck becomes a CommError."""

    def __init__(self, works: Any, call: Call, heartbeat: Heartbeat):
        self._works = works if isinstance(works, list) else [works]
        self._call, self._heartbeat = call, heartbeat

    def wait(self) -> None:
        """Return when all of them are over; on nccl the GPU waits, and the CPU goes on."""
        if self._works:
            with self._heartbeat.guard(self._call):
                for work in self._works:
                    work.wait()
        self._works = []

    def done(self) -> bool:
        """gloo tells of messages and reduce_scatter only after wait(): till then, False."""
        return all(work.is_completed() for work in self._works)


@contextmanager
def connect(timeout: float) -> Iterator[Axis]:
    """The world axis of this process: all ranks of torchrun or run_processes, else alone.

    timeout  seconds after which a lost or stuck rank ends every rank, with a sentence
    raises   CommError when the ranks cannot find each other, or when one of them fails

    Leaving it waits for all ranks, however long they compute. After an error the process should
    end; one that cannot, because it is stuck, is ended with exit code 1.
    """
    if "RANK" not in os.environ:
        yield Axis("world", [0], 0, Alone(), Ledger())
        return
    rank, size = int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", "1"))
    store = _open_store(rank, timeout)
    # a client of its own: another thread may block in torch's
    signs = dist.PrefixStore("heartbeat", store.clone())
    heartbeat = Heartbeat(signs, rank, size, timeout)
    try:
        with heartbeat.outlive_sigterm():
            world = _join(dist.PrefixStore("job", store), heartbeat, rank, size, timeout)
            yield Axis("world", range(size), rank, world, Ledger())
        heartbeat.finish()
    except BaseException as error:
        heartbeat.fail(error)
        raise
    dist.destroy_process_group()
    heartbeat.leave()


def _open_store(rank: int, timeout: float) -> Any:
    """The key-value store in which the ranks of this run meet."""
    meeting_point = os.environ.get("MEETING_POINT", "env://")
    try:
        store, *_ = next(dist.rendezvous(meeting_point, timeout=timedelta(seconds=timeout)))
    except (RuntimeError, ValueError) as error:
        raise CommError(
            f"rank {rank} cannot meet the other ranks within {timeout:g} s; start all of them with "
            f"torchrun, on nodes that can reach MASTER_ADDR; torch says: {shorten(error)}."
        ) from None
    # a store may outlive a connect() and a restart by torchrun: old keys must not be found
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"{restart}/{store.add(f'{restart}/{rank}', 1)}", store)


def _join(store: Any, heartbeat: Heartbeat, rank: int, size: int, timeout: float) -> Any:
    """Meet the other ranks: the world of this one."""
    limit, gloo = timedelta(seconds=timeout), not torch.cuda.is_available()
    if not gloo:
        _choose_gpu()
        # torch would kill the process without a sentence: let the heartbeat come first
        limit += timedelta(seconds=2 * GRACE)
    backend = "gloo" if gloo else "nccl"
    with heartbeat.guard(Call("connect", "world", 0, caller(), "", 0)):
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    world = Processes(dist.group.WORLD, range(size), heartbeat, limit)
    return Compared(world, range(size), rank) if gloo else world


def _choose_gpu() -> None:
    """The GPU of this rank: one each."""
    mine = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    there = torch.cuda.device_count()
    if mine >= there:
        raise CommError(
            f"rank {os.environ['RANK']} is number {mine} on this machine, which has {there} GPUs: "
            f"start at most {there} ranks per machine with torchrun --nproc-per-node {there}."
        )
    torch.cuda.set_device(mine)


def ranks_per_node() -> int:
    """How many ranks share this machine, as torchrun says; 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def become_rank(rank: int, size: int, meeting_point: Path) -> None:
    """Make this process rank `rank` of `size` on this machine, as torchrun would, without GPUs.

    meeting_point  a new file, in place of torchrun's store on a port: ports can clash, and torch
                   asks the name server about every connection, which may take seconds
    """
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MEETING_POINT=f"file://{meeting_point}?rank={rank}&world_size={size}",
        CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
