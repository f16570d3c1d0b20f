"""Tasks: what a lesson's files say, and how they are read.

A lesson is a folder NN_name with README.md, exercise.py, stub.py, hints.md and one test_*.py, which
defines LESSON and functions marked with @task. What those say is read from the text, so that
`python -m lessons` answers before torch would be imported; so their arguments are plain literals.
Files are compiled from their text at every run: a byte-code cache may miss an edit within the same
second.
Read    Lesson, task -> Chapter -> read_chapter -> load        Tests  tests/test_lesson_kit.py
"""

import ast
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

LESSONS = Path(__file__).parent.parent


class BadUse(Exception):
    """A sentence about a command or a lesson's file that is wrong."""


@dataclass(frozen=True)
class Lesson:
    """What the test file of a lesson says about it.

    builds   one sentence: what the student will have built
    allowed  modules that exercise.py may import beside torch, numpy and the standard library's data
             types
    broken   numbers of tasks whose stub is a broken program to repair
    """

    title: str
    builds: str
    allowed: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """One task: its number such as "03.2", what it is worth, and what checks it.

    title     the first line of the docstring, without its full stop
    function  name in the test file
    """

    number: str
    points: int
    minutes: int
    core: bool = False
    compare: str = ""
    title: str = ""
    function: str = ""


@dataclass(frozen=True)
class Mutant:
    """A plausible wrong answer: the task that must catch it, and words that must be said."""

    task: str
    words: str
    make: Callable[[ModuleType], dict[str, Any]]


@dataclass(frozen=True)
class Chapter:
    """A lesson's folder, read."""

    folder: Path
    lesson: Lesson
    tasks: tuple[Task, ...]

    @property
    def number(self) -> str:
        """Two digits."""
        return self.folder.name[:2]

    @property
    def exercise(self) -> Path:
        """The file that the student edits."""
        return self.folder / "exercise.py"

    @property
    def tests(self) -> Path:
        """The file that checks it."""
        return test_file(self.folder)

    @property
    def points(self) -> int:
        """Of all tasks."""
        return sum(task.points for task in self.tasks)


def task(
    number: str, points: int, minutes: int, core: bool = False, compare: str = ""
) -> Callable[[Callable], Callable]:
    """Mark a function that checks one task; its docstring's first line is the task's title.

    minutes  that a student needs
    core     whether the tasks of later lessons take it for granted
    compare  "module:qualified.name" of the library that does the same, shown after passing
    """

    return lambda function: function  # read_chapter reads all this from the text


def mutant(number: str, words: str) -> Callable[[Callable], Callable]:
    """Mark a wrong answer: the task `number` must fail with a message that holds `words`.

    The function gets the module of the solution and returns {name: what to put in its place}.
    """

    def mark(function: Callable[[ModuleType], dict]) -> Callable[[ModuleType], dict]:
        function.mutant = Mutant(number, words, function)
        return function

    return mark


# ---- files


def test_file(folder: Path) -> Path:
    """The one test_*.py of a lesson. Raises BadUse."""
    found = sorted(folder.glob("test_*.py"))
    if len(found) != 1:
        raise BadUse(f"{folder.name} must have one test_*.py, it has {len(found)}: name it so.")
    return found[0]


def read_chapter(folder: Path) -> Chapter:
    """Read what a lesson's test file says, not running it. Raises BadUse where it is not so."""
    path = test_file(folder)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lesson, tasks = None, []
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LESSON":
            lesson = Lesson(**_literals(node.value, path)[1])
        for call in getattr(node, "decorator_list", []):
            if ast.unparse(call).startswith("task("):
                args, options = _literals(call, path)
                title = (ast.get_docstring(node) or "").partition("\n")[0].rstrip(".")
                tasks.append(Task(*args, **options, title=title, function=node.name))
    for one in tasks:
        if not re.fullmatch(folder.name[:2] + r"\.\d", one.number) or not one.title:
            raise BadUse(
                f"task {one.number} of {folder.name} needs a number such as {folder.name[:2]}.1 "
                "and a docstring, whose first line is its title."
            )
    if lesson is None or not tasks:
        raise BadUse(f"{path.name} needs LESSON = Lesson(...) and a function with @task(...).")
    return Chapter(folder, lesson, tuple(sorted(tasks, key=lambda task: task.number)))


def _literals(call: ast.Call, path: Path) -> tuple[list, dict]:
    try:
        args = [ast.literal_eval(arg) for arg in call.args]
        return args, {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    except ValueError:
        raise BadUse(
            f"{path.name}:{call.lineno}: write numbers and texts, not expressions, in "
            "Lesson(...) and @task(...): they are read without running the file."
        ) from None


def chapters(lessons: Path = LESSONS) -> list[Chapter]:
    """All lessons of a folder, in order."""
    return [read_chapter(folder) for folder in folders(lessons)]


def folders(lessons: Path = LESSONS) -> list[Path]:
    """The folders of lessons, in order."""
    found = sorted(path for path in lessons.glob("[0-9][0-9]_*") if path.is_dir())
    return [path for path in found if list(path.glob("test_*.py"))]


def find(what: str, lessons: Path = LESSONS) -> Chapter:
    """The lesson of a number such as "03", "3" or "03.2", or of its folder. Raises BadUse."""
    name = Path(what).name
    number = name.partition("." if "." in name else "_")[0]
    every = folders(lessons)
    for folder in every:
        if number.isdigit() and folder.name[:2] == f"{int(number):02}":
            return read_chapter(folder)
    known = ", ".join(folder.name[:2] for folder in every) or "none"
    raise BadUse(f"there is no lesson {what}; the lessons are {known}.")


def load_tests(path: Path) -> ModuleType:
    """The module of a test file, under one name in parent and child, as pickle needs it."""
    return load_file(path, f"lesson_{path.parent.name}")


def load_file(path: Path, name: str) -> ModuleType:
    """Run a file as module `name`, from its text."""
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses and pickle look it up
    exec(_compiled(path.read_text(encoding="utf-8"), str(path)), vars(module))
    return module


@lru_cache(maxsize=8)  # each rank runs the same text
def _compiled(text: str, path: str) -> CodeType:
    return compile(text, path, "exec")


def load(spec: str, module: str = "exercise") -> ModuleType:
    """The module `student`: of a path, or of "mutants.py::name", a solution with names replaced.

    The solution of tests/lesson_mutants/03_x.py is tests/solutions/03_x.py.
    module  its name: ranks that are threads have one module each, as processes would
    """
    path, _, name = spec.partition("::")
    if not name:
        return load_file(Path(path), module)
    solution = Path(path).parent.parent / "solutions" / Path(path).name
    mutants = mutants_of(Path(path))
    if name not in mutants:
        raise BadUse(f"{path} has no mutant {name}; it has {', '.join(mutants)}.")
    # the mutant may call what it replaces: so it is given a solution of its own
    replaced = mutants[name].make(load_file(solution, "solution"))
    student = load_file(solution, module)
    for key, value in replaced.items():
        if not hasattr(student, key):
            raise BadUse(f"mutant {name} replaces {key}, which {solution.name} does not have.")
        setattr(student, key, value)
    return student


def mutants_of(path: Path) -> dict[str, Mutant]:
    """The mutants of a file by the name of their function, in order."""
    module = load_file(path, "mutants")
    return {key: v.mutant for key, v in vars(module).items() if hasattr(v, "mutant")}


def files_of(spec: str) -> tuple[str, ...]:
    """Paths of the files whose lines are the student's."""
    path, _, name = spec.partition("::")
    solution = Path(path).parent.parent / "solutions" / Path(path).name
    return (path, str(solution)) if name else (path,)
