"""The world of threads: sentences instead of hangs, backward, notebooks, and a shared GPU.

That its collectives are right is tested in test_comm.py, with all other worlds; whose turn it is,
in test_baton.py.
"""

import re
import threading
from pathlib import Path

import pytest
import torch
from comm_contract import SumForwardAndBack, reduce_gradient
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from picotron_lab.lab import run_ranks
from picotron_lab.ledger import CommError

ROOT = Path(__file__).parent.parent
ONE, TWO = torch.ones(1), torch.ones(2)


def fails(function, size, *args, **options):
    """The sentence with which ranks end, and afterwards no thread is left."""
    with pytest.raises(CommError) as caught:
        run_ranks(function, size, *args, **options)
    assert not [t for t in threading.enumerate() if t.name.startswith("rank ")]
    return str(caught.value)


# ---- deadlocks


def crossed_sends(axis):
    axis.send(ONE, 1 - axis.rank)
    axis.recv(ONE, 1 - axis.rank)


def one_rank_is_done(axis):
    if axis.rank < 2:
        axis.all_reduce(TWO)


def two_axes(axis):
    """Each rank of a 2 x 2 mesh waits on another axis than its neighbour."""
    rows = axis.split("rows", [[0, 1], [2, 3]])
    columns = axis.split("columns", [[0, 2], [1, 3]])
    (rows if axis.rank in (0, 3) else columns).all_reduce(ONE)


def exchange_without_answer(axis):
    if axis.rank == 0:
        axis.exchange([(ONE, 1), (ONE, 2)], [(ONE, 2)])


DEADLOCKS = {
    crossed_sends: (
        "rank 0 waits in send #1 on axis world (HERE): (1,) float32 to rank 1; "
        "rank 1 waits in send #1 on axis world (HERE): (1,) float32 to rank 0."
    ),
    one_rank_is_done: (
        "rank 0 waits in all_reduce #1 on axis world (HERE): sum of (2,) float32; "
        "rank 1 waits in all_reduce #1 on axis world (HERE): sum of (2,) float32; "
        "rank 2 has finished."
    ),
    two_axes: (
        "rank 0 waits in all_reduce #1 on axis rows (HERE): sum of (1,) float32; "
        "rank 1 waits in all_reduce #1 on axis columns (HERE): sum of (1,) float32; "
        "rank 2 waits in all_reduce #1 on axis columns (HERE): sum of (1,) float32; "
        "rank 3 waits in all_reduce #1 on axis rows (HERE): sum of (1,) float32."
    ),
    exchange_without_answer: (
        "rank 0 waits in exchange #1 on axis world (HERE): to [1, 2], from [2]; "
        "rank 1 has finished; rank 2 has finished."
    ),
}
SIZES = {crossed_sends: 2, one_rank_is_done: 3, two_axes: 4, exchange_without_answer: 3}


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("program", DEADLOCKS)
def test_deadlock(program, seed):
    sentence = re.sub(r"\(test_lab.py:\d+\)", "(HERE)", fails(program, SIZES[program], seed=seed))
    assert sentence == f"no rank can make progress: {DEADLOCKS[program]}"


# ---- ranks that disagree

DISAGREE = {
    "rank 1 calls all_gather #1 on axis world (HERE): (1,) float32, but rank 0 calls all_reduce #1 "
    "on axis world (HERE): sum of (1,) float32": (
        lambda a: a.all_reduce(ONE) if a.rank == 0 else a.all_gather(ONE)
    ),
    "sum of (2,) float32, but rank 0 calls all_reduce #1 on axis world (HERE): sum of (1,)": (
        lambda a: a.all_reduce(TWO if a.rank else ONE)
    ),
    "(1,) float64, but rank 0 calls all_gather #1 on axis world (HERE): (1,) float32": (
        lambda a: a.all_gather(ONE.double() if a.rank else ONE)
    ),
    "max of (2,) float32, but rank 0 calls reduce_scatter #1 on axis world (HERE): sum of (2,)": (
        lambda a: a.reduce_scatter(TWO, "max" if a.rank else "sum")
    ),
    "(1,) float32 from rank 1, but rank 0 calls broadcast #1 on axis world (HERE): (1,) float32 "
    "from rank 0": lambda a: a.broadcast(ONE, a.rank),
    "rank 0 sends 2 rows to rank 1, which expects 1": (
        lambda a: a.all_to_all(TWO, [[0, 2], [1, 1]][a.rank], [[0, 1], [1, 1]][a.rank])
    ),
    "rank 0 sends (2,) float32 in send #1 on axis world (HERE), but rank 1 expects (1,) float32 in "
    "recv #1 on axis world (HERE)": lambda a: a.recv(ONE, 0) if a.rank else a.send(TWO, 1),
    "rank 1 sends (1,) int64 in exchange #1 on axis world (HERE), but rank 0 expects (1,) float": (
        lambda a: a.exchange([(ONE.long() if a.rank else ONE, 1 - a.rank)], [(ONE, 1 - a.rank)])
    ),
}


@pytest.mark.parametrize("sentence", DISAGREE)
def test_ranks_disagree(sentence):
    assert sentence in re.sub(r"\(test_lab.py:\d+\)", "(HERE)", fails(DISAGREE[sentence], 2))


def test_a_call_that_others_never_made():
    """Nobody waits for it, but in real life it hangs or is lost."""
    lonely = fails(lambda a: a.all_reduce(ONE, wait=False) if a.rank < 2 else None, 3)
    assert lonely.startswith("no other rank than 0, 1 ever made all_reduce #1 on axis world (test_")
    unread = fails(lambda a: a.send(ONE, 1, wait=False) if a.rank == 0 else None, 2)
    assert unread.startswith("nobody answered send #1 on axis world (test_lab.py:")


# ---- inputs must be left alone until wait()


def change_too_early(axis, start, change):
    x = torch.tensor([float("nan"), 1.0, 2.0, 3.0])
    handle = start(axis, x)
    change(x)
    handle.wait()


STARTS = {
    "all_reduce": lambda a, x: a.all_reduce(x, out=x, wait=False),
    "all_gather": lambda a, x: a.all_gather(x, wait=False),
    "reduce_scatter": lambda a, x: a.reduce_scatter(x, wait=False),
    "all_to_all": lambda a, x: a.all_to_all(x, wait=False),
    "exchange": lambda a, x: a.exchange([(x, 1 - a.rank)], [(x, 1 - a.rank)], wait=False),
}


@pytest.mark.parametrize("op", STARTS)
def test_input_changed_before_wait(op):
    sentence = fails(change_too_early, 2, STARTS[op], lambda x: x[1:].add_(1))
    assert sentence.startswith(f"the tensor given to {op} #1 on axis world (test_lab.py:")
    assert "changed before wait(): leave it alone" in sentence
    run_ranks(change_too_early, 2, STARTS[op], lambda x: None)


def test_the_rest_of_a_buffer_may_change():
    """Backward adds to one bucket of a flat buffer while another one is under way."""

    def buckets(axis):
        flat = torch.zeros(4)
        handle = axis.all_reduce(flat[:2], out=flat[:2], wait=False)
        flat[2:] += 1
        return handle.wait().sum().item()

    assert run_ranks(buckets, 2) == [0, 0]


def test_a_tensor_that_two_ranks_share_is_noticed():
    shared = torch.ones(2)
    assert "let no other rank reach it" in fails(lambda a: a.all_reduce(shared, out=shared), 2)


# ---- what a rank's dispatch modes see


class Seen(TorchDispatchMode):
    """Keeps the storages that operations read and write."""

    def __init__(self):
        super().__init__()
        self.storages = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        self.storages += [x.untyped_storage() for x in tensors]
        return result


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("op", [*STARTS, "barrier"])
def test_a_mode_sees_no_tensor_but_its_rank_s(op, seed):
    """Not the copies of the lab, nor what another rank sends or receives."""

    def program(axis):
        x = torch.ones(4)
        with Seen() as seen:
            if op == "barrier":
                axis.barrier()
                return seen.storages, []
            result = STARTS[op](axis, x).wait()
        results = result if isinstance(result, list | tuple) else [result]
        return seen.storages, [x, *results]

    for seen, mine in run_ranks(program, 2, seed=seed):
        addresses = {storage.data_ptr() for storage in seen}
        assert addresses <= {x.untyped_storage().data_ptr() for x in mine}


# ---- backward


def test_collectives_in_backward_and_in_hooks():
    """Two layers: y = sum over ranks of w x. By hand: dy/dw = n r (r + 1) ... summed over ranks."""

    def program(axis):
        w1, w2 = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
        for w in (w1, w2):
            w.register_post_accumulate_grad_hook(lambda p: reduce_gradient(p, axis))
        y = SumForwardAndBack.apply(w1 * (axis.rank + 1), axis)  # 1 + 2 + 3 = 6
        z = SumForwardAndBack.apply(y * w2, axis)  # 3 ranks hold 6: 18
        z.sum().backward()
        return z.tolist(), w2.grad.tolist(), w1.grad.tolist()

    # dz/dw2 = 3 (its backward sums 1 over ranks) * y = 18, summed over ranks by the hook: 54
    # dz/dw1 = 3 * w2 = 3, summed over ranks: 9, times r + 1; summed by the hook: 9 * 6 = 54
    assert run_ranks(program, 3) == [([18, 18], [54, 54], [54, 54])] * 3


def test_collectives_in_recomputed_activations():
    def program(axis):
        x = torch.full((2,), float(axis.rank + 1), dtype=torch.float64, requires_grad=True)

        def layer(x):
            return SumForwardAndBack.apply(x * x, axis) ** 2

        torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
        return x.grad.tolist(), [call.op for call in axis.ledger.calls]

    # s = 1 + 4 = 5; d/dx of s^2 is 2 s = 10, summed over 2 ranks 20, times 2 x
    calls = ["all_reduce"] * 3  # forward, forward again, backward
    assert run_ranks(program, 2) == [([40, 40], calls), ([80, 80], calls)]


def test_many_calls():
    def program(axis):
        x = torch.ones(16)
        for _ in range(200):
            x = axis.all_reduce(x, "mean")
        return x.sum().item()

    assert run_ranks(program, 8) == [16] * 8


# ---- notebooks

CELL = """
import torch

def step(axis):
    x = torch.full((2,), float(axis.rank))
    return axis.all_reduce(x, wait=False).wait().tolist()

found = run_ranks(step, 3)
"""


def test_a_function_of_a_notebook_cell():
    cell = {"run_ranks": run_ranks}
    exec(compile(CELL, "/tmp/ipykernel_1/2.py", "exec"), cell)
    assert cell["found"] == [[3, 3]] * 3


@pytest.mark.exhaustive
def test_a_real_notebook():
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    cells = ["from picotron_lab.lab import run_ranks", CELL, "print(found)"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    resources = {"metadata": {"path": str(ROOT)}}
    nbclient.NotebookClient(notebook, timeout=120, resources=resources).execute()
    assert notebook.cells[-1].outputs[0].text == "[[3.0, 3.0], [3.0, 3.0], [3.0, 3.0]]\n"


# ---- ranks that share a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_ranks_share_a_gpu():
    """Results, gradients and random numbers as in processes, on streams of their own."""

    def program(axis):
        torch.manual_seed(axis.rank)
        with torch.cuda.stream(torch.cuda.Stream()):
            x = torch.full((1000, 1000), float(axis.rank), device="cuda")
            for _ in range(20):
                x = x @ torch.eye(1000, device="cuda")
            total = axis.all_reduce(x)
            w = torch.ones(3, device="cuda", requires_grad=True)
            (SumForwardAndBack.apply(w, axis) * (axis.rank + 1)).sum().backward()
            drawn = torch.rand(2, device="cuda").tolist()
            return total.mean().item(), w.grad.tolist(), drawn

    drawn = []
    for rank in range(4):
        torch.manual_seed(rank)
        drawn.append(torch.rand(2, device="cuda").tolist())
    assert run_ranks(program, 4) == [(6, [10, 10, 10], drawn[r]) for r in range(4)]
