"""Whose turn it is: one order, random numbers of one's own, and no rank or thread left behind."""

import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from picotron_lab.lab import run_ranks
from picotron_lab.ledger import CommError

ROOT = Path(__file__).parent.parent
ONE = torch.ones(1)


# ---- one order


def diary(axis):
    """Who does what, in the order in which it happened."""
    for step in range(3):
        print(f"rank {axis.rank} before {step}")
        axis.all_reduce(ONE)
        print(f"rank {axis.rank} after {step}")
    return axis.rank * 10


def test_ranks_take_turns_in_order(capsys):
    """A rank runs until it has to wait; the last one to come runs on, then rank 0 again."""
    assert run_ranks(diary, 2) == [0, 10]
    expected = "before 0, before 0, after 0, before 1, after 0, before 1, after 1, before 2, "
    expected += "after 1, before 2, after 2, after 2"
    who = [0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0]
    lines = [f"rank {r} {what}" for r, what in zip(who, expected.split(", "), strict=True)]
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.parametrize("seed", [None, 5])
def test_every_run_prints_the_same(capsys, seed):
    printed = set()
    for _ in range(3):
        run_ranks(diary, 4, seed=seed)
        printed.add(capsys.readouterr().out)
    assert len(printed) == 1


def take_a_number(axis, queue):
    """Wrong: the outcome depends on who comes first."""
    axis.barrier()
    queue.append(axis.rank)
    axis.barrier()
    return queue.index(axis.rank)


def test_some_seed_finds_what_depends_on_luck_and_repeats_it():
    usual = run_ranks(take_a_number, 3, [])
    found = {seed: run_ranks(take_a_number, 3, [], seed=seed) for seed in range(40)}
    assert len({tuple(order) for order in [usual, *found.values()]}) == 6  # all orders of 3 ranks
    for seed, order in found.items():
        assert run_ranks(take_a_number, 3, [], seed=seed) == order


def begin_and_go_on(axis, queue):
    """Wrong: between two steps of one rank, others may take theirs, even if it does not wait."""
    queue.append(axis.rank)
    handle = axis.all_reduce(ONE, wait=False)
    queue.append(axis.rank)
    handle.wait()


def test_some_seed_lets_others_in_where_a_call_begins():
    found = set()
    for seed in range(20):
        queue = []
        run_ranks(begin_and_go_on, 2, queue, seed=seed)
        found.add(tuple(queue))
    assert {(0, 0, 1, 1), (0, 1, 0, 1), (1, 0, 0, 1)} <= found


# ---- random numbers


def draw(rank, communicate):
    """Numbers of all three generators, before and after communication."""
    torch.manual_seed(rank)
    random.seed(rank)
    np.random.seed(rank)
    numbers = []
    for _ in range(3):
        communicate()
        numbers += [torch.rand(()).item(), random.random(), np.random.rand()]
    return numbers


@pytest.mark.parametrize("seed", [None, 1])
def test_each_rank_draws_what_it_would_draw_alone(seed):
    alone = [draw(rank, lambda: None) for rank in range(3)]
    assert run_ranks(lambda axis: draw(axis.rank, axis.barrier), 3, seed=seed) == alone


def test_ranks_begin_with_the_random_state_of_the_caller_and_leave_it_alone():
    torch.manual_seed(7)
    expected = [torch.rand(()).item() for _ in range(2)]
    torch.manual_seed(7)
    for _ in range(2):
        assert run_ranks(lambda axis: torch.rand(()).item(), 3) == expected[:1] * 3
    assert torch.rand(()).item() == expected[0]
    with pytest.raises(ValueError):
        run_ranks(lambda axis: (torch.rand(3), int("x")), 2)
    assert torch.rand(()).item() == expected[1]


# ---- failures


class Boom(Exception):
    """What a test raises."""


def test_an_exception_ends_all_ranks():
    ended = []

    def program(axis):
        try:
            axis.all_reduce(ONE)
            if axis.rank == 1:
                raise Boom("no luck")
            axis.all_reduce(ONE)
        except Exception as error:
            ended.append(
                f"{axis.rank} caught {error}"
            )  # only its own: others are not stopped by it
            raise
        finally:
            ended.append(f"{axis.rank} ended")

    with pytest.raises(Boom, match="no luck") as caught:
        run_ranks(program, 4)
    assert caught.value.__notes__ == ["(raised by rank 1 of 4)"]
    assert sorted(ended) == ["0 ended", "1 caught no luck", "1 ended", "2 ended", "3 ended"]
    assert not [t for t in threading.enumerate() if t.name.startswith("rank ")]


def test_communication_while_ending_does_not_hang():
    def program(axis):
        try:
            if axis.rank == 0:
                raise Boom
            axis.barrier()
        finally:
            axis.barrier()

    with pytest.raises(Boom):
        run_ranks(program, 3)
    assert not [t for t in threading.enumerate() if t.name.startswith("rank ")]


def test_a_rank_that_never_began_does_not_begin():
    began = []

    def program(axis):
        began.append(axis.rank)
        raise Boom

    with pytest.raises(Boom):
        run_ranks(program, 3)
    assert began == [0]


def test_wrong_size():
    with pytest.raises(CommError, match="needs at least 1 rank, it was asked for 0."):
        run_ranks(diary, 0)


# ---- worlds inside worlds


def test_run_ranks_inside_a_rank():
    def inner(axis):
        return axis.all_reduce(ONE).item() + torch.rand(()).item()

    def outer(axis):
        torch.manual_seed(axis.rank)
        found = run_ranks(inner, 2)
        axis.barrier()
        return found + [torch.rand(()).item()]

    expected = []
    for rank in range(3):
        torch.manual_seed(rank)
        number = torch.rand(()).item()
        expected.append([2 + number, 2 + number, number])
    assert run_ranks(outer, 3) == expected


def test_the_axis_of_another_rank():
    def inner(axis, stolen):
        stolen.barrier()

    def outer(axis):
        run_ranks(inner, 2, axis)

    with pytest.raises(CommError, match="by a thread that is not rank 0") as caught:
        run_ranks(outer, 2)
    assert "the axis of rank 0 was used in barrier #1 on axis world" in str(caught.value)


# ---- a person at the keyboard


def start(code, **options):
    """A Python of its own that runs `code` in this project."""
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


LISTENS = """
import time, torch
from picotron_lab.lab import run_ranks
def program(axis, talks):
    try:
        axis.barrier()
        axis.barrier()  # now every rank has begun
        print("begin", flush=True)
        while True:
            time.sleep(0.01)
            if talks:
                axis.barrier()
    finally:
        print(f"rank {axis.rank} ended", flush=True)
for talks in (True, False):
    try:
        run_ranks(program, 3, talks)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


def test_ctrl_c():
    """Ranks that talk end by themselves; one that only computes is left behind."""
    with start(LISTENS) as process:
        assert process.stdout.readline() == "begin\n"
        process.send_signal(signal.SIGINT)
        lines = iter(process.stdout.readline, "begin\n")
        assert sorted(lines) == ["interrupted\n", *(f"rank {r} ended\n" for r in range(3))]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out == "interrupted\n"


def test_breakpoint_stops_the_world():
    code = """
from picotron_lab.lab import run_ranks
def program(axis):
    axis.barrier()
    if axis.rank == 1:
        breakpoint()
    axis.barrier()
    return axis.rank
print(run_ranks(program, 3))
"""
    with start(code) as process:
        out, err = process.communicate("p 'rank', axis.rank\nc\n", timeout=60)
    assert process.returncode == 0, err
    assert "('rank', 1)" in out
    assert out.rstrip().endswith("[0, 1, 2]")
