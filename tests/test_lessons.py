"""The gates of the lessons: every stub is not started, every solution right, every mutant caught.

A mutant is a plausible wrong answer (lesson_mutants/): it names the task that must fail it, and
words that must be said. So the checks are checked.
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from lessons.kit import grading, hints, map, tasks

ROOT = Path(__file__).parent.parent
FOLDERS = tasks.folders()
SEEDS = (1, 2, 3, 4, 5)
FEWEST_MUTANTS = 50


def folder_id(folder: Path) -> str:
    return folder.name


def some_lessons() -> list:
    """Every third always; the others after a change, as CI has their other seeds."""
    rare = pytest.mark.exhaustive
    return [pytest.param(f, marks=[rare] * (k % 3 > 0)) for k, f in enumerate(FOLDERS)]


each_lesson = pytest.mark.parametrize("folder", FOLDERS, ids=folder_id)


@cache
def chapter_of(folder: Path) -> tasks.Chapter:
    return tasks.read_chapter(folder)


def solution_of(folder: Path) -> Path:
    return ROOT / "tests" / "solutions" / f"{folder.name}.py"


def mutant_names(folder: Path) -> list[str]:
    """From the text: nothing is run while tests are collected."""
    path = ROOT / "tests" / "lesson_mutants" / f"{folder.name}.py"
    body = ast.parse(path.read_text(encoding="utf-8")).body if path.exists() else []
    marked = [n for n in body if isinstance(n, ast.FunctionDef) and n.decorator_list]
    return [f"{path}::{node.name}" for node in marked]


def every_mutant() -> list:
    return [
        pytest.param(folder, spec, id=f"{folder.name}-{spec.rpartition('::')[2]}")
        for folder in FOLDERS
        for spec in mutant_names(folder)
    ]


def results(
    folder: Path, how: grading.How, first: str = "00", last: str = "99"
) -> list[grading.Result]:
    """Of the tasks in order, from `first` to `last`."""
    chapter = chapter_of(folder)
    chosen = [task for task in chapter.tasks if first <= task.number <= last]
    return [grading.run_task(chapter, task, how) for task in chosen]


def full_points(folder: Path, how: grading.How) -> None:
    found = results(folder, how)
    failed = [f"{r.number} {r.title} ({r.status})\n{r.message}" for r in found if not r.points]
    assert not failed, "\n\n".join(failed)
    assert all(r.status == "passed" and r.points == r.max_points for r in found)


# ---- stubs


@pytest.mark.slow  # left to CI
@each_lesson
def test_stub_is_not_started(folder):
    found = results(folder, grading.How(str(folder / "stub.py")))
    broken = chapter_of(folder).lesson.broken
    for result in found:
        assert result.points == 0
        if result.number in broken:
            assert result.status == "failed" and "hint: " in result.message, result.message
        else:
            assert result.status == "todo", f"{result.number} {result.status}: {result.message}"


@each_lesson
def test_exercise_begins_as_the_stub(folder):
    if (folder.parent / ".progress.json").exists():
        pytest.skip("somebody works on the lessons here")
    assert (folder / "exercise.py").read_text() == (folder / "stub.py").read_text()


def test_stubs_are_one_page():
    for folder in FOLDERS:
        for name, limit in (("stub.py", 150), ("README.md", 80)):
            lines = (folder / name).read_text().splitlines()
            assert len(lines) <= limit, f"{folder.name}/{name} has {len(lines)} lines"


# ---- solutions


@pytest.mark.parametrize("folder", some_lessons(), ids=folder_id)
def test_solution_gets_all_points(folder):
    full_points(folder, grading.how(str(solution_of(folder)), SEEDS[0]))


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS[1:])
@each_lesson
def test_solution_gets_all_points_with_every_seed(folder, seed):
    full_points(folder, grading.how(str(solution_of(folder)), seed))


@pytest.mark.slow
@each_lesson
def test_solution_gets_all_points_as_processes(folder):
    full_points(folder, grading.how(str(solution_of(folder)), SEEDS[0], as_processes=True))


def public_names(path: Path) -> dict[str, ast.AST]:
    """{name or Class.method: its definition} of what a stub asks for."""
    found = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
            found |= {f"{node.name}.{m.name}": m for m in methods if m.name[0] != "_"}
    return found


def parameters(function: ast.FunctionDef) -> list[str]:
    a = function.args
    return [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs)]


@each_lesson
def test_stub_and_solution_share_names_and_parameters(folder):
    """Re-exports and aliases of the library may name parameters otherwise: not looked at."""
    solved = public_names(solution_of(folder))
    module = ast.parse(solution_of(folder).read_text())
    bound = {name for node in ast.walk(module) for name in names_bound(node)}
    for name, stub in public_names(folder / "stub.py").items():
        assert name.partition(".")[0] in bound, f"the solution lacks {name}"
        if name in solved:
            assert parameters(stub) == parameters(solved[name]), name


def names_bound(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom | ast.Import):
        return [alias.asname or alias.name for alias in node.names]
    if isinstance(node, ast.Assign):
        return [t.id for t in node.targets if isinstance(t, ast.Name)]
    return [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []


# ---- mutants


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "spec"), every_mutant())
def test_mutant_is_caught_by_the_task_it_names(folder, spec):
    path, _, name = spec.partition("::")
    mutants = tasks.mutants_of(Path(path))
    mutant = mutants[name]
    # earlier tasks are tried too for the first mutant of a task: for all, it would take minutes
    is_first = name == next(key for key, other in mutants.items() if other.task == mutant.task)
    first = "00" if is_first else mutant.task
    found = results(folder, grading.how(spec), first, mutant.task)
    assert found and found[-1].number == mutant.task, f"there is no task {mutant.task}"
    before = [f"{r.number}: {r.message}" for r in found[:-1] if r.status != "passed"]
    assert not before, f"{mutant.task} should be the first to fail\n" + "\n".join(before)
    last = found[-1]
    assert last.status == "failed", f"{mutant.task} {last.status}: it must fail"
    said, needed = (" ".join(text.split()) for text in (last.message, mutant.words))
    assert needed in said, f"'{mutant.words}' is not said:\n{last.message}"


def test_there_are_many_mutants():
    counts = {folder.name: len(mutant_names(folder)) for folder in FOLDERS}
    assert sum(counts.values()) >= FEWEST_MUTANTS, counts
    assert min(counts.values()) >= 4, counts


# ---- texts


@each_lesson
def test_docstrings_are_complete(folder):
    """What raises TODO says what is there afterwards, or its budget: itself or in its class."""
    tree = ast.parse((folder / "stub.py").read_text(encoding="utf-8"))
    owners = {m: c for c in tree.body if isinstance(c, ast.ClassDef) for m in c.body}
    told: dict[str, str] = {}
    for node in [*tree.body, *owners]:
        for number in re.findall(r"raise TODO\('(\d\d\.\d)'\)", ast.unparse(node)):
            words = [ast.get_docstring(n) or "" for n in (node, owners.get(node)) if n is not None]
            assert any(words), f"{node.name} has no docstring"
            told[number] = told.get(number, "") + "".join(words)
    chapter = chapter_of(folder)
    for task in chapter.tasks:
        words = told.get(task.number, "")
        known = "After" in words or "Budget" in words or task.number in chapter.lesson.broken
        assert known, f"{task.number}: no docstring of its stub has a field After or Budget"


@each_lesson
def test_hints_have_three_levels(folder):
    found = hints.read(folder / "hints.md")
    numbers = [task.number for task in chapter_of(folder).tasks]
    assert sorted(found) == numbers
    empty = [f"{n} level {i}" for n in numbers for i, words in enumerate(found[n], 1) if not words]
    assert not empty


@each_lesson
def test_library_has_what_tasks_compare_with(folder):
    for task in chapter_of(folder).tasks:
        assert not task.compare or "lines" in grading.where(task.compare)


def test_map_is_the_generated_one():
    written = (tasks.LESSONS / "README.md").read_text(encoding="utf-8")
    assert written == map.text(tasks.chapters()), "run: python -m lessons.kit.map"


def test_lessons_import_no_solutions():
    for path in tasks.LESSONS.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "tests" for name in names), path
