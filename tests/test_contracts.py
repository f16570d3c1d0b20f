"""Every technique's own program, `python -m picotron_lab.NAME`: it predicts, and measures."""

import runpy
import subprocess
import sys

import pytest
from test_house import ROOT, TECHNIQUES

NAMES = f"{TECHNIQUES} recompute".split()
PRESENT = [name for name in NAMES if (ROOT / f"picotron_lab/{name}.py").exists()]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", PRESENT)
def test_technique_prints_its_contract(name, capsys):
    """Run here, as `python -m` would: most of a program's time is the import of torch."""
    runpy.run_module(f"picotron_lab.{name}", run_name="__main__", alter_sys=True)
    printed = capsys.readouterr().out
    missing = [word for word in ("predicted", "measured") if word not in printed]
    assert not missing, f"{name} prints a table without {missing}: show both, side by side"


@pytest.mark.slow  # left to CI
def test_a_program_runs_from_the_shell():
    """One of them: that they need nothing which is here already."""
    command = [sys.executable, "-m", "picotron_lab.zero"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "predicted" in done.stdout, done.stderr
