"""Settings that must hold before any test module is imported, and what many tests share."""

import os

import pytest
import torch
from kernel_process import compile_in_a_process

# Triton decides when a kernel is decorated, that is when its module is imported, whether the
# kernel will be compiled for a GPU or interpreted on CPU tensors. Without a GPU: interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tests compute little: sharing it out among threads costs more than it saves.
torch.set_num_threads(1)


@pytest.fixture
def device() -> str:
    """The GPU where there is one, so that one test covers both machines."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def compiled_kernels() -> dict:
    """What the compiler makes of all kernels for sm_90, in one process: its start takes longest."""
    return compile_in_a_process()


@pytest.fixture
def text(tmp_path):
    """Options of run.py that let it train on a short text."""
    path = tmp_path / "text.txt"
    path.write_text("ranks meet in collectives; a ledger counts every byte. " * 20)
    return ["--data", str(path), "--cache-dir", str(tmp_path / "cache")]
