"""One contract for every world: whatever answers an axis, the same calls give the same results.

The checks of comm_contract.py run on one rank, on threads (in order and fuzzed) and on gloo
processes; then what is special about nobody, wrong arguments and the ledger.
"""

import pytest
import torch
from comm_contract import CHECKS, reduce_gradient, run_all, same
from torch._subclasses.fake_tensor import FakeTensorMode

from picotron_lab import mesh
from picotron_lab.comm import Axis, connect
from picotron_lab.config import MeshConfig
from picotron_lab.lab import run_ranks
from picotron_lab.ledger import CommError, Ledger, wire_bytes
from picotron_lab.nobody import Nobody
from picotron_lab.processes import run_processes

# ---- the worlds


@pytest.mark.parametrize("seed", [None, 1, pytest.param(2, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_threads(check, size, seed):
    run_ranks(check, size, seed=seed)


@pytest.mark.parametrize(
    "size", [1, 2, pytest.param(3, marks=pytest.mark.exhaustive), 4]  # 3: after a change
)
def test_processes(size):
    run_processes(run_all, size, timeout=60)


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_alone(check):
    with connect(timeout=60) as axis:
        assert axis.size == 1
        check(axis)


def three_axes(axis):
    """pp2 dp2 tp2: rank = 4 pp + 2 dp + tp; each axis sums the world ranks of its members."""
    axes = mesh.build(axis, MeshConfig(pp=2, dp=2, tp=2))
    me = torch.tensor(float(axis.rank))
    return [int(getattr(axes, name).all_reduce(me)) for name in ("pp", "dp", "tp")]


def test_mesh_of_three_axes():
    """Rank 5 is (1, 0, 1): with pp it meets 1, with dp 7, with tp 4."""
    found = run_ranks(three_axes, 8)
    assert found[5] == [1 + 5, 5 + 7, 4 + 5]
    assert found[0] == [0 + 4, 0 + 2, 0 + 1]


@pytest.mark.slow
def test_mesh_of_three_axes_in_processes():
    assert run_processes(three_axes, 8)[5] == [1 + 5, 5 + 7, 4 + 5]


# ---- nobody


def every_call(axis, x):
    """Every verb once; what came back, and what was entered."""
    n, other = axis.size, (axis.rank + 1) % axis.size
    counts = [j % 2 for j in range(n)]
    handle = axis.all_reduce(x.bfloat16(), "mean", wait=False)
    sub = axis.split("half", [list(range(n // 2)), list(range(n // 2, n))])
    results = [
        axis.all_reduce(x, "max"),
        axis.all_gather(x),
        axis.all_gather(x[:0]),
        axis.reduce_scatter(x),
        axis.all_to_all(x),
        axis.all_to_all(x[: sum(counts)], counts, [axis.rank % 2] * n),
        axis.broadcast(x, 1),
        *axis.exchange([(x, other)], [(x, (axis.rank - 1) % n)]),
        sub.all_gather(x[0], out=x.new_empty(n // 2 * x.shape[1])),
        handle.wait(),
    ]
    axis.barrier()
    if axis.rank == 0:
        axis.send(x, 1)
    if axis.rank == 1:
        results.append(axis.recv(x, 0))
    shapes = [(tuple(result.shape), result.dtype) for result in results]
    return shapes, [(c.op, c.axis, c.number, c.detail, c.bytes) for c in axis.ledger.calls]


def nobody(rank, size=4):
    return Axis("world", range(size), rank, Nobody(), Ledger())


@pytest.mark.parametrize("kind", ["cpu", "meta", "fake"])
def test_nobody_gives_the_shapes_and_the_ledger_of_threads(kind):
    x = torch.ones(8, 6, dtype=torch.float64)
    expected = run_ranks(every_call, 4, x)
    for rank in range(4):
        if kind == "fake":
            with FakeTensorMode():
                found = every_call(nobody(rank), torch.ones(8, 6, dtype=torch.float64))
        else:
            found = every_call(nobody(rank), x.to(kind))
        assert found == expected[rank]


def test_nobody_answers_with_what_i_hold():
    """The values mean nothing, but they are numbers: a dry run may divide by a sum of tokens."""
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    axis = nobody(1, size=2)
    same(axis.all_gather(x), torch.cat([x, x]))
    wire = torch.cat([torch.zeros(2, 2), x])
    same(axis.all_gather(wire[2:], out=wire), torch.cat([x, x]))  # from its place in the result
    same(axis.all_reduce(x), x)
    same(axis.reduce_scatter(x), x[:1])
    same(axis.all_to_all(x), torch.zeros(2, 2))
    same(axis.recv(x, 0), torch.zeros(2, 2))


# ---- what a caller may get wrong

X = torch.ones(4, 2)
WRONG = {
    "all_reduce knows sum, mean, max; it was given 'product'.": lambda a: a.all_reduce(
        X, "product"
    ),
    "reduce_scatter knows sum, mean, max; it was": lambda a: a.reduce_scatter(X, "average"),
    "all_reduce has no mean of (4, 2) int64": lambda a: a.all_reduce(X.long(), "mean"),
    "reduce_scatter has no mean of (4, 2) int32": lambda a: a.reduce_scatter(X.int(), "mean"),
    "all_reduce has no sum of (4, 2) bool: give x.int().": lambda a: a.all_reduce(X > 0),
    "all_gather works along dim 0, and a scalar has none": lambda a: a.all_gather(X.sum()),
    "cuts dim 0 into 4 equal shards, which (3, 2) float32 does not allow: pad dim 0 to 4.": (
        lambda a: a.reduce_scatter(X[:3])
    ),
    "all_to_all cuts dim 0 into 4 equal shards": lambda a: a.all_to_all(torch.ones(5)),
    "give both": lambda a: a.all_to_all(X, [1, 1, 1, 1]),
    "send_rows [1, 1, 1, 2] and receive_rows": lambda a: a.all_to_all(X, [1, 1, 1, 2], [1] * 4),
    "send_rows [2, 2] and receive_rows": lambda a: a.all_to_all(X, [2, 2], [1] * 4),
    "receive_rows [4] for 4 rows": lambda a: a.all_to_all(X, [1] * 4, [4]),
    "none negative": lambda a: a.all_to_all(X, [1] * 4, [-1, 1, 1, 1]),
    "cannot exchange with rank 5": lambda a: a.broadcast(X, 5),
    "rank 1 on axis world of size 4 cannot exchange with rank 1: the others are 0, 2, 3.": (
        lambda a: a.send(X, 1)
    ),
    "cannot exchange with rank -1": lambda a: a.recv(X, -1),
    "cannot exchange with rank 4": lambda a: a.exchange([(X, 0)], [(X, 4)]),
    "all_reduce of (4, 2) float32 needs out (4, 2) float32; it was given (8,) float32.": (
        lambda a: a.all_reduce(X, out=torch.ones(8))
    ),
    "needs out (16, 2) float32; it was given (16, 2) float64": (
        lambda a: a.all_gather(X, out=torch.ones(16, 2, dtype=torch.float64))
    ),
    "needs out (1, 2) float32": lambda a: a.reduce_scatter(X, out=torch.ones(4, 2)),
    "the groups with rank 1 are []": lambda a: a.split("part", [[0], [2, 3]]),
    "the groups with rank 1 are [[0, 1], [1, 2]]": lambda a: a.split("part", [[0, 1], [1, 2]]),
    "no gradient flows through all_reduce: give x.detach()": (
        lambda a: a.all_reduce(X.clone().requires_grad_())
    ),
    "in rising order": lambda a: a.split("part", [[1, 0], [2, 3]]),
    "which lists ranks of axis world": lambda a: a.split("part", [[0, 1, 4], [2, 3]]),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_wrong_arguments(sentence):
    axis = nobody(1)
    with pytest.raises(CommError) as caught:
        WRONG[sentence](axis)
    assert sentence in str(caught.value)
    assert axis.ledger.calls == []


def test_an_axis_of_one_rank_has_nobody_to_talk_to():
    with connect(timeout=60) as axis, pytest.raises(CommError, match="the others are nobody"):
        axis.send(X, 0)


# ---- the ledger


def test_ledger_totals():
    axis = nobody(1)
    axis.all_reduce(X)  # 32 bytes
    axis.all_gather(X)  # 128 bytes
    axis.split("half", [[0, 1], [2, 3]]).all_gather(X)  # 64 bytes
    ledger = axis.ledger
    assert ledger.bytes() == 32 + 128 + 64
    assert ledger.bytes("all_gather") == 128 + 64
    assert ledger.bytes("all_gather", "half") == 64
    assert ledger.bytes_by_axis() == {"world": 160, "half": 64}
    assert [call.number for call in ledger.select(axis="world")] == [1, 2]
    ledger.clear()
    assert (ledger.bytes(), ledger.bytes_by_axis()) == (0, {})


def test_the_place_of_a_call_is_never_plumbing():
    """A hook is called by torch; a file may lie in a folder called torch; backslashes are fine."""
    axis = nobody(1)
    p = torch.ones(2, requires_grad=True)
    p.register_post_accumulate_grad_hook(lambda p: reduce_gradient(p, axis))
    p.sum().backward()
    for path in ("/home/me/torch/train.py", r"C:\\torch\\train.py"):
        exec(compile("\naxis.all_reduce(x)", path, "exec"), {"axis": axis, "x": X})
    exec(compile("axis.barrier()", "/tmp/ipykernel_7/1234.py", "exec"), {"axis": axis})
    places = [call.place for call in axis.ledger.calls]
    assert places[0].startswith("comm_contract.py:")
    assert places[1] == "train.py:2"
    assert places[2].endswith("train.py:2")
    assert places[3] == "cell:1"


def test_wire_bytes():
    """What Thakur et al. give for a ring of 4 ranks and 100 bytes."""
    ring = {"all_reduce": 150, "all_gather": 75, "reduce_scatter": 75, "all_to_all": 75}
    rest = {"broadcast": 100, "send": 100, "exchange": 100, "recv": 0, "barrier": 0}
    assert {op: wire_bytes(op, 100, 4) for op in ring | rest} == ring | rest
    assert wire_bytes("all_reduce", 100, 1) == 0
    with pytest.raises(ValueError, match="it was given 'gather'"):
        wire_bytes("gather", 100, 4)
