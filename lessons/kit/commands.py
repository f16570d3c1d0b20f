"""Commands of python -m lessons: each takes the parsed arguments and returns the exit code.

Torch is imported only by those that run something: `status` and `hint` answer at once.
Tests  tests/test_lesson_commands.py
"""

import json
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from lessons.kit import course, hints, progress, report
from lessons.kit import watch as watching
from lessons.kit.tasks import BadUse, Chapter, Task, chapters, find, folders

if TYPE_CHECKING:
    from lessons.kit.grading import Result


def status(args: Namespace) -> int:
    """A line per lesson, and what to do next."""
    known = _progress(args)
    every = chapters(args.lessons)
    for chapter in every:
        print(report.chapter_line(chapter, known.tasks))
    tasks = [task for chapter in every for task in chapter.tasks]
    scored = sum(task.points for task in tasks if known.tasks.get(task.number) == "passed")
    print(f"\n{scored} of {sum(task.points for task in tasks)} points")
    left = [(c, task) for c in every if (task := report.next_task(c, known.tasks))]
    if left:
        chapter, task = left[0]
        print(f"next: {task.number} {task.title}, about {task.minutes} minutes")
        print(f"      read {_shown(chapter.folder / 'README.md')}")
        print(f"      edit {_shown(chapter.exercise)}")
        print(f"      then python -m lessons check {task.number}")
    return 0


def check(args: Namespace) -> int:
    """Try the tasks of a lesson, or one."""
    from lessons.kit import grading

    chapter = find(args.what, args.lessons)
    if args.exercise and not Path(args.exercise.partition("::")[0]).is_file():
        raise BadUse(f"there is no file {args.exercise}: give an exercise, or file.py::mutant.")
    how = grading.how(
        args.exercise or str(chapter.exercise), args.seed, args.as_processes, args.debug
    )
    known, passed = _progress(args), True
    for task in _chosen(chapter, args.what):
        result = grading.run_task(chapter, task, how)
        show(result)
        passed = passed and result.status == "passed"
        known.tasks[task.number] = result.status
    if not args.exercise:
        known.save()
    return 0 if passed else 1


def show(result: "Result") -> None:
    """Print a grading.Result."""
    points = result.points, result.max_points
    print(report.headline(result.number, result.title, result.status, *points))
    words = report.details(result.message, result.lines, result.printed)
    if words:
        print(words)
    sys.stdout.flush()


def hint(args: Namespace) -> int:
    """The next level; after the last, all of them."""
    chapter = find(args.what, args.lessons)
    (task,) = _chosen(chapter, args.what, one=True)
    levels = hints.read(chapter.folder / "hints.md").get(task.number)
    if not levels:
        raise BadUse(f"{_shown(chapter.folder / 'hints.md')} has no hints for {task.number}.")
    known = _progress(args)
    read = known.hints.get(task.number, 0)
    level = read + 1
    if level == hints.LEVELS and not args.yes and not _sure(task):
        return 1
    for i in [level] if level <= hints.LEVELS else range(1, hints.LEVELS + 1):
        print(f"{task.number} {task.title}: hint {i} of {hints.LEVELS}\n\n{levels[i - 1]}\n")
    known.hints[task.number] = min(level, hints.LEVELS)
    known.save()
    return 0


def _sure(task: Task) -> bool:
    """Level 3 is nearly the code: ask before it is shown."""
    if not sys.stdin.isatty():
        print(
            f"level 3 is nearly the code; to read it: python -m lessons hint {task.number} --yes",
        )
        return False
    return input("level 3 is nearly the code. Show it? [y/N] ").strip().lower() in ("y", "yes")


def watch(args: Namespace) -> int:
    """Rerun the first unsolved task of the lesson whose exercise was saved."""
    from lessons.kit import grading

    only = find(args.what, args.lessons).folder if args.what else None

    def exercises() -> list[Path]:
        return [only / "exercise.py"] if only else [
            folder / "exercise.py" for folder in folders(args.lessons)
        ]  # fmt: skip

    def changed(path: Path) -> None:
        known = _progress(args)
        chapter = find(path.parent.name, args.lessons)
        while task := report.next_task(chapter, known.tasks):
            result = grading.run_task(chapter, task, grading.how(str(path)))
            show(result)
            known.tasks[task.number] = result.status
            known.save()
            if result.status != "passed":
                return
        print(f"lesson {chapter.number} is solved; what next: python -m lessons")

    def began() -> None:
        print("watching; save an exercise.py to check it, Ctrl-C to stop", flush=True)

    watching.changes(exercises, began, changed)
    return 0


def reset(args: Namespace) -> int:
    """Put the stub back; the student's file is kept beside it."""
    chapter = find(args.what, args.lessons)
    aside = course.reset(chapter)
    known = _progress(args)
    known.tasks = {k: v for k, v in known.tasks.items() if k[:2] != chapter.number}
    known.save()
    print(f"{_shown(chapter.exercise)} is the stub again; yours is kept in {_shown(aside)}")
    return 0


def pack(args: Namespace) -> int:
    """A zip of all exercises."""
    count = course.pack(chapters(args.lessons), args.out)
    print(f"{args.out} holds {count} exercises")
    return 0


def grade(args: Namespace) -> int:
    """Points of all lessons, on seeds that nobody saw, as results.json."""
    every = chapters(args.lessons)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        course.unpack(args.submission or args.lessons, folder, [c.folder.name for c in every])
        results = course.grade(every, folder, args.seed)
    args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    worth = sum(test["max_score"] for test in results["tests"])
    for test in results["tests"]:
        print(f"{test['name']:<70} {test['score']:>3} / {test['max_score']}")
    print(f"{results['score']} of {worth} points; details: {args.out}")
    return 0 if results["score"] == worth else 1


def _chosen(chapter: Chapter, what: str, one: bool = False) -> list[Task]:
    """The tasks that `what` names: one, or all of a lesson. Raises BadUse."""
    number = f"{chapter.number}.{what.partition('.')[2]}" if "." in what else ""
    tasks = [task for task in chapter.tasks if number in ("", task.number)]
    if not tasks or (one and not number):
        known = ", ".join(task.number for task in chapter.tasks)
        raise BadUse(f"lesson {chapter.number} has no task {what}; its tasks are {known}.")
    return tasks


def _progress(args: Namespace) -> progress.Progress:
    known = progress.read(args.lessons)
    if known.warning:
        print(known.warning, file=sys.stderr)
    return known


def _shown(path: Path) -> str:
    """Relative to where the student is, if it is below."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
