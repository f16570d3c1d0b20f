"""Time: the virtual clock of the lab, by hand; the machine's clock; and whether a call is done.

Virtual times are sums of quarters: equal to the last bit. SLOW sends a float64 number per second.
"""

import math
import time

import pytest
import torch
from comm_contract import SumForwardAndBack

from picotron_lab.clock import Network
from picotron_lab.comm import connect
from picotron_lab.config import ConfigError
from picotron_lab.lab import run_ranks
from picotron_lab.ledger import CommError
from picotron_lab.nobody import seat
from picotron_lab.processes import run_processes

SEEDS = [None, *range(8)]
SLOW = Network(latency=0.5, bandwidth=8.0)


def numbers(count):
    """A message that takes `count` seconds on the wire of SLOW."""
    return torch.ones(count, dtype=torch.float64)


def times(function, size, *args, network=SLOW):
    """What the ranks return, which no seed may change."""
    found = [run_ranks(function, size, *args, seed=seed, network=network) for seed in SEEDS]
    assert found == [found[0]] * len(SEEDS)
    return found[0]


# ---- messages


def chain(axis):
    """Take from the left, work for 1 s, give 2 numbers to the right."""
    if axis.rank > 0:
        axis.recv(numbers(2), axis.rank - 1)
    axis.spend(1.0)
    if axis.rank < axis.size - 1:
        axis.send(numbers(2), axis.rank + 1)
    return axis.now()


def test_a_chain_of_sends():
    """1 s of work, 2 s on the wire, 0.5 s of latency: 3.5 s later the next one begins."""
    assert times(chain, 4) == [1.0, 4.5, 8.0, 11.5]


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (Network(), [1, 2, 3]),  # nothing but work
        (Network(latency=0.25), [1, 2.25, 3.5]),
        (Network(bandwidth=64.0), [1, 2.25, 3.5]),  # 16 bytes at 64 per second
    ],
)
def test_latency_and_bandwidth(network, expected):
    assert times(chain, 3, network=network) == expected


def one_wire(axis, pause):
    """Rank 0 sends 2 numbers to rank 1, pauses, and sends 1 number to rank 2."""
    if axis.rank > 0:
        axis.recv(numbers(3 - axis.rank), 0)
        return axis.now()
    axis.send(numbers(2), 1)
    axis.spend(pause)
    axis.exchange([(numbers(1), 2)], [])
    return axis.now()


@pytest.mark.parametrize(
    ("pause", "second"),
    [
        (0.0, 3.5),  # it departs at 2, when the wire is free
        (4.0, 5.5),  # it departs at 4, when it is sent
    ],
)
def test_two_messages_on_one_wire(pause, second):
    assert times(one_wire, 3, pause) == [pause, 2.5, second]


# ---- a pipeline


def pipeline(axis, count):
    """Each rank works 1 s on each of 4 micro-batches of `count` numbers: when each is finished."""
    finished, going = [], []
    for _ in range(4):
        if axis.rank > 0:
            axis.recv(numbers(count), axis.rank - 1)
        axis.spend(1.0)
        finished.append(axis.now())
        if axis.rank < axis.size - 1:
            going.append(axis.send(numbers(count), axis.rank + 1, wait=False))
    for handle in going:
        handle.wait()
    return finished


def test_a_pipeline_hides_transfers_as_long_as_work():
    """1 s on the wire, 0.5 s latency: each rank begins 2.5 s after the one before, then is busy."""
    expected = [[1, 2, 3, 4], [3.5, 4.5, 5.5, 6.5], [6, 7, 8, 9]]
    assert times(pipeline, 3, 1) == expected


def test_a_pipeline_on_a_wire_slower_than_work():
    """2 s on the wire. Rank 0 is done at 1, 2, 3, 4; its wire sends at 1, 3, 5, 7, which are there
    2.5 s later: rank 1 ends 1 s after that. Its wire is free each time; rank 2 ends 3.5 s later."""
    expected = [[1, 2, 3, 4], [4.5, 6.5, 8.5, 10.5], [8, 10, 12, 14]]
    assert times(pipeline, 3, 2) == expected


# ---- collectives

# on a ring of 4 ranks a rank sends this many numbers; x holds 4
COLLECTIVES = {
    "all_reduce": (lambda a, x: a.all_reduce(x), 6),  # 2 x 3/4 of 4
    "all_gather": (lambda a, x: a.all_gather(x), 12),  # 3/4 of 16
    "reduce_scatter": (lambda a, x: a.reduce_scatter(x), 3),
    "all_to_all": (lambda a, x: a.all_to_all(x), 3),
    "broadcast": (lambda a, x: a.broadcast(x, 2), 4),
    "barrier": (lambda a, x: a.barrier(), 0),
}


@pytest.mark.parametrize("op", COLLECTIVES)
def test_a_collective_begins_with_the_last_rank(op):
    """Rank r comes at r seconds, so all begin at 3."""
    call, count = COLLECTIVES[op]

    def program(axis):
        axis.spend(axis.rank)
        call(axis, numbers(4))
        return axis.now()

    assert times(program, 4) == [3 + count + 0.5] * 4


@pytest.mark.parametrize("work", [0.0, 1.0, 4.0, 4.5, 6.0])
def test_work_hides_an_all_reduce(work):
    """4 numbers on 2 ranks: 4 s on the wire and 0.5 s of latency, beside the work."""

    def program(axis):
        handle = axis.all_reduce(numbers(4), wait=False)
        axis.spend(work)
        begun = axis.now()
        handle.wait()
        ended = axis.now()
        assert handle.wait().tolist() == [2.0] * 4
        return begun, ended, axis.now()

    assert times(program, 2) == [(work, max(work, 4.5), max(work, 4.5))] * 2


def test_buckets_of_a_backward():
    """3 layers of 1 s, an all-reduce of 2 s after each. By hand: they depart at 1, 3 and 5."""

    def program(axis):
        handles = []
        for _ in range(3):
            axis.spend(1.0)
            handles.append(axis.all_reduce(numbers(2), wait=False))
        moments = []
        for handle in reversed(handles):
            handle.wait()
            moments.append(axis.now())
        return moments

    assert times(program, 2) == [[7.5, 7.5, 7.5]] * 2


def test_a_wire_that_is_not_free_is_a_late_start():
    """Rank 0 sends 3 numbers to rank 1 first, so the sum of 3 numbers departs at 3, for 3 s."""

    def program(axis):
        call = axis.recv if axis.rank else axis.send
        message = call(numbers(3), 1 - axis.rank, wait=False)
        axis.all_reduce(numbers(3))
        moment = axis.now()
        message.wait()
        return moment, axis.now()

    assert times(program, 2) == [(6.5, 6.5)] * 2


def test_an_uneven_all_to_all():
    """Of 2 ranks one sends 6 numbers, the other 2; a ring counts half of them: 3 s and 1 s."""

    def program(axis):
        sends, receives = [([5, 1], [5, 1]), ([1, 1], [1, 1])][axis.rank]
        axis.all_to_all(numbers(sum(sends)), sends, receives)
        return axis.now()

    assert times(program, 2) == [3.5, 3.5]


def test_time_passes_inside_backward():
    """4 numbers on 2 ranks, 4.5 s in forward and again in backward."""

    def program(axis):
        x = numbers(4).requires_grad_()
        SumForwardAndBack.apply(x, axis).sum().backward()
        return axis.now(), x.grad.tolist()

    assert times(program, 2) == [(9.0, [2.0] * 4)] * 2


# ---- sub-axes


def test_one_time_and_one_wire_for_all_axes():
    """4 ranks as 2 x 2. Both sums of 2 numbers start at once: 2 s each, one after the other."""

    def program(axis):
        rows = axis.split("rows", [[0, 1], [2, 3]])
        columns = axis.split("columns", [[0, 2], [1, 3]])
        alone = axis.split("alone", [[r] for r in range(4)])
        handles = [sub.all_reduce(numbers(2), wait=False) for sub in (rows, columns)]
        moments = []
        for handle in handles:
            handle.wait()
            moments.append(columns.now())
        alone.spend(1.0)
        alone.all_reduce(numbers(100))  # nothing is sent
        return [*moments, axis.now(), rows.now(), alone.now()]

    assert times(program, 4) == [[2.5, 4.5, 5.5, 5.5, 5.5]] * 4


def test_a_world_of_one_rank_has_a_virtual_time_too():
    assert times(lambda axis: (axis.spend(1000.0), axis.now()), 1) == [(None, 1000.0)]


# ---- is it done?


def ask(axis):
    """Rank 1 comes to the sum only after rank 0 has found it not done."""
    if axis.rank == 1:
        axis.recv(numbers(1), 0)
    handle = axis.all_reduce(numbers(2), wait=False)
    early = handle.done()
    if axis.rank == 0:
        axis.send(numbers(1), 1)
    while not handle.done():
        axis.spend(0.25)
    ended = axis.now()
    total = handle.wait().tolist()
    return early and axis.rank == 0, handle.done(), total, ended, axis.now()


def test_done_in_the_virtual_time():
    """Rank 0 finds the sum not done, and its message is on the wire from 2 to 3: the sum departs
    at 3.5, when it came, and is there at 6; asked every 0.25 s, it is done then, not before."""
    assert times(ask, 2) == [(False, True, [2.0, 2.0], 6.0, 6.0)] * 2


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_done_in_the_lab(seed, monkeypatch):
    """Asking lets others run: nobody asks for ever."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    for early, late, total, *_ in run_ranks(ask, 2, seed=seed):
        assert (early, late, total) == (False, True, [2.0, 2.0])


def race(axis):
    """Ranks 0 and 1 ask for their messages again and again; rank 0 takes them as they come."""
    if axis.rank == 0:
        coming = {r: axis.recv(numbers(1), r, wait=False) for r in (1, 2, 3)}
        order = []
        while coming:
            come = [r for r, handle in coming.items() if handle.done()]
            for r in come:
                order.append((r, axis.now()))
                coming.pop(r).wait()
            axis.spend(0.25)
        return order
    if axis.rank == 1:
        start = axis.recv(numbers(1), 2, wait=False)
        while not start.done():
            axis.spend(0.25)
    axis.spend({1: 1.0, 2: 4.0, 3: 5.5}[axis.rank])
    if axis.rank == 2:
        axis.send(numbers(1), 1, wait=False).wait()
    axis.send(numbers(1), 0)
    return axis.now()


def test_two_ranks_ask_and_no_seed_changes_the_answers():
    """Rank 2 works till 4; its messages are at 1 at 5.5 and at 0 at 6.5. Rank 3: 5.5 + 1.5 = 7.
    Rank 1 finds its message at 5.5, works till 6.5: 8 at rank 0."""
    assert times(race, 4) == [[(2, 6.5), (3, 7.0), (1, 8.0)], 6.5, 4.0, 5.5]


def test_who_asks_at_the_same_moment_goes_in_rank_order():
    def program(axis):
        coming = axis.recv(numbers(1), 1 - axis.rank, wait=False)
        early = coming.done()
        axis.send(numbers(1), 1 - axis.rank)
        coming.wait()
        return early

    assert times(program, 2, network=Network()) == [False, True]


def test_messages_on_their_way_are_not_done():
    """3 numbers each way, at once, are there at 3.5 s."""

    def program(axis):
        other, answers = 1 - axis.rank, []
        coming = axis.recv(numbers(3), other, wait=False)
        going = axis.send(numbers(3), other, wait=False)
        for pause in (3.25, 0.25, 1.0):
            axis.spend(pause)
            answers.append((coming.done(), going.done()))  # a sender does not wait for the arrival
        return answers, coming.wait().tolist(), going.wait(), coming.done(), axis.now()

    expected = [(False, True), (True, True), (True, True)], [1.0] * 3, None, True, 4.5
    assert times(program, 2) == [expected] * 2


def test_alone_and_nobody_are_done_at_once():
    x, nobody = numbers(2), seat(1, 4)
    with connect(timeout=60) as alone:
        handles = [axis.all_reduce(x, wait=False) for axis in (alone, nobody)]
    handles += [nobody.recv(x, 0, wait=False), nobody.exchange([], [], wait=False)]
    assert [handle.done() for handle in handles] == [True] * 4


# ---- the machine's clock


def real(axis):
    """Does the axis tell the machine's time, and sleep?"""
    before = time.perf_counter()
    now = axis.now()
    axis.spend(0.01)
    sub = axis.split("alone", [[r] for r in range(axis.size)])
    return before <= now < axis.now() <= sub.now() <= time.perf_counter()


def test_time_is_real_alone_and_in_the_lab_without_a_network():
    with connect(timeout=60) as axis:
        assert real(axis)
    assert run_ranks(real, 2) == [True, True]


def test_spend_sleeps(monkeypatch):
    naps = []
    monkeypatch.setattr(time, "sleep", naps.append)
    run_ranks(lambda axis: axis.spend(1.5), 2)
    run_ranks(lambda axis: axis.spend(2.5), 2, network=SLOW)
    assert naps == [1.5, 1.5]


def in_processes(axis):
    """Time, a sum, and messages, of which gloo does not tell before wait()."""
    message = numbers(1), 1 - axis.rank
    handle = axis.exchange([message], [message], wait=False)
    handle.wait()
    return real(axis), ask(axis)[:3], handle.done()


def test_processes():
    assert run_processes(in_processes, 2) == [(True, (False, True, [2.0, 2.0]), True)] * 2


# ---- errors


RULES = {
    "latency": " is no time: give 0 or more seconds, as latency=1e-5.",
    "bandwidth": " sends nothing: give more than 0 bytes per second, as bandwidth=1e9.",
}


@pytest.mark.parametrize(
    ("name", "value"),
    [*(("latency", x) for x in (-1.0, math.inf, math.nan)),
     *(("bandwidth", x) for x in (0.0, -1.0, math.nan))],
)  # fmt: skip
def test_a_network_that_cannot_be(name, value):
    with pytest.raises(ConfigError) as caught:
        Network(**{name: value})
    assert str(caught.value) == f"Network {name}={value}{RULES[name]}"


@pytest.mark.parametrize("network", [None, SLOW])
@pytest.mark.parametrize("seconds", [-1.0, math.inf, math.nan])
def test_seconds_that_nobody_can_spend(seconds, network):
    with pytest.raises(CommError) as caught:
        run_ranks(lambda axis: axis.spend(seconds), 2, network=network)
    assert str(caught.value).startswith(f"nobody can spend {seconds} seconds: give 0 or more")
