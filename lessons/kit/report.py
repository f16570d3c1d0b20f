"""Report: results as text, for the terminal and for pytest.

Tests  tests/test_lesson_commands.py
"""

from collections.abc import Sequence

from lessons.kit.tasks import Chapter, Task

MARKS = {"passed": "✔", "failed": "✘", "refused": "✘", "todo": "○"}
WIDTH = 62  # of a task's title


def headline(number: str, title: str, status: str, points: int, worth: int) -> str:
    """One line: mark, number, title, points."""
    return f"{MARKS[status]} {number}  {title:<{WIDTH}} {points:>3} / {worth}"


def details(message: str, lines: Sequence[str], printed: str) -> str:
    """What follows the headline, indented; empty if there is nothing to say."""
    parts = [message] if message else []
    parts += lines
    if printed:
        parts.append("what your code printed:\n" + printed.rstrip("\n"))
    return "\n".join("  " + line for part in parts for line in part.splitlines())


def chapter_line(chapter: Chapter, statuses: dict[str, str]) -> str:
    """One line per lesson: its marks and points."""
    found = [statuses.get(task.number, "todo") for task in chapter.tasks]
    marks = "".join(MARKS[status] for status in found)
    scored = sum(
        task.points for task, status in zip(chapter.tasks, found, strict=True) if status == "passed"
    )
    return f"{chapter.number}  {chapter.lesson.title:<40} {marks:<6} {scored:>3} / {chapter.points}"


def next_task(chapter: Chapter, statuses: dict[str, str]) -> Task | None:
    """The first task that is not solved."""
    left = [task for task in chapter.tasks if statuses.get(task.number) != "passed"]
    return left[0] if left else None
