"""Grading: one task tried once is a Result; everything that reports or grades reads those.

Tests  tests/test_lesson_kit.py
"""

import ast
import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path

from lessons.kit import rules
from lessons.kit.attempt import Attempt, How, NotStarted, Wrong
from lessons.kit.tasks import Chapter, Task, load_tests

REFERENCES = ("solutions", "lesson_mutants")  # folders whose files may import the library


@dataclass(frozen=True)
class Result:
    """How one task ended.

    status   passed | failed | todo | refused
    lines    what was found right, and where to compare
    printed  what the student's code printed
    """

    number: str
    title: str
    status: str
    points: int
    max_points: int
    seconds: float
    message: str = ""
    lines: tuple[str, ...] = ()
    printed: str = ""


def how(exercise: str, seed: int = 1, as_processes: bool = False, debug: bool = False) -> How:
    """How to try an exercise; the import rules hold for all but solutions and mutants."""
    ours = Path(exercise.partition("::")[0]).parent.name in REFERENCES
    return How(exercise, seed, not ours, as_processes, debug)


def run_task(chapter: Chapter, task: Task, how: How) -> Result:
    """Try one task. Whatever the student's code does, a Result comes back."""
    start = time.monotonic()
    attempt = Attempt(chapter, task, how)
    status, message = _status(chapter, task, how, attempt)
    lines = tuple(attempt.lines) if status == "passed" else ()
    if status == "passed" and task.compare:
        lines += (f"compare with {where(task.compare)}",)
    points = task.points if status == "passed" else 0
    seconds = time.monotonic() - start
    return Result(
        task.number, task.title, status, points, task.points, seconds, message, lines,
        attempt.printed,
    )  # fmt: skip


def _status(chapter: Chapter, task: Task, how: How, attempt: Attempt) -> tuple[str, str]:
    if how.rules:
        found = rules.broken_rules(Path(how.exercise), chapter.lesson.allowed)
        if found:
            return "refused", "\n".join(found)
    try:
        getattr(load_tests(chapter.tests), task.function)(attempt)
    except NotStarted as stub:
        return "todo", str(stub)
    except Wrong as wrong:
        return "failed", str(wrong)
    except AssertionError:
        raise  # a mistake of the lesson's author
    except Exception as error:  # of a check that met values of another form than it asked for
        return "failed", attempt.stopped(f"{type(error).__name__}: {error}")
    return "passed", ""


def where(compare: str) -> str:
    """ "picotron_lab/zero.py, lines 120-141" of "picotron_lab.zero:Sharded.step", not importing."""
    module, _, name = compare.partition(":")
    path = Path(importlib.util.find_spec(module).origin)
    node = ast.parse(path.read_text(encoding="utf-8"))
    for part in name.split("."):
        node = next(n for n in node.body if getattr(n, "name", None) == part)
    package = module.replace(".", "/")
    return f"{package}.py, lines {node.lineno}-{node.end_lineno}"
