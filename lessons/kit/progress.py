"""Progress: what was solved and which hints were read, in lessons/.progress.json.

Only a memory for `status` and `hint`: grading looks at exercise.py alone.
Tests  tests/test_lesson_commands.py
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

STATUSES = ("passed", "failed", "refused", "todo")


@dataclass
class Progress:
    """Last result of each task, and the highest level of its hints that was read.

    warning  a sentence, if the file was damaged
    """

    path: Path
    tasks: dict[str, str] = field(default_factory=dict)
    hints: dict[str, int] = field(default_factory=dict)
    warning: str = ""

    def save(self) -> None:
        """Write it whole or not at all."""
        partial = self.path.with_name(f".progress.{os.getpid()}.partial")
        data = {"tasks": self.tasks, "hints": self.hints}
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)


def read(lessons: Path) -> Progress:
    """The progress in a folder of lessons; a damaged file is set aside, with a warning."""
    path = lessons / ".progress.json"
    if not path.exists():
        return Progress(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        tasks = {str(k): v for k, v in data["tasks"].items() if v in STATUSES}
        hints = {str(k): int(v) for k, v in data["hints"].items()}
        return Progress(path, tasks, hints)
    except (ValueError, KeyError, TypeError, AttributeError):
        aside = path.with_name(".progress.json.damaged")
        path.replace(aside)
        return Progress(
            path,
            warning=f"{path.name} could not be read and was set aside as {aside.name}; your "
            "exercises are untouched, `check` fills it again.",
        )
