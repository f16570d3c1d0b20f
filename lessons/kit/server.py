"""Server: the process from which children are forked; it imports torch once, while others work.

No torch is imported here: the server starts before its parent has read anything else.
"""

import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import sys

PRELOADED = [
    "torch", "numpy", "einops", "torch.nn.functional", "torch.optim", "torch.utils.checkpoint",
    "torch.fx.experimental.symbolic_shapes",  # which the first backward of a gradient asks for
    "picotron_lab.lab", "picotron_lab.model", "picotron_lab.analysis.meter", "lessons.kit.child",
]  # fmt: skip


def context() -> multiprocessing.context.BaseContext:
    """Where child processes come from: a forkserver, or on systems without one, new processes."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    forks = multiprocessing.get_context("forkserver")
    # a child of a test run imports pytest, as its parent did
    tested = ["pytest"] if "pytest" in sys.modules else []
    forks.set_forkserver_preload(PRELOADED + tested)
    return forks


def start() -> None:
    """Begin to import in the background."""
    if context().get_start_method() == "forkserver":
        multiprocessing.forkserver.ensure_running()
