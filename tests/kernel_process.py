"""A process without Triton's interpreter: kernels decorated under it cannot be compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path


def compile_in_a_process(*program):
    """What a program that compiles kernels prints as JSON."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    command = [sys.executable, *program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
