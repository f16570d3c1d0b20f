"""Map: lessons/README.md, made from what the lessons say of themselves.

    python -m lessons.kit.map            writes it
Tests  tests/test_lessons.py
"""

from collections.abc import Sequence

from lessons.kit.tasks import LESSONS, Chapter, chapters

HEAD = """# Lessons

Write the techniques of `picotron_lab` yourself, on a laptop, without a GPU. Each lesson has one
page to read, one file to write, and a check that compares your code with one device in float64,
then holds it against the technique's budget of messages, bytes, memory and time.

```
python -m lessons                # where am I, what is next
python -m lessons check 03       # check a lesson, or one task: 03.2
python -m lessons hint 03.2      # three levels of hints
python -m lessons watch          # check again whenever you save an exercise.py
```

You edit only the file exercise.py of a lesson. Tasks in **bold** are the core: later lessons take
their ideas for granted. In a lesson, first write down your answers to the three predictions; the
check reports the numbers when you have passed.

| lesson | minutes | points | tasks | what you will have built |
|---|---|---|---|---|
"""
TAIL = """
All lessons: {minutes} minutes, {points} points; the core: {core_minutes} minutes, {core} points.

- `pytest lessons/03_data_parallel` does the same as `check 03`.
- `check 03.2 --seed 7` tries other sizes, other values and another order of turns; your code must
  pass with every seed. `--as-processes` runs the ranks as real processes over gloo.
- `check 03.2 --debug` runs everything in one process, so that `breakpoint()` stops in your code.
- `reset 03` puts the stub back and keeps your file; `pack` makes a zip of your exercises.
- `grade --submission FILE.zip` tries every task with three seeds and writes `results.json`, which
  Gradescope reads. Another `--seed` makes another exam.
"""


def text(every: Sequence[Chapter]) -> str:
    """lessons/README.md"""
    tasks = [task for chapter in every for task in chapter.tasks]
    core = [task for task in tasks if task.core]
    tail = TAIL.format(
        minutes=sum(task.minutes for task in tasks),
        points=sum(task.points for task in tasks),
        core_minutes=sum(task.minutes for task in core),
        core=sum(task.points for task in core),
    )
    return HEAD + "".join(map(_row, every)) + tail


def _row(chapter: Chapter) -> str:
    minutes = sum(task.minutes for task in chapter.tasks)
    tasks = ", ".join(f"**{t.number}**" if t.core else t.number for t in chapter.tasks)
    link = f"[{chapter.number} {chapter.lesson.title}]({chapter.folder.name}/README.md)"
    return f"| {link} | {minutes} | {chapter.points} | {tasks} | {chapter.lesson.builds} |\n"


if __name__ == "__main__":
    (LESSONS / "README.md").write_text(text(chapters()), encoding="utf-8")
