"""Hints: three levels per task, from hints.md.

    ## 03.2
    <details><summary>Level 1</summary>

    ...

    </details>
Tests  tests/test_lesson_commands.py, tests/test_lessons.py
"""

import re
from pathlib import Path

LEVELS = 3
BLOCK = re.compile(
    r"<details>\s*<summary>Level (\d)</summary>(.*?)</details>", re.DOTALL | re.IGNORECASE
)


def read(path: Path) -> dict[str, list[str]]:
    """{task: [level 1, level 2, level 3]}; an empty text where a level is missing."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    sections = re.split(r"^## +(\d\d\.\d)\b.*$", text, flags=re.MULTILINE)[1:]
    hints = {}
    for number, body in zip(sections[::2], sections[1::2], strict=True):
        blocks = {int(level): words.strip() for level, words in BLOCK.findall(body)}
        hints[number] = [blocks.get(level, "") for level in range(1, LEVELS + 1)]
    return hints
