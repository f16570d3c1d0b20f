"""Course: grade all lessons as Gradescope reads it, pack a submission, read one safely.

Of a submission only NN_name/exercise.py is read, wherever it lies in the folder or zip.
Tests  tests/test_lesson_commands.py
"""

import random
import re
import shutil
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from lessons.kit.tasks import BadUse, Chapter, Task

SEEDS = 3  # a task gets its points only if it passes with all
LARGEST = 1_000_000  # bytes of one exercise


def grade(chapters: Sequence[Chapter], folder: Path, seed: int) -> dict[str, Any]:
    """results.json of all tasks.

    folder  with NN_name/exercise.py; lessons that are missing there count 0
    seed    makes the seeds that every task is tried with
    """
    start = time.monotonic()
    seeds = random.Random(seed).sample(range(1, 100_000), SEEDS)
    tests = [
        _graded(chapter, task, folder / chapter.folder.name / "exercise.py", seeds)
        for chapter in chapters
        for task in chapter.tasks
    ]
    return {
        "score": sum(test["score"] for test in tests),
        "execution_time": round(time.monotonic() - start),
        "visibility": "visible",
        "stdout_visibility": "hidden",
        "extra_data": {"seed": seed, "seeds": seeds},
        "tests": tests,
    }


def _graded(chapter: Chapter, task: Task, exercise: Path, seeds: list[int]) -> dict[str, Any]:
    """One entry of "tests"; the first seed that fails ends it."""
    from lessons.kit import grading  # imports torch, which `pack` and `reset` do without

    status, output, score = "failed", f"no {chapter.folder.name}/exercise.py was handed in.", 0
    for seed in seeds if exercise.exists() else ():
        result = grading.run_task(chapter, task, grading.How(str(exercise), seed))
        status, output, score = result.status, result.message, result.points
        if status != "passed":
            output += f"\nto see it: python -m lessons check {task.number} --seed {seed}"
            break
    return {
        "number": task.number,
        "name": f"{task.number} {task.title}",
        "score": score,
        "max_score": task.points,
        "status": "passed" if status == "passed" else "failed",
        "output": output or f"passed with the seeds {', '.join(map(str, seeds))}.",
        "output_format": "text",
        "visibility": "visible",
    }


def unpack(submission: Path, folder: Path, names: Sequence[str]) -> None:
    """Copy the exercises of the lessons `names` from a folder or zip to `folder`. Raises BadUse."""
    if submission.is_dir():
        found = [(p.relative_to(submission), p) for p in submission.rglob("exercise.py")]
        files = [(path, p) for path, p in found if p.is_file() and not p.is_symlink()]
        _copy([(path, lambda p=p: p.open("rb")) for path, p in files], folder, names)
    elif zipfile.is_zipfile(submission):
        with zipfile.ZipFile(submission) as archive:
            _copy(list(_entries(archive)), folder, names)
    else:
        raise BadUse(f"{submission} is neither a folder nor a zip file: hand in what `pack` made.")


def _entries(archive: zipfile.ZipFile) -> list[tuple]:
    """(path, function that opens it) of the exercises in a zip; nothing else is unpacked."""
    entries = []
    for entry in archive.infolist():
        path = PurePosixPath(entry.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or re.match(r"\w:", entry.filename):
            raise BadUse(
                f"the zip holds the path {entry.filename}, which leads out of it: pack again."
            )
        entries.append((path, lambda entry=entry: archive.open(entry)))
    return entries


def _copy(found: list[tuple], folder: Path, names: Sequence[str]) -> None:
    for path, opened in found:
        if path.name != "exercise.py" or path.parent.name not in names:
            continue
        target = folder / path.parent.name / "exercise.py"
        if target.exists():
            raise BadUse(f"the submission holds {path.parent.name}/exercise.py twice: keep one.")
        with opened() as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise BadUse(f"{path} is too long: an exercise has at most {LARGEST:,} bytes.")
        target.parent.mkdir(parents=True)
        target.write_bytes(data)


def pack(chapters: Sequence[Chapter], out: Path) -> int:
    """Write a zip of all exercises; returns their number."""
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for chapter in chapters:
            archive.write(chapter.exercise, f"{chapter.folder.name}/exercise.py")
    return len(chapters)


def reset(chapter: Chapter) -> Path:
    """Put the stub back; returns where the student's file is kept."""
    number, aside = 1, chapter.folder / "exercise.py.bak"
    while aside.exists():
        number += 1
        aside = chapter.folder / f"exercise.py.bak{number}"
    shutil.copyfile(chapter.exercise, aside)
    shutil.copyfile(chapter.folder / "stub.py", chapter.exercise)
    return aside
