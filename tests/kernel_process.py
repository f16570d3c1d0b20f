"""A process without Triton's interpreter: kernels decorated under it cannot be compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path


def compile_in_a_process():
    """What kernel_aot.py prints: of every group, the facts of every kernel."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    tests = Path(__file__).parent
    environment["PYTHONPATH"] = str(tests.parent)
    command = [sys.executable, tests / "kernel_aot.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
