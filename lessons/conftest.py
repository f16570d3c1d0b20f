"""pytest lessons/03_data_parallel: each task is one test, skipped while it is not started.

--seed, --exercise and --as-processes mean what they mean for python -m lessons check.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lessons.kit import progress, report, server
from lessons.kit.tasks import Chapter, Task, read_chapter

RESULTS = pytest.StashKey[list]()


class NotPassed(Exception):
    """A task's message, to be shown without a traceback."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of lessons."""
    group = parser.getgroup("lessons")
    group.addoption("--seed", type=int, default=1, help="of sizes, values and order of turns")
    group.addoption("--exercise", help="another file than the lesson's exercise.py")
    group.addoption("--as-processes", action="store_true", help="ranks are real processes")


def pytest_configure(config: pytest.Config) -> None:
    """A place for results."""
    config.stash[RESULTS] = []


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector:
    """The test file of a lesson is no module of tests: its functions are tasks."""
    return LessonFile.from_parent(parent, path=module_path)


class LessonFile(pytest.File):
    """The test file of a lesson."""

    def collect(self) -> Iterator["TaskItem"]:
        """Its tasks."""
        server.start()
        chapter = read_chapter(self.path.parent)
        for task in chapter.tasks:
            yield TaskItem.from_parent(self, name=task.number, chapter=chapter, task=task)


class TaskItem(pytest.Item):
    """One task."""

    def __init__(self, chapter: Chapter, task: Task, **node: Any):
        super().__init__(**node)
        self.chapter, self.task = chapter, task

    def runtest(self) -> None:
        """Try it; raises NotPassed."""
        from lessons.kit import grading

        option = self.config.getoption  # defaults: of a conftest that is found late
        given = option("exercise", None)
        exercise = given or str(self.chapter.exercise)
        how = grading.how(exercise, option("seed", 1), option("as_processes", False))
        result = grading.run_task(self.chapter, self.task, how)
        self.config.stash[RESULTS].append(result)
        if not given:
            known = progress.read(self.chapter.folder.parent)
            known.tasks[self.task.number] = result.status
            known.save()
        if result.status == "todo":
            pytest.skip(result.message)
        if result.status != "passed":
            raise NotPassed(report.details(result.message, result.lines, result.printed))

    def repr_failure(self, excinfo: pytest.ExceptionInfo, style: str | None = None) -> Any:
        """The message alone; of a fault of the lesson itself, all."""
        if isinstance(excinfo.value, NotPassed):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        """For headings."""
        return self.path, 0, f"{self.task.number} {self.task.title}"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Marks and points."""
    results = config.stash[RESULTS]
    if not results:
        return
    terminalreporter.section("tasks")
    for result in results:
        points = result.points, result.max_points
        line = report.headline(result.number, result.title, result.status, *points)
        terminalreporter.write_line(line)
        if result.status == "passed" and result.lines:
            terminalreporter.write_line(report.details("", result.lines, ""))
    scored, worth = sum(r.points for r in results), sum(r.max_points for r in results)
    terminalreporter.write_line(f"{scored} of {worth} points")
