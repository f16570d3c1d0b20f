"""What every world must answer: checks of an axis, run by test_comm.py on all of them.

Expected values come from the inputs of all ranks, which each rank can make for itself, by torch's
operators or by hand. All numbers are exact, so results must be equal to the last bit.
"""

import math
import sys

import torch

from picotron_lab import mesh
from picotron_lab.comm import Handle
from picotron_lab.config import MeshConfig

FLOATS = (torch.bfloat16, torch.float32, torch.float64)


def numbers(rank, *shape, dtype=torch.float32):
    """What a rank holds: multiples of 12, so that bfloat16 sums and means of 4 ranks are exact."""
    values = 12 * ((5 * torch.arange(math.prod(shape)) + 7 * rank) % 17 - rank)
    return values.reshape(shape).to(dtype)


def everyone(axis, *shape, dtype=torch.float32):
    return [numbers(r, *shape, dtype=dtype) for r in range(axis.size)]


def reduced(xs, op):
    stack = torch.stack(xs).double()
    result = {"sum": stack.sum(0), "mean": stack.mean(0), "max": stack.amax(0)}[op]
    return result.to(xs[0].dtype)


def same(actual, expected):
    """Equal to the last bit, and of one dtype and shape."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), (actual, expected)
    assert torch.equal(actual, expected), (actual, expected)


def all_same(actual, expected):
    for mine, right in zip(actual, expected, strict=True):
        same(mine, right)


# ---- collectives


def check_all_reduce(axis):
    for dtype in (*FLOATS, torch.int64):
        x = numbers(axis.rank, 3, 5, dtype=dtype)
        for op in ("sum", "max", "mean")[: 3 if dtype in FLOATS else 2]:
            same(axis.all_reduce(x, op), reduced(everyone(axis, 3, 5, dtype=dtype), op))
        same(x, numbers(axis.rank, 3, 5, dtype=dtype))
    same(axis.all_reduce(torch.tensor(1.0)), torch.tensor(float(axis.size)))


def check_all_gather(axis):
    for dtype in (*FLOATS, torch.int64, torch.bool):
        x = numbers(axis.rank, 2, 3, dtype=dtype)
        same(axis.all_gather(x), torch.cat(everyone(axis, 2, 3, dtype=dtype)))
        same(x, numbers(axis.rank, 2, 3, dtype=dtype))


def check_reduce_scatter(axis):
    rows = slice(2 * axis.rank, 2 * axis.rank + 2)
    for dtype in (*FLOATS, torch.int64):
        x = numbers(axis.rank, 2 * axis.size, 3, dtype=dtype)
        xs = everyone(axis, 2 * axis.size, 3, dtype=dtype)
        for op in ("sum", "max", "mean")[: 3 if dtype in FLOATS else 2]:
            same(axis.reduce_scatter(x, op), reduced(xs, op)[rows])
        same(x, xs[axis.rank])


def check_all_to_all(axis):
    x = torch.tensor([[10 * axis.rank + j, j] for j in range(axis.size) for _ in range(2)])
    expected = [[10 * i + axis.rank, axis.rank] for i in range(axis.size) for _ in range(2)]
    same(axis.all_to_all(x), torch.tensor(expected))


def check_uneven_all_to_all(axis):
    """Row k from i to j is [100 i + 10 j + k]; some pieces have no rows, one rank sends none."""
    me, every = axis.rank, range(axis.size)
    for rows in (lambda i, j: (i + 2 * j) % 3, lambda i, j: i * (j + 1), lambda i, j: 0):
        pieces = {
            (i, j): [100 * i + 10 * j + k for k in range(rows(i, j))] for i in every for j in every
        }
        x = torch.tensor([value for j in every for value in pieces[me, j]]).reshape(-1, 1).double()
        send, receive = [rows(me, j) for j in every], [rows(i, me) for i in every]
        expected = torch.tensor([value for i in every for value in pieces[i, me]])
        same(axis.all_to_all(x, send, receive), expected.reshape(-1, 1).double())


def check_broadcast(axis):
    for source in range(axis.size):
        for dtype in (*FLOATS, torch.int64):
            x = numbers(axis.rank, 4, dtype=dtype)
            same(axis.broadcast(x, source), numbers(source, 4, dtype=dtype))
            same(x, numbers(axis.rank, 4, dtype=dtype))


def check_inputs_that_are_not_contiguous(axis):
    n, rank = axis.size, axis.rank
    for view in (lambda x: x.t(), lambda x: x[:, ::2], lambda x: x[:1].expand(2 * n, -1)):
        xs = [view(x).contiguous() for x in everyone(axis, 2 * n, 2 * n)]
        x = view(numbers(rank, 2 * n, 2 * n))
        same(axis.all_reduce(x), reduced(xs, "sum"))
        same(axis.all_gather(x), torch.cat(xs))
        same(axis.reduce_scatter(x), reduced(xs, "sum").tensor_split(n)[rank])
        same(axis.broadcast(x, n - 1), xs[n - 1])
        same(axis.all_to_all(x), torch.cat([other.tensor_split(n)[rank] for other in xs]))
        if n > 1:
            received = axis.exchange([(x, (rank + 1) % n)], [(x, (rank - 1) % n)])
            all_same(received, [xs[rank - 1]])


def check_tensors_without_elements(axis):
    for shape in ((0,), (0, 3), (axis.size, 0)):
        x = torch.empty(shape)
        assert axis.all_reduce(x).shape == x.shape
        assert axis.all_gather(x).shape == (axis.size * shape[0], *shape[1:])
        assert axis.reduce_scatter(x).shape == (shape[0] // axis.size, *shape[1:])
        assert axis.all_to_all(x).shape == x.shape
        assert axis.broadcast(x, 0).shape == x.shape
        if axis.size > 1:
            pair = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
            assert axis.exchange([(x, pair[0])], [(x, pair[1])])[0].shape == x.shape


# ---- who owns the memory


def check_results_are_new(axis):
    """A rank that scribbles into its results changes no input, and no other rank's result."""
    x = numbers(axis.rank, axis.size, 2)
    results = [
        axis.all_reduce(x),
        axis.all_gather(x),
        axis.reduce_scatter(x),
        axis.all_to_all(x),
        *(axis.broadcast(x, source) for source in range(axis.size)),
    ]
    for result in results:
        result.fill_(axis.rank)
    axis.barrier()
    assert all((result == axis.rank).all() for result in results)
    same(x, numbers(axis.rank, axis.size, 2))


def check_out(axis):
    n, rank = axis.size, axis.rank
    x, other = numbers(rank, n, 4), torch.empty(n, 4)
    total = reduced(everyone(axis, n, 4), "sum")
    assert axis.all_reduce(x, out=other) is other
    same(other, total)
    same(x, numbers(rank, n, 4))
    assert axis.all_reduce(x, out=x) is x
    same(x, total)
    scattered = torch.empty(1, 4)
    assert axis.reduce_scatter(numbers(rank, n, 4), out=scattered) is scattered
    same(scattered, total[rank : rank + 1])
    assert axis.broadcast(numbers(rank, n, 4), n - 1, out=other) is other
    same(other, numbers(n - 1, n, 4))
    gathered = torch.empty(n * n, 4)
    assert axis.all_gather(numbers(rank, n, 4), out=gathered) is gathered
    same(gathered, torch.cat(everyone(axis, n, 4)))


def check_out_that_is_not_contiguous(axis):
    n, rank = axis.size, axis.rank
    x = numbers(rank, 4, n).t()
    total = reduced(everyone(axis, 4, n), "sum").t()
    assert axis.all_reduce(x, out=x) is x
    same(x, total)
    wide = torch.zeros(n * n, 8)
    axis.all_gather(numbers(rank, n, 4), out=wide[:, ::2])
    same(wide[:, ::2], torch.cat(everyone(axis, n, 4)))
    same(wide[:, 1::2], torch.zeros(n * n, 4))
    handle = axis.reduce_scatter(numbers(rank, n, 4), out=wide[:1, :4].t().t(), wait=False)
    same(handle.wait(), reduced(everyone(axis, n, 4), "sum")[rank : rank + 1])


def check_shard_inside_the_whole(axis):
    """ZeRO gathers into the buffer that holds its shard, and scatters into it."""
    rows = slice(2 * axis.rank, 2 * axis.rank + 2)
    whole = torch.full((2 * axis.size,), -1.0)
    whole[rows] = numbers(axis.rank, 2)
    axis.all_gather(whole[rows], out=whole)
    same(whole, torch.cat(everyone(axis, 2)))
    whole = numbers(axis.rank, 2 * axis.size)
    axis.reduce_scatter(whole, out=whole[rows])
    same(whole[rows], reduced(everyone(axis, 2 * axis.size), "sum")[rows])


# ---- between two ranks


def check_send_and_recv(axis):
    """A chain: rank r takes from r - 1 and gives to r + 1."""
    tensors = [torch.empty(2, 3), torch.empty(0), torch.empty((), dtype=torch.int64)]
    for like in [*tensors, torch.empty(4, dtype=torch.bfloat16)]:
        if axis.rank > 0:
            received = axis.recv(like, axis.rank - 1)
            same(received, numbers(axis.rank - 1, *like.shape, dtype=like.dtype))
        if axis.rank < axis.size - 1:
            x = numbers(axis.rank, *like.shape, dtype=like.dtype)
            assert axis.send(x, axis.rank + 1) is None
            same(x, numbers(axis.rank, *like.shape, dtype=like.dtype))


def check_exchange(axis):
    """A ring in both directions, two messages each way, of different shapes and dtypes."""
    n, me = axis.size, axis.rank
    if n == 1:
        assert axis.exchange([], []) == []
        return
    right, left = (me + 1) % n, (me - 1) % n
    small, large = torch.empty(2), torch.empty(3, 3, dtype=torch.float64)
    received = axis.exchange(
        [(numbers(me, 2), right), (numbers(me, 3, 3).double(), right), (numbers(me, 2) + 1, left)],
        [(small, left), (large, left), (small, right)],
    )
    all_same(received, [numbers(left, 2), numbers(left, 3, 3).double(), numbers(right, 2) + 1])


def check_exchange_meets_send_and_recv(axis):
    """All give to the last rank: in one exchange there, one by one here, in any order of ranks."""
    last, like = axis.size - 1, torch.empty(2)
    if axis.rank == last:
        received = axis.exchange([], [(like, r) for r in reversed(range(last)) for _ in range(2)])
        expected = [numbers(r, 2) + k for r in reversed(range(last)) for k in range(2)]
        all_same(received, expected)
        return
    axis.send(numbers(axis.rank, 2), last)
    axis.send(numbers(axis.rank, 2) + 1, last)


# ---- handles


def check_handles(axis):
    """Several calls under way, waited for in reverse order, each twice."""
    n, me, last = axis.size, axis.rank, axis.size - 1
    calls = {
        axis.all_reduce(numbers(me, 50), wait=False): reduced(everyone(axis, 50), "sum"),
        axis.all_gather(numbers(me, 3), wait=False): torch.cat(everyone(axis, 3)),
        axis.broadcast(numbers(me, 2), last, wait=False): numbers(last, 2),
        axis.all_reduce(numbers(me, 1), "max", wait=False): reduced(everyone(axis, 1), "max"),
        axis.all_to_all(numbers(me, n), wait=False): torch.stack(everyone(axis, n))[:, me],
    }
    for handle, expected in reversed(calls.items()):
        assert isinstance(handle, Handle)
        result = handle.wait()
        same(result, expected)
        assert handle.wait() is result


def check_handles_between_two_ranks(axis):
    """Messages keep their order, whatever the order of waiting; a send need not be first."""
    n, me = axis.size, axis.rank
    if n == 1:
        return
    right, left = (me + 1) % n, (me - 1) % n
    coming = [axis.recv(torch.empty(2), left, wait=False) for _ in range(3)]
    going = [axis.send(numbers(me, 2) + k, right, wait=False) for k in range(3)]
    for k in (2, 0, 1):
        same(coming[k].wait(), numbers(left, 2) + k)
        assert going[k].wait() is None


def check_axes_do_not_wait_for_each_other(axis):
    """A call that nobody waits for yet must not hold up a message the other way."""
    last = axis.size - 1
    if axis.rank == last > 0:
        same(axis.recv(torch.empty(2), 0), numbers(0, 2))
    total = axis.all_reduce(numbers(axis.rank, 2), wait=False)
    if axis.rank == 0 < last:
        axis.send(numbers(0, 2), last)
    same(total.wait(), reduced(everyone(axis, 2), "sum"))


# ---- gradients


class SumForwardAndBack(torch.autograd.Function):
    """x -> sum over ranks of x; and the gradient is summed over ranks too."""

    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return axis.all_reduce(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.axis.all_reduce(grad), None


def reduce_gradient(parameter, axis):
    axis.all_reduce(parameter.grad, out=parameter.grad)


def check_gradients(axis):
    """d/dw of (rank + 1) * sum_r(w_r) is, summed over ranks, 1 + 2 + ... + n."""
    w = torch.ones(3, requires_grad=True)
    (SumForwardAndBack.apply(w, axis) * (axis.rank + 1)).sum().backward()
    same(w.grad, torch.full((3,), axis.size * (axis.size + 1) / 2))
    hooked = torch.ones(2, requires_grad=True)
    hooked.register_post_accumulate_grad_hook(lambda p: reduce_gradient(p, axis))
    (hooked * (axis.rank + 1)).sum().backward()
    same(hooked.grad, torch.full((2,), axis.size * (axis.size + 1) / 2))
    assert not axis.all_reduce(w.detach()).requires_grad
    with torch.no_grad():
        same(axis.all_reduce(w, out=w), torch.full((3,), float(axis.size), requires_grad=True))


# ---- sub-axes


def check_split(axis):
    """Two halves, the first may be larger; then each rank alone; then the halves' halves."""
    half = (axis.size + 1) // 2
    groups = [g for g in (list(range(half)), list(range(half, axis.size))) if g]
    mine = next(g for g in groups if axis.rank in g)
    part = axis.split("half", groups)
    assert (part.name, part.ranks, part.rank) == ("half", tuple(mine), mine.index(axis.rank))
    same(part.all_reduce(numbers(axis.rank, 3)), reduced([numbers(r, 3) for r in mine], "sum"))
    alone = axis.split("alone", [[r] for r in range(axis.size)])
    same(alone.all_gather(numbers(axis.rank, 3)), numbers(axis.rank, 3))
    pairs = part.split("pair", [mine[:1], mine[1:]])
    pair = mine[:1] if axis.rank == mine[0] else mine[1:]
    same(pairs.broadcast(numbers(axis.rank, 3), len(pair) - 1), numbers(pair[-1], 3))
    same(axis.all_reduce(numbers(axis.rank, 3)), reduced(everyone(axis, 3), "sum"))


def check_mesh(axis):
    """Sums along each axis of every mesh of two axes that fits, by the coordinates of the ranks."""
    n, me = axis.size, axis.rank
    inner = 2 if n % 2 == 0 else 1
    for slow, fast in (("dp", "tp"), ("pp", "cp")):
        axes = mesh.build(axis, MeshConfig(**{slow: n // inner, fast: inner}))
        row, column = divmod(me, inner)
        rows, columns = [r for r in range(n) if r // inner == row], range(column, n, inner)
        for name, ranks in {slow: columns, fast: rows}.items():
            sub = getattr(axes, name)
            assert sub.ranks == tuple(ranks)
            same(sub.all_reduce(numbers(me, 2)), reduced([numbers(r, 2) for r in ranks], "sum"))


# ---- the ledger


def check_ledger(axis):
    """Every call, with its payload in bytes; nothing on an axis of one rank."""
    n, right, left = axis.size, (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    axis.ledger.clear()
    x = torch.ones(2 * n, 3)  # 24 n bytes
    line, first = sys._getframe().f_lineno, axis.all_reduce(x, wait=False)
    axis.all_gather(x.bfloat16())
    axis.reduce_scatter(x)
    axis.all_to_all(x)
    axis.broadcast(x, 0)
    axis.barrier()
    _ = axis.exchange([(x, right), (x[0], right)], [(x, left), (x[0], left)]) if n > 1 else None
    first.wait()
    expected = [  # operation, bytes, lines below the first, waits
        ("all_reduce", 24 * n, 0, False),
        ("all_gather", 12 * n * n, 1, True),
        ("reduce_scatter", 24 * n, 2, True),
        ("all_to_all", 24 * n, 3, True),
        ("broadcast", 24 * n, 4, True),
        ("barrier", 0, 5, True),
        ("exchange", 24 * n + 12, 6, True),
    ]
    calls = axis.ledger.calls
    assert len(calls) == (7 if n > 1 else 0), calls
    for k, (call, (op, size, below, waits)) in enumerate(zip(calls, expected, strict=n > 1)):
        place = f"comm_contract.py:{line + below}"
        mine = (call.op, call.axis, call.number, call.place, call.bytes, call.waits)
        assert mine == (op, axis.name, calls[0].number + k, place, size, waits), call


def check_ledger_of_messages(axis):
    axis.ledger.clear()
    if axis.size > 1 and axis.rank == 0:
        axis.send(torch.ones(5, dtype=torch.float64), 1)
    if axis.rank == 1:
        axis.recv(torch.ones(5, dtype=torch.float64), 0)
    expected = {0: [("send", 40)], 1: [("recv", 0)]}.get(axis.rank, []) if axis.size > 1 else []
    assert [(c.op, c.bytes) for c in axis.ledger.calls] == expected, axis.ledger.calls


CHECKS = {name: check for name, check in dict(globals()).items() if name.startswith("check_")}


def run_all(axis):
    for check in CHECKS.values():
        check(axis)
