"""What the ranks of test_processes.py do: programs that end well, and programs that do not.

Processes import this file, so it imports little.
"""

import os
import signal
import time

import torch

ONE, TWO = torch.ones(1), torch.ones(2)


def ring(axis, size):
    """Sum of all ranks, and the tensor of the left neighbour."""
    x = torch.full((size,), float(axis.rank))
    right, left = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    print(f"rank {axis.rank} was here")
    return axis.all_reduce(x).tolist(), axis.exchange([(x, right)], [(x, left)])[0].tolist()


def threads(axis):
    return torch.get_num_threads(), torch.cuda.is_available()


def ledger(axis):
    axis.all_reduce(TWO)
    return axis.ledger


def late(axis):
    """Rank 0 has finished long before the others, which still talk."""
    if axis.rank > 0:
        time.sleep(1)
        part = axis.split("rest", [[0], list(range(1, axis.size))])
        return part.all_reduce(ONE).item()
    axis.split("rest", [[0], list(range(1, axis.size))])
    return 0


def leave_pid(axis, folder):
    """Never ends by itself."""
    (folder / f"{axis.rank}.pid").write_text(str(os.getpid()))
    time.sleep(1000)


# ---- one rank fails, after a first call that went well


def killed(axis):
    axis.all_reduce(ONE)
    print("so far all is well")
    if axis.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    axis.all_gather(TWO)


def killed_while_others_compute(axis):
    axis.all_reduce(ONE)
    if axis.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1000)


def stopped(axis):
    axis.all_reduce(ONE)
    if axis.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    axis.all_gather(TWO)


def stuck(axis):
    axis.all_reduce(ONE)
    part = axis.split("part", [[0, 1, 2]])
    while axis.rank == 1:
        pass
    part.all_gather(TWO)


def raises(axis):
    axis.all_reduce(ONE)
    if axis.rank == 1:
        raise ValueError("no luck\ntoday")
    axis.all_gather(TWO)


def raises_while_others_compute(axis):
    if axis.rank == 1:
        raise ValueError("no luck")
    time.sleep(1000)


def finishes_early(axis):
    axis.all_reduce(ONE)
    if axis.rank != 1:
        axis.all_gather(TWO)


def wait_for_each_other(axis):
    axis.recv(ONE, (axis.rank + 1) % axis.size)


def wrong_argument(axis):
    axis.all_reduce(ONE, "product") if axis.rank == 1 else axis.all_reduce(ONE)


def leaves_at_once(axis):
    """Rank 1 may be gone before the others have even found it."""
    if axis.rank == 1:
        raise ValueError("goodbye")
    axis.barrier()


def returns_a_function(axis):
    return lambda: axis


# ---- ranks disagree: rank 1 is the odd one


def operation(axis, wait):
    return axis.all_gather(ONE, wait=wait) if axis.rank == 1 else axis.all_reduce(ONE, wait=wait)


def smaller(axis, wait):
    return axis.all_reduce(ONE if axis.rank == 1 else TWO, wait=wait)


def larger(axis, wait):
    return axis.all_gather(torch.ones(10_000) if axis.rank == 1 else TWO, wait=wait)


def dtype(axis, wait):
    return axis.all_reduce(TWO.int() if axis.rank == 1 else TWO, wait=wait)


def reduction(axis, wait):
    return axis.reduce_scatter(torch.ones(6), "max" if axis.rank == 1 else "sum", wait=wait)


def source(axis, wait):
    return axis.broadcast(ONE, int(axis.rank == 1), wait=wait)


def rows(axis, wait):
    send = [1, 2, 3] if axis.rank == 1 else [2, 2, 2]
    return axis.all_to_all(torch.ones(6), send, [2, 2, 2], wait=wait)


def message(axis, wait):
    if axis.rank == 1:
        return axis.send(ONE, 0, wait=wait)
    return axis.recv(TWO, 1, wait=wait) if axis.rank == 0 else axis.recv(TWO, 0, wait=wait)


DISAGREE = (operation, smaller, larger, dtype, reduction, source, rows, message)


def disagree(axis, name, wait):
    """One of the above, at once or through a handle; whoever sees a result returns it."""
    program = next(program for program in DISAGREE if program.__name__ == name)
    answer = program(axis, wait)
    return answer if wait else answer.wait()
