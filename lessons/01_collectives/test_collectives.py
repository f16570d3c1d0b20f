"""What lesson 01 asks for, as tests: sizes, ranks and values are drawn from the seed."""

import re
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lessons.kit import Lesson, task
from picotron_lab.analysis.meter import Meter
from picotron_lab.clock import Network
from picotron_lab.comm import Axis

LESSON = Lesson(
    title="Collectives from send and receive",
    builds="reduce-scatter, all-gather and all-reduce on a ring, from messages alone",
    allowed=("picotron_lab.comm",),
    broken=("01.1",),
)
ELEMENT = 8  # bytes of a float64
NETWORK = Network(latency=1e-3, bandwidth=1e6)  # seconds, bytes per second


# ---- a program: it runs on every rank


def turn_the_ring(axis: Axis, student: ModuleType, name: str, xs: list[Tensor]) -> dict[str, Any]:
    """One function of the exercise on this rank's x: what it returns, x after it, bytes alive."""
    x = xs[axis.rank].clone()
    with Meter() as meter:
        result = getattr(student, name)(x, axis)
    return {"result": result, "x": x, "peak": meter.peak_bytes}


# ---- cases and checks


def _tensors(attempt: Any, ranks: int, *shape: int) -> list[Tensor]:
    return [
        torch.randn(shape, generator=attempt.generator, dtype=torch.float64) for _ in range(ranks)
    ]


def _column(run: Any, key: str) -> list:
    return [value[key] for value in run.values]


def _with(xs: list[Tensor], what: str) -> str:
    return f"with x {list(xs[0].shape)}, {what}"


def _rotated(values: list, by: int) -> list:
    return [values[(r + by) % len(values)] for r in range(len(values))]


def _check_left_alone(attempt: Any, run: Any, xs: list[Tensor]) -> None:
    """The input is as it was."""
    suspects = {"x was written to: add into a new tensor": _column(run, "x")}
    attempt.same("x after the call", _column(run, "x"), xs, ranks=len(xs), suspects=suspects)


def _check_only_messages(attempt: Any, run: Any) -> None:
    """Nothing but send, recv and exchange."""
    others = {c.op for calls in run.calls for c in calls} - {"send", "recv", "exchange"}
    attempt.equal(
        "kinds of collectives called", len(others), 0, "messages only",
        because=f"{', '.join(sorted(others))}: that is what this lesson builds",
    )  # fmt: skip


def _check_bytes(attempt: Any, run: Any, each: int, count: int, why: str) -> None:
    """So many messages of so many bytes would leave every rank."""
    attempt.equal(
        "bytes that the busiest rank sends", run.bytes(), count * each,
        f"{why} of {each} bytes",
        because="a chunk is a part of the tensor, 1 of n: does more than that travel?",
    )  # fmt: skip


def _check_count(attempt: Any, run: Any, count: int, why: str) -> None:
    """So many messages leave every rank."""
    attempt.equal(
        "messages that the busiest rank sends", max(map(_sent, run.calls)), count, why,
        because="one chunk to one neighbour per step",
    )  # fmt: skip


def _check_neighbours(attempt: Any, run: Any) -> None:
    """Messages go round the ring, not across it."""
    ranks = len(run.calls)
    others = [
        f"rank {rank} to rank {to}"
        for rank, calls in enumerate(run.calls)
        for to in sorted(_targets(calls) - {(rank + 1) % ranks})
    ]
    shown = ", ".join(others[:2])
    attempt.equal(
        "pairs of ranks that speak, other than r and r + 1", len(others), 0,
        "all messages go to the next rank",
        because=f"messages go from {shown}: on a ring every rank sends to the next one",
    )  # fmt: skip


def _targets(calls: list) -> set[int]:
    """Ranks that got a message: the ledger has "... to rank 3", or "to [3, 4], from [1]"."""
    words = [c.detail.rpartition("to ")[2] for c in calls if c.op == "send"]
    words += [c.detail.partition(", from")[0] for c in calls if c.op == "exchange"]
    return {int(number) for text in words for number in re.findall(r"\d+", text)}


def _sent(calls: list) -> int:
    return sum(c.op in ("send", "exchange") and c.bytes > 0 for c in calls)


# ---- tasks


@task("01.1", points=2, minutes=10, core=True, compare="picotron_lab.context_parallel:Ring.pass_on")
def test_shift(attempt: Any) -> None:
    """A ring turns by one rank."""
    ranks = attempt.rng.randint(3, 6)
    xs = _tensors(attempt, ranks, attempt.rng.choice([3, 5, 7]), 2)
    run = attempt.run(turn_the_ring, ranks, "shift", xs)
    attempt.same(_with(xs, "received"), _column(run, "result"), _rotated(xs, -1), ranks=ranks)
    _check_only_messages(attempt, run)
    _check_bytes(attempt, run, xs[0].numel() * ELEMENT, 1, "1 message")
    _check_count(attempt, run, 1, "1 message")


@task("01.2", points=4, minutes=20, core=True, compare="picotron_lab.ledger:wire_bytes")
def test_reduce_scatter(attempt: Any) -> None:
    """Rows are added up on their way round the ring."""
    ranks, rows = attempt.rng.randint(4, 6), attempt.rng.randint(1, 3)
    xs = _tensors(attempt, ranks, ranks * rows, attempt.rng.choice([3, 5, 7]))
    run = attempt.run(turn_the_ring, ranks, "ring_reduce_scatter", xs)
    total, own = sum(xs), [x.chunk(ranks)[r] for r, x in enumerate(xs)]
    want = list(total.chunk(ranks))
    without = [part - mine for part, mine in zip(want, own, strict=True)]
    suspects = {
        "the rows of this rank itself are missing from its sum": without,
        "nothing was added: these are this rank's own rows": own,
        "right sums, one rank too early: rank r ends with chunk r + 1. With which chunk must it "
        "begin?": _rotated(want, 1),
    }
    attempt.same(_with(xs, "sums"), _column(run, "result"), want, ranks=ranks, suspects=suspects)
    _check_left_alone(attempt, run, xs)
    _check_only_messages(attempt, run)
    chunk = xs[0].numel() * ELEMENT // ranks
    _check_bytes(attempt, run, chunk, ranks - 1, "n - 1 messages")
    attempt.at_most(
        "most bytes alive beside x", max(_column(run, "peak")), 3 * chunk,
        "3 chunks: one that left, one that came, their sum",
        because="chunks were collected: add each as it comes, and send the sum on",
    )  # fmt: skip
    _check_count(attempt, run, ranks - 1, "n - 1 messages")
    _check_neighbours(attempt, run)


@task("01.3", points=3, minutes=10, compare="picotron_lab.ledger:wire_bytes")
def test_all_gather(attempt: Any) -> None:
    """Rows travel round the ring until every rank has all."""
    ranks, rows = attempt.rng.randint(3, 6), attempt.rng.randint(1, 3)
    xs = _tensors(attempt, ranks, rows, attempt.rng.choice([3, 5, 7]))
    run = attempt.run(turn_the_ring, ranks, "ring_all_gather", xs)
    want = torch.cat(xs)
    arrival = [torch.cat([xs[r - step] for step in range(ranks)]) for r in range(ranks)]
    suspects = {"the rows lie in the order in which they came: chunk k is that of rank k": arrival}
    got, what = _column(run, "result"), _with(xs, "rows")
    attempt.same(what, got, [want] * ranks, ranks=ranks, suspects=suspects)
    _check_left_alone(attempt, run, xs)
    _check_only_messages(attempt, run)
    _check_bytes(attempt, run, xs[0].numel() * ELEMENT, ranks - 1, "n - 1 messages")
    _check_count(attempt, run, ranks - 1, "n - 1 messages")
    _check_neighbours(attempt, run)


@task("01.4", points=6, minutes=20, compare="picotron_lab.comm:Processes.all_reduce")
def test_all_reduce(attempt: Any) -> None:
    """Any tensor is summed in 2 (n - 1) steps."""
    ranks = attempt.rng.randint(3, 6)
    each = attempt.rng.randint(2, 4)
    count = ranks * each + attempt.rng.randint(1, ranks - 1)  # n does not divide it
    xs = _tensors(attempt, ranks, 1, count)
    run = attempt.run(turn_the_ring, ranks, "ring_all_reduce", xs, network=NETWORK)
    total = sum(xs)
    cut = total.clone()
    cut[0, ranks * each :] = 0
    suspects = {
        f"the last {count - ranks * each} of {count} elements are lost: {ranks} ranks do not share "
        "them alike, so fill up with zeros, and cut them off at the end": [cut] * ranks,
        "nothing was added: this is each rank's own x": xs,
    }
    got, what = _column(run, "result"), _with(xs, "sums")
    attempt.same(what, got, [total] * ranks, ranks=ranks, suspects=suspects)
    _check_left_alone(attempt, run, xs)
    _check_only_messages(attempt, run)
    chunk, steps = -(-count // ranks) * ELEMENT, 2 * (ranks - 1)
    _check_bytes(attempt, run, chunk, steps, "2 (n - 1) messages")
    _check_count(attempt, run, steps, "2 (n - 1) messages")
    _check_neighbours(attempt, run)
    limit = steps * (NETWORK.latency + chunk / NETWORK.bandwidth)
    attempt.at_most(
        "virtual seconds", max(run.times), limit * (1 + 1e-9),
        "2 (n - 1) (latency + chunk / bandwidth)",
        because="ranks wait for each other within a step: some receive before they send. "
        "exchange sends and receives at once",
    )  # fmt: skip
