"""A lesson made up for the tests of the lesson kit: two tasks, a stub, answers."""

import textwrap
from pathlib import Path

from lessons.kit import attempt, grading, tasks

TESTS = '''
from dataclasses import dataclass

import torch
from torch import Tensor

from lessons.kit import Lesson, task
from picotron_lab.clock import Network

LESSON = Lesson(title="Tiny", builds="A mean.", allowed=("picotron_lab.comm",))


@dataclass
class Case:
    x_RN: Tensor


def averaged(axis, student, case):
    return Case(student.mean(case.x_RN[axis.rank], axis))


def doubled(axis, student):
    axis.spend(2.0)
    return student.double([float(axis.rank)])


@task("03.1", points=5, minutes=5, core=True, compare="picotron_lab.comm:Axis.all_reduce")
def test_mean(attempt):
    """Ranks agree on the mean."""
    case = Case(torch.randn(3, 5, generator=attempt.generator, dtype=torch.float64))
    run = attempt.run(averaged, 3, case, timeout=3)
    attempt.same("mean", [v.x_RN for v in run.values], [case.x_RN.mean(0)] * 3, ranks=3)
    attempt.equal("calls", run.count("all_reduce", rank=1), 1, formula="one", because="once!")
    attempt.at_most("bytes", run.bytes(axis="world"), 40, formula="8 N")


@task("03.2", points=3, minutes=5)
def test_double(attempt):
    """Lists are doubled."""
    run = attempt.run(doubled, 2, network=Network(latency=1.0))
    attempt.same("lists", run.values, [[0.0], [2.0]], ranks=2)
    attempt.equal("seconds", run.times, [2.0, 2.0], formula="as spent")
'''
HEAD = "import torch\nfrom lessons import TODO\n"
MEAN = "def mean(x, axis):\n    return axis.all_reduce(x) / axis.size\n"
DOUBLE = "def double(xs):\n    return [2 * x for x in xs]\n"
DOUBLE_STUB = "def double(xs):\n    raise TODO('03.2')\n"
STUB = HEAD + "def mean(x, axis):\n    raise TODO('03.1')\n" + DOUBLE_STUB
SOLVED = HEAD + MEAN + DOUBLE
HINTS = "".join(
    f"## 03.{task}\n"
    + "".join(
        f"<details><summary>Level {level}</summary>\n\nhint {task}{level}\n\n</details>\n"
        for level in (1, 2, 3)
    )
    for task in (1, 2)
)


def write_lesson(lessons: Path) -> Path:
    """Put the lesson, not started, into a folder of lessons; returns its own folder."""
    lesson = lessons / "03_tiny"
    lesson.mkdir(parents=True)
    for name, text in {
        "test_tiny.py": TESTS, "exercise.py": STUB, "stub.py": STUB, "hints.md": HINTS,
    }.items():  # fmt: skip
        (lesson / name).write_text(text)
    return lesson


def tried(folder: Path, text: str, number: str = "03.1", **how) -> grading.Result:
    """The result of one task for an exercise of that text."""
    (folder / "exercise.py").write_text(HEAD + textwrap.dedent(text))
    chapter = tasks.read_chapter(folder)
    (task,) = [task for task in chapter.tasks if task.number == number]
    return grading.run_task(chapter, task, attempt.How(str(folder / "exercise.py"), **how))
