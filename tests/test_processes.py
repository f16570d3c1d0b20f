"""Real processes: they start, they end, and whatever happens to one of them, all say so and end.

That their collectives are right is tested in test_comm.py, with all other worlds. No test measures
time: `launch` kills what does not end by itself, and then says so in `Outcome.error`.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import process_programs as programs
import pytest

from picotron_lab.ledger import CommError
from picotron_lab.processes import launch, run_processes

ROOT = Path(__file__).parent.parent
TIMEOUT = 5  # seconds until a lost or stuck rank is given up


# ---- ranks that end well


def test_results_and_prints_come_in_rank_order(capfd):
    """3 ranks: 0 + 1 + 2 = 3; the left neighbour of rank 0 is rank 2."""
    expected = [([3, 3], [2, 2]), ([3, 3], [0, 0]), ([3, 3], [1, 1])]
    assert run_processes(programs.ring, 3, 2) == expected
    assert capfd.readouterr().out == "".join(f"rank {r} was here\n" for r in range(3))


def test_one_process_is_a_world_too():
    assert run_processes(programs.ledger, 1)[0].calls == []


def test_ranks_are_light():
    """One thread each, and no GPU, so that many ranks fit on a laptop."""
    assert run_processes(programs.threads, 2) == [(1, False)] * 2


def test_results_are_copies_that_outlive_the_ranks():
    first, second = run_processes(programs.ledger, 2)
    assert [(call.op, call.bytes) for call in first.calls] == [("all_reduce", 8)]
    assert first.calls == second.calls


def test_a_rank_that_is_done_waits_for_the_others():
    assert run_processes(programs.late, 3) == [0, 2, 2]


# ---- wrong use


def nested():
    return lambda axis: None


@pytest.mark.parametrize("function", [lambda axis: None, nested()])
def test_a_function_that_others_cannot_import(function):
    with pytest.raises(CommError, match="cannot import: define it at the top level of a .py file"):
        run_processes(function, 2)


def test_a_function_of_a_notebook_cell(monkeypatch):
    monkeypatch.setattr(nested, "__module__", "__main__")
    monkeypatch.delattr(sys.modules["__main__"], "__file__")
    with pytest.raises(CommError, match="run_processes was given nested, which other processes"):
        run_processes(nested, 2)


def test_wrong_size():
    with pytest.raises(CommError, match="needs at least 1 rank, it was asked for 0"):
        run_processes(programs.ring, 0, 2)


def test_the_first_error_is_raised_with_its_rank():
    with pytest.raises(CommError) as caught:
        run_processes(programs.raises, 3, timeout=TIMEOUT)
    assert str(caught.value) == "rank 1 of 3 failed: ValueError: no luck\ntoday"
    assert 'raise ValueError("no luck\\ntoday")' in caught.value.__notes__[0]  # where it was raised


def test_a_result_that_cannot_be_sent():
    with pytest.raises(CommError, match="rank . of 2 failed: .*pickle"):
        run_processes(programs.returns_a_function, 2, timeout=TIMEOUT)


def test_wrong_arguments_are_quoted_to_all():
    outcomes = launch(programs.wrong_argument, 2, timeout=TIMEOUT)
    assert [o.exit_code for o in outcomes] == [1, 1]
    assert outcomes[1].error.startswith("CommError: all_reduce knows sum, mean, max")
    assert "rank 1 ended with CommError: all_reduce knows sum, mean, max" in outcomes[0].error


def test_a_rank_that_leaves_at_once_is_quoted_to_those_who_still_look_for_it():
    for _ in range(5):  # whether they do is a matter of luck
        outcomes = launch(programs.leaves_at_once, 4, timeout=TIMEOUT)
        assert [o.exit_code for o in outcomes] == [1] * 4
        assert outcomes[1].error == "ValueError: goodbye"
        for other in (0, 2, 3):
            assert "rank 1 ended with ValueError: goodbye." in outcomes[other].stderr


# ---- ranks that disagree


SENTENCES = {  # what rank 0 says, where HERE is a line of process_programs.py
    "operation": "rank 1 calls all_gather #1 on axis world (HERE): (1,) float32, but rank 0 calls "
    "all_reduce #1 on axis world (HERE): sum of (1,) float32.",
    "smaller": "rank 1 calls all_reduce #1 on axis world (HERE): sum of (1,) float32, but rank 0 "
    "calls all_reduce #1 on axis world (HERE): sum of (2,) float32.",
    "larger": "rank 1 calls all_gather #1 on axis world (HERE): (10000,) float32, but rank 0 calls "
    "all_gather #1 on axis world (HERE): (2,) float32.",
    "dtype": "rank 1 calls all_reduce #1 on axis world (HERE): sum of (2,) int32, but rank 0 calls "
    "all_reduce #1 on axis world (HERE): sum of (2,) float32.",
    "reduction": "rank 1 calls reduce_scatter #1 on axis world (HERE): max of (6,) float32, but "
    "rank 0 calls reduce_scatter #1 on axis world (HERE): sum of (6,) float32.",
    "source": "rank 1 calls broadcast #1 on axis world (HERE): (1,) float32 from rank 1, but "
    "rank 0 calls broadcast #1 on axis world (HERE): (1,) float32 from rank 0.",
    "rows": "all_to_all #1 on axis world (HERE): rank 1 sends 1 rows to rank 0, which expects 2.",
    "message": "rank 1 sends (1,) float32 in send #1 on axis world (HERE): (1,) float32 to rank 0, "
    "but rank 0 expects (2,) float32 in recv #1 on axis world (HERE).",
}


@pytest.mark.parametrize("name", SENTENCES)
def test_ranks_disagree(name):
    """Who waits at once is told before any harm is done: no result, no crash, but a sentence."""
    outcomes = launch(programs.disagree, 3, name, True, timeout=TIMEOUT)
    assert [(o.exit_code, o.result) for o in outcomes] == [(1, None)] * 3, outcomes
    sentence = re.sub(r"process_programs.py:\d+", "HERE", outcomes[0].error)
    assert sentence.removeprefix("CommError: ").removeprefix("ranks disagree: ") == SENTENCES[name]


@pytest.mark.parametrize(
    "name",
    [n if n == "larger" else pytest.param(n, marks=pytest.mark.exhaustive) for n in SENTENCES],
)
def test_ranks_disagree_while_they_compute(name):
    """Then torch may crash before the notes are read; but no rank that did not may end well."""
    outcomes = launch(programs.disagree, 3, name, False, timeout=TIMEOUT)
    crashed = [o for o in outcomes if o.exit_code == -signal.SIGABRT]
    assert all("mismatch" in o.stderr for o in crashed), crashed  # torch says it in its own words
    rest = [o for o in outcomes if o not in crashed]
    assert rest
    assert all(o.exit_code == 1 and o.error.startswith("CommError: ") for o in rest), outcomes


# ---- launchers that take their time: torchrun, and one that is killed

SCRIPT = """
import os, sys, torch
from picotron_lab.comm import connect, ranks_per_node
torch.set_num_threads(1)
for attempt in range(2):
    with connect(timeout=60) as world:
        if "fail-first" in sys.argv and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            raise ValueError("the first attempt fails")
        total = world.all_reduce(torch.tensor(float(world.rank + 1))).item()
line = f"rank {world.rank} of {world.size}, {ranks_per_node()} per node: {total}\\n"
os.write(1, line.encode())  # one write: ranks share the pipe, and print may write twice
"""


def torchrun(tmp_path, *options):
    """A launcher of two ranks, and its output."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *options]
    command.insert(len(command) - options.count("fail-first"), str(script))
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


LAUNCHER = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import process_programs
from picotron_lab.processes import run_processes
run_processes(process_programs.leave_pid, 2, Path(sys.argv[2]))
"""


def kill_launcher(folder):
    """Kill a launcher whose two ranks have started; the numbers of the processes they were."""
    command = [sys.executable, "-c", LAUNCHER, str(ROOT / "tests"), str(folder)]
    launcher = subprocess.Popen(command, cwd=ROOT)
    files = [folder / f"{rank}.pid" for rank in range(2)]
    while launcher.poll() is None and not all(f.exists() and f.read_text() for f in files):
        time.sleep(0.05)
    launcher.kill()
    launcher.wait()
    return [int(f.read_text()) for f in files]


def connect_as_rank_0_of_2(variables):
    """Without a launcher: what it says."""
    code = "from picotron_lab.comm import connect\nwith connect(timeout=3): pass"
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", **variables}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, text=True, capture_output=True
    )


# ---- what takes seconds to find out is started at once, and looked at afterwards

SOME = [
    programs.killed,
    programs.raises_while_others_compute,
    programs.wait_for_each_other,
]
SLOW = [  # left to CI
    programs.killed_while_others_compute,
    programs.stopped,
    programs.stuck,
    programs.finishes_early,
]
LOST = "rank 1 (is lost|gave no sign of life)"  # the call is given up first, or the neighbour
WAITING = "all_gather #2 on axis world (process_programs.py:"


def start(pool, functions):
    """{name: what becomes of three ranks}."""
    return {f.__name__: pool.submit(launch, f, 3, timeout=TIMEOUT) for f in functions}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """What became of the ranks of all programs in SOME, and of orphans."""
    with ThreadPoolExecutor(len(SOME) + 2) as pool:
        found = start(pool, SOME)
        found["orphans"] = pool.submit(kill_launcher, tmp_path_factory.mktemp("orphans"))
        found["no launcher"] = pool.submit(connect_as_rank_0_of_2, {})
    return {name: future.result() for name, future in found.items()}


@pytest.fixture(scope="module")
def ended_slowly(tmp_path_factory):
    """The same of those in SLOW, and of a rank that waits in vain."""
    file = tmp_path_factory.mktemp("meeting") / "store"
    point = {"MEETING_POINT": f"file://{file}?rank=0&world_size=2"}
    with ThreadPoolExecutor(len(SLOW) + 1) as pool:
        found = start(pool, SLOW)
        found["rank 1 never comes"] = pool.submit(connect_as_rank_0_of_2, point)
    return {name: future.result() for name, future in found.items()}


def test_a_rank_is_killed(ended):
    outcomes = ended["killed"]
    assert [o.exit_code for o in outcomes] == [1, -signal.SIGKILL, 1]
    assert outcomes[1].stdout == "so far all is well\n"
    for rank in (0, 2):
        assert f"rank {rank} cannot finish {WAITING}" in outcomes[rank].error
        assert "rank 1 is lost (last sign of life: " in outcomes[rank].error
        assert f"rank {2 - rank} is waiting in {WAITING}" in outcomes[rank].error


@pytest.mark.slow
def test_a_rank_is_killed_while_the_others_compute(ended_slowly):
    """Its left neighbour notices the silence and tells the others."""
    outcomes = ended_slowly["killed_while_others_compute"]
    assert [o.exit_code for o in outcomes] == [1, -signal.SIGKILL, 1]
    for rank in (0, 2):
        sentence = f"error: rank {rank} ends, because rank 1 gave no sign of life for {TIMEOUT} s."
        assert sentence in outcomes[rank].stderr


@pytest.mark.slow
def test_a_rank_is_stopped(ended_slowly):
    outcomes = ended_slowly["stopped"]
    assert [o.exit_code for o in outcomes] == [1, -signal.SIGKILL, 1]
    for rank in (0, 2):
        assert f"rank {rank} cannot finish {WAITING}" in outcomes[rank].error
        assert re.search(LOST, outcomes[rank].error)
    assert outcomes[1].error == "it did not end and was killed by run_processes."


@pytest.mark.slow
def test_a_rank_is_stuck_in_a_loop(ended_slowly):
    """It lives, so it is not lost; its own heartbeat ends it."""
    outcomes = ended_slowly["stuck"]
    assert [o.exit_code for o in outcomes] == [1, 1, 1]
    for rank in (0, 2):
        assert f"rank {rank} cannot finish all_gather #1 on axis part" in outcomes[rank].error
        assert "rank 1 is computing after split #0 on axis part" in outcomes[rank].error
        assert "torch says: Timed out waiting 5000ms" in outcomes[rank].error
    assert "error: rank 1 ends, because rank " in outcomes[1].stderr


def test_a_rank_raises():
    outcomes = launch(programs.raises, 3, timeout=TIMEOUT)
    assert [o.exit_code for o in outcomes] == [1, 1, 1]
    assert outcomes[1].error == "ValueError: no luck\ntoday"
    for rank in (0, 2):
        assert f"rank {rank} cannot finish {WAITING}" in outcomes[rank].error
        assert outcomes[rank].error.endswith("; rank 1 ended with ValueError: no luck today.")


def test_a_rank_raises_while_the_others_compute(ended):
    outcomes = ended["raises_while_others_compute"]
    assert [o.exit_code for o in outcomes] == [1, 1, 1]
    for rank in (0, 2):
        sentence = f"error: rank {rank} ends, because rank 1 ended with ValueError: no luck."
        assert sentence in outcomes[rank].stderr


@pytest.mark.slow
def test_a_rank_finishes_early(ended_slowly):
    """All fail, the early one too: its work is of no use without the others."""
    outcomes = ended_slowly["finishes_early"]
    assert [o.exit_code for o in outcomes] == [1, 1, 1]
    for rank in (0, 2):
        assert f"rank {rank} cannot finish {WAITING}" in outcomes[rank].error
        assert "rank 1 is done" in outcomes[rank].error
    assert outcomes[1].error.startswith("CommError: rank 1 had finished, but rank ")


def test_ranks_wait_for_each_other(ended):
    outcomes = ended["wait_for_each_other"]
    assert [o.exit_code for o in outcomes] == [1, 1, 1]
    for rank in range(3):
        asked = f"(1,) float32 from rank {(rank + 1) % 3}"
        assert f"rank {rank} cannot finish recv #1 on axis world" in outcomes[rank].error
        assert asked in outcomes[rank].error


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_ranks_end_when_their_launcher_is_killed(ended):
    deadline = time.monotonic() + 60
    while any(map(alive, ended["orphans"])) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, ended["orphans"]))


@pytest.mark.slow
def test_a_rank_that_never_comes(ended_slowly):
    errors = ended_slowly["rank 1 never comes"].stderr
    assert "rank 0 cannot finish connect #0 on axis world (<string>:2)" in errors
    assert re.search(LOST, errors)


def test_ranks_without_a_launcher(ended):
    errors = ended["no launcher"].stderr
    assert "CommError: rank 0 cannot meet the other ranks within 3 s; start all of them" in errors
    assert "environment variable MASTER_ADDR expected" in errors


@pytest.mark.slow
def test_torchrun_restarts(tmp_path):
    """1 + 2 = 3, also when it connects for the second time. The second attempt must not read what
    the first one left in the store."""
    options = ["--standalone", "--max-restarts", "1", "fail-first"]
    out, err = torchrun(tmp_path, *options).communicate(timeout=180)
    lines = [f"rank {rank} of 2, 2 per node: 3.0" for rank in range(2)]
    assert sorted(out.splitlines()) == lines, err
    assert "the first attempt fails" in err


@pytest.mark.exhaustive
def test_torchrun_on_two_nodes(tmp_path):
    """Two launchers on this machine: 1 + 2 + 3 + 4 = 10."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    options = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
    nodes = [torchrun(tmp_path, *options) for _ in range(2)]
    outputs = [node.communicate(timeout=180) for node in nodes]
    lines = sorted(line for out, _ in outputs for line in out.splitlines())
    assert lines == [f"rank {rank} of 4, 2 per node: 10.0" for rank in range(4)], outputs
