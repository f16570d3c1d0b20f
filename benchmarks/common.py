"""What every benchmark says about itself: where it ran, with what, and its figures as a table."""

import datetime
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
GIB = 2**30


def cpu_name() -> str:
    """The processor as Linux names it, or as Python does elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def describe(hardware: str) -> str:
    """The lines above a table: hardware, versions, date, command."""
    name = Path(sys.argv[0]).relative_to(ROOT) if Path(sys.argv[0]).is_absolute() else sys.argv[0]
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    command = shlex.join(["python", str(name), *sys.argv[1:]])
    return f"{hardware}; {versions}; {datetime.date.today()}; `{command}`"


def cpu_hardware() -> str:
    """Such as 'AMD EPYC, 2 cores'."""
    return f"{cpu_name()}, {os.cpu_count()} cores"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table: the first column is text, the others are numbers."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
