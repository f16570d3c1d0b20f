"""Every technique's own program, `python -m picotron_lab.NAME`: it predicts, and measures."""

import os
import subprocess
import sys

import pytest
from test_house import ROOT, TECHNIQUES

NAMES = f"{TECHNIQUES} recompute".split()
PRESENT = [name for name in NAMES if (ROOT / f"picotron_lab/{name}.py").exists()]


@pytest.fixture(scope="module")
def programs():
    """All techniques, running side by side: most of their time is the import of torch."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    options["env"] = {**os.environ, "OMP_NUM_THREADS": "1"}
    commands = {name: [sys.executable, "-m", f"picotron_lab.{name}"] for name in PRESENT}
    return {name: subprocess.Popen(command, **options) for name, command in commands.items()}


@pytest.mark.parametrize("name", PRESENT)
def test_technique_prints_its_contract(name, programs):
    printed, _ = programs[name].communicate(timeout=120)
    assert programs[name].returncode == 0, f"python -m picotron_lab.{name} failed:\n{printed}"
    missing = [word for word in ("predicted", "measured") if word not in printed]
    assert not missing, f"{name} prints a table without {missing}: show both, side by side"
