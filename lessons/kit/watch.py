"""Watch: rerun the first unsolved task of a lesson whenever its exercise.py is saved.

Tests  tests/test_lesson_commands.py
"""

import time
from collections.abc import Callable
from pathlib import Path

PERIOD = 0.2  # seconds between two looks


def changes(
    paths: Callable[[], list[Path]], began: Callable[[], None], changed: Callable[[Path], None]
) -> None:
    """Call began(), then changed(path) for every file that is saved; for ever, until Ctrl-C."""
    seen = {path: _stamp(path) for path in paths()}
    began()
    while True:
        time.sleep(PERIOD)
        for path in paths():
            stamp = _stamp(path)
            if stamp and stamp != seen.get(path):
                seen[path] = stamp
                changed(path)


def _stamp(path: Path) -> tuple[int, int] | None:
    """None: it is not there, as some editors leave it for a moment while saving."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_mtime_ns, stat.st_size
