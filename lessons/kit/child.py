"""Child: a program of a lesson runs in a process of its own, with the student's code.

Idea    What a student writes may hang, crash, print without end or change what it should not: so it
        never runs in the process that judges it. Per run one child is forked from a forkserver that
        has imported torch; the ranks are threads of it (lab.py), or real processes on request.
Ends    always: at its time-out, and with its parent.
Back    comes a pickle of plain data: classes of student code are refused, not called.
Read    Job -> perform -> run_in_child        Tests  tests/test_lesson_kit.py
"""

import io
import multiprocessing
import multiprocessing.connection
import os
import pickle
import re
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from types import FunctionType, ModuleType, UnionType
from typing import Any, get_origin

import torch

from lessons.kit import server
from lessons.kit.compare import short
from lessons.kit.tasks import BadUse, files_of, load, load_tests
from lessons.todo import TODO
from picotron_lab.clock import Network
from picotron_lab.comm import Axis
from picotron_lab.lab import run_ranks
from picotron_lab.ledger import Call, CommError

STARTING = 300  # seconds that the first child may wait for imports, on a busy machine
PRINTED = 4000  # characters of a student's prints that are shown
HARMLESS = {
    "builtins": "list dict set frozenset tuple complex bytearray range slice int float bool str",
    "collections": "OrderedDict defaultdict Counter deque",
    "torch._utils": "_rebuild_tensor_v2 _rebuild_parameter _rebuild_parameter_with_state",
    "numpy": "dtype ndarray",
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy._core.multiarray": "_reconstruct scalar",
}


@dataclass(frozen=True)
class Job:
    """What to run: a function of a lesson's test file, on ranks, with the module `student`.

    exercise  path of a file, or "mutants.py::name"
    args      pickled: they may hold classes of the test file, which must be loaded before
    seed      of the order in which ranks take turns
    """

    tests: Path
    exercise: str
    program: str
    ranks: int
    args: bytes
    seed: int
    network: Network | None = None


@dataclass(frozen=True)
class Ending:
    """How a run ended: done | todo | error | disagreement | timeout.

    words  the number of the unfinished task, or a sentence
    lines  of the student's files where it happened, innermost first
    """

    kind: str
    values: list[Any] | None = None
    calls: list[list[Call]] | None = None
    times: list[float] | None = None
    words: str = ""
    lines: tuple[str, ...] = ()
    printed: str = ""


# ---- in the process that runs it


def perform(job: Job) -> Ending:
    """Run it here, on the lab's threads."""
    students: dict[int, Student] = {}  # by rank: nothing is shared, as between processes
    try:
        program = _program(job)
        students |= {rank: _student(job, rank) for rank in range(job.ranks)}
        args = [pickle.loads(job.args) for _ in students]

        def rank_main(axis: Axis) -> tuple:
            value = program(axis, students[axis.rank], *args[axis.rank])
            return value, list(axis.ledger.calls), axis.now() if job.network else 0.0

        found = run_ranks(rank_main, job.ranks, seed=job.seed, network=job.network)
    except (Exception, SystemExit) as error:
        return _explain(error, job, students)
    values, calls, times = (list(part) for part in zip(*found, strict=True))
    return Ending("done", values, calls, times)


class Student:
    """The module `student` of one rank, which remembers what its functions returned last.

    returned  a sentence if that is of another type than the function's signature says, or empty
    """

    def __init__(self, module: ModuleType):
        self.module, self.returned = module, ""

    def __getattr__(self, name: str) -> Any:
        """The name of the module; a function of it is watched."""
        found = getattr(self.module, name)
        return self._watched(found) if isinstance(found, FunctionType) else found

    def _watched(self, function: FunctionType) -> Callable:
        @wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            value = function(*args, **options)
            self.returned = misreturned(function, value)
            return value

        return call


def misreturned(function: FunctionType, value: Any) -> str:
    """A sentence if the value is of another type than the signature says, or nothing."""
    wanted = function.__annotations__.get("return")
    kind = get_origin(wanted) or wanted
    try:
        fits = isinstance(value, kind)
    except TypeError:  # no type: None, words, Any, or one of several
        return ""
    if fits or kind is UnionType or (kind is float and isinstance(value, int)):
        return ""
    named = short(value)
    return f"{function.__name__} returned {named}, where its signature says {kind.__name__}"


def _program(job: Job) -> Callable:
    """The function to run; it must be loaded before its arguments, which may be of its classes."""
    return getattr(load_tests(job.tests), job.program)


def _student(job: Job, rank: int) -> Student:
    """The student's code, for one rank."""
    return Student(load(job.exercise, f"exercise_{rank}"))


def _explain(error: BaseException, job: Job, students: dict[int, Student]) -> Ending:
    """What went wrong in words that help a student: no line of ours, all lines of theirs.

    students  by rank, as far as they were loaded
    """
    if isinstance(error, TODO):
        return Ending("todo", words=error.number)
    frames = reversed(traceback.extract_tb(error.__traceback__))
    files = files_of(job.exercise)
    mine = [f for f in frames if f.filename in files]
    lines = tuple(f"{Path(f.filename).name}:{f.lineno}  {f.line}" for f in mine)
    if isinstance(error, CommError):
        words = str(error).replace("; rank ", ";\nrank ")  # a line for each
        return Ending("disagreement", words=words, lines=lines)
    if type(error).__name__ == "BdbQuit":
        return Ending("error", words="breakpoint() needs a terminal: add --debug", lines=lines)
    found = re.search(r"raised by rank (\d+)", " ".join(getattr(error, "__notes__", [])))
    where = f" on rank {found[1]}" if found and job.ranks > 1 else ""
    words = f"{type(error).__name__}{where}: {error}"[:PRINTED]
    if not lines and not isinstance(error, BadUse):
        student = students.get(int(found[1]) if found else 0)
        returned = student.returned if student else ""
        words = f"your code returned, and the check could not use what it returned: {words}"
        words = f"{returned}\n({words})" if returned else words
    return Ending("error", words=words, lines=lines)


# ---- around it


def run_in_child(job: Job, timeout: float) -> Ending:
    """Run it in a process of its own.

    timeout  seconds until that is killed
    """
    context = server.context()
    begun, begins = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = context.Process(target=_child, args=(job, folder, begins), daemon=True)
        process.start()
        begins.close()
        begun.poll(STARTING)  # also when it died: its end is closed then
        process.join(timeout)
        late = process.is_alive()
        if late:
            process.kill()
            process.join()
        ending = Ending("timeout") if late else _read(folder / "end", process.exitcode)
        return replace(ending, printed=_printed(folder / "printed"))


def run_as_processes(job: Job, timeout: float) -> Ending:
    """Run it on real processes over gloo, one per rank."""
    from picotron_lab.processes import launch

    with tempfile.TemporaryDirectory() as name:
        outcomes = launch(be_rank, job.ranks, job, Path(name), timeout=timeout)
        printed = "".join(outcome.stdout for outcome in outcomes)[:PRINTED]
        failed = [outcome for outcome in outcomes if outcome.exit_code != 0]
        if not failed:
            values, calls = (list(p) for p in zip(*(o.result for o in outcomes), strict=True))
            return Ending("done", values, calls, [0.0] * job.ranks, printed=printed)
        first = min(failed, key=lambda outcome: outcome.ended)
        path = Path(name) / str(first.rank)
        ending = Ending("error", words=f"rank {first.rank}: {first.error}")
        return replace(_read(path, 0) if path.exists() else ending, printed=printed)


def be_rank(axis: Axis, job: Job, folder: Path) -> tuple[Any, list[Call]]:
    """One rank of run_as_processes: (value, calls); what went wrong is left in the folder."""
    students: dict[int, Student] = {}
    try:
        program = _program(job)
        student = students[axis.rank] = _student(job, axis.rank)
        return program(axis, student, *pickle.loads(job.args)), list(axis.ledger.calls)
    except (Exception, SystemExit) as error:
        error.add_note(f"(raised by rank {axis.rank})")
        (folder / str(axis.rank)).write_bytes(pickle.dumps(_explain(error, job, students)))
        raise


def _child(job: Job, folder: Path, begins: multiprocessing.connection.Connection) -> None:
    begins.send(True)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    with open(folder / "printed", "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    ending = perform(job)
    try:
        data = pickle.dumps(ending)
    except (pickle.PicklingError, TypeError, AttributeError, RuntimeError) as error:
        words = f"the result is not made of tensors and numbers: {error}"
        data = pickle.dumps(Ending("error", words=words))
    (folder / "partial").write_bytes(data)
    (folder / "partial").rename(folder / "end")  # whole or not at all


def _end_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _printed(path: Path) -> str:
    """What was printed, shortened in the middle."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    if len(text) <= PRINTED:
        return text
    half = PRINTED // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"


def _read(path: Path, exit_code: int | None) -> Ending:
    if not path.exists():
        return Ending("error", words=f"the process of the ranks died (exit code {exit_code}).")
    try:
        return PlainData(io.BytesIO(path.read_bytes())).load()
    except pickle.UnpicklingError as error:
        return Ending("error", words=str(error))


class PlainData(pickle.Unpickler):
    """Reads tensors, numbers, containers, and classes of the library and the test file."""

    def find_class(self, module: str, name: str) -> Callable:
        """The class or function of that name, if it is harmless; else UnpicklingError."""
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return lambda data: torch.load(io.BytesIO(data), weights_only=True)
        mine = re.fullmatch(r"exercise(_\d+)?", module)
        found = None if mine else super().find_class(module, name)
        ours = module.startswith(("picotron_lab.", "lesson_", "lessons.kit.child"))
        if name in HARMLESS.get(module, "").split() or (ours and isinstance(found, type)):
            return found
        if module == "torch" and isinstance(found, torch.dtype | type):
            return found
        raise pickle.UnpicklingError(
            f"the result holds an object of {'exercise' if mine else module}.{name}: return "
            "tensors and numbers."
        )
