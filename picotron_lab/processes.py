"""Processes: N real ranks on this machine, over gloo, for tests and lessons. No torchrun needed.

    def step(axis):                      # a function of a module: other processes must import it
        return axis.all_reduce(torch.tensor([float(axis.rank)]))
    run_processes(step, 4)               # [tensor([6.]), tensor([6.]), tensor([6.]), tensor([6.])]

Idea    lab.py runs ranks as threads: deterministic, debuggable, one process. This file runs the
        same function on processes that share nothing, so that what a rank may wrongly share is
        found, and what only happens to processes can be tried: a rank that is killed, stopped, or
        stuck.
How     A forkserver imports torch once (1 to 2 s); each rank is then forked from it in 0.1 s. The
        ranks meet in a file. What a rank prints appears when all have ended, rank by rank; its
        result comes back through a file.
Ends    always: ranks still there at the end are killed.
Not     for Windows, which has no forkserver; nor for functions of a notebook cell: use run_ranks.
Tests   tests/test_processes.py
"""

import math
import multiprocessing
import multiprocessing.connection
import os
import pickle
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from picotron_lab.comm import become_rank, connect
from picotron_lab.heartbeat import GRACE
from picotron_lab.ledger import CommError

MARGIN = 15.0  # seconds that starting and ending may take beside `timeout`


@dataclass(frozen=True)
class Outcome:
    """How one rank ended."""

    rank: int
    exit_code: int  # 0: well; 1: with an error; -9: killed by signal 9
    result: Any
    error: str  # the exception that ended it; empty if there was none, or no time for one
    ended: float  # when it wrote result or error, in seconds; infinite if it did not
    stdout: str
    stderr: str


def run_processes(
    function: Callable[..., Any], size: int, *args: Any, timeout: float = 60
) -> list[Any]:
    """Call function(axis, *args) on `size` processes; return their results in rank order.

    function  of a module that other processes can import; arguments and results must be picklable
    timeout   seconds the run may take; ranks that are still there MARGIN later are killed
    raises    CommError with the error of the rank that failed first
    """
    outcomes = launch(function, size, *args, timeout=timeout)
    for outcome in outcomes:
        sys.stdout.write(outcome.stdout)
    failed = [outcome for outcome in outcomes if outcome.exit_code != 0]
    if failed:
        first = min(failed, key=lambda outcome: outcome.ended)
        reason = first.error or f"it ended with exit code {first.exit_code}."
        error = CommError(f"rank {first.rank} of {size} failed: {reason}")
        error.add_note(first.stderr)
        raise error
    for outcome in outcomes:
        sys.stderr.write(outcome.stderr)
    return [outcome.result for outcome in outcomes]


def launch(
    function: Callable[..., Any], size: int, *args: Any, timeout: float = 60
) -> list[Outcome]:
    """Like run_processes, but return how each rank ended, however that was."""
    _check(function, size)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "numpy", "picotron_lab.comm"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "job").write_bytes(pickle.dumps((function, args)))
        here = size, timeout, folder
        ranks = [context.Process(target=_child, args=(r, *here), daemon=True) for r in range(size)]
        try:
            for process in ranks:
                process.start()
            _wait(ranks, timeout)
        finally:
            late = [rank for rank, process in enumerate(ranks) if process.is_alive()]
            for rank in late:
                ranks[rank].kill()
        for process in ranks:
            process.join()
        return [_read(folder, r, p.exitcode, r in late) for r, p in enumerate(ranks)]


def _check(function: Callable[..., Any], size: int) -> None:
    """What the user can mend before anything starts."""
    if size < 1:
        raise CommError(f"run_processes needs at least 1 rank, it was asked for {size}.")
    if "forkserver" not in multiprocessing.get_all_start_methods():
        raise CommError("run_processes needs a forkserver, which this system lacks: use run_ranks.")
    name = getattr(function, "__qualname__", repr(function))
    nowhere = function.__module__ == "__main__" and not hasattr(sys.modules["__main__"], "__file__")
    if nowhere or "<" in name:
        raise CommError(
            f"run_processes was given {name}, which other processes cannot import: define it at "
            "the top level of a .py file, or use run_ranks."
        )


def _wait(ranks: list, timeout: float) -> None:
    """Until all have ended, or until those that have not will not."""
    deadline = time.monotonic() + timeout + MARGIN
    while alive := [process for process in ranks if process.is_alive()]:
        if any((process.exitcode or 0) > 0 for process in ranks):
            # a rank that ended with an error has asked the others to end
            deadline = min(deadline, time.monotonic() + 1.5 * GRACE)
        left = deadline - time.monotonic()
        if left <= 0:
            return
        multiprocessing.connection.wait([process.sentinel for process in alive], left)


def _read(folder: Path, rank: int, exit_code: int, late: bool) -> Outcome:
    """What a rank left in the folder."""
    path = folder / f"{rank}.end"
    ended, result, error = math.inf, None, ""
    if path.exists():
        ended, result, error = pickle.loads(path.read_bytes())
    elif late:
        error = "it did not end and was killed by run_processes."
    texts = [folder / f"{rank}.stdout", folder / f"{rank}.stderr"]
    printed = [path.read_text(errors="replace") if path.exists() else "" for path in texts]
    return Outcome(rank, exit_code, result, error, ended, *printed)


# ---- in the process of a rank


def _child(rank: int, size: int, timeout: float, folder: Path) -> None:
    """Be one rank: connect, call, and leave result or error in the folder."""
    _print_to(folder, rank)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    become_rank(rank, size, folder / "store")
    result, failure = None, ""
    try:
        function, args = pickle.loads((folder / "job").read_bytes())
        with connect(timeout) as axis:
            result = function(axis, *args)
        end = pickle.dumps((time.time(), result, ""))
    except BaseException as error:
        traceback.print_exc()
        failure = f"{type(error).__name__}: {error}"
        end = pickle.dumps((time.time(), None, failure))
    partial = folder / f"{rank}.partial"
    partial.write_bytes(end)
    partial.rename(folder / f"{rank}.end")  # whole or not at all
    sys.exit(1 if failure else 0)


def _end_with_parent() -> None:
    """A launcher that was killed could not kill its ranks."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _print_to(folder: Path, rank: int) -> None:
    """Send all that this process prints, torch's own words too, to two files."""
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        with open(folder / f"{rank}.{stream.name.strip('<>')}", "w") as file:
            os.dup2(file.fileno(), number)
        stream.reconfigure(line_buffering=True)
