"""The passes of the split loss: numbers worked by hand, barriers, memory, digits, pipelines."""

import itertools
import math
import threading

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from picotron_lab import sharding, vocab_parallel
from picotron_lab.analysis.meter import Meter
from picotron_lab.comm import Axis, Handle
from picotron_lab.lab import run_ranks
from picotron_lab.ledger import Ledger
from picotron_lab.nobody import Nobody
from picotron_lab.vocab_parallel import ALGORITHMS, Shard, VocabEmbedding, VocabHead, contract

every_way = pytest.mark.parametrize("impl", ["plain", "fused"])
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)


def draw(*shape):
    dice = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=dice, dtype=torch.float64)


def rows_of(axis, full_VD):
    start, stop = sharding.bounds(full_VD.shape[0], axis.size, axis.rank)
    return torch.nn.Parameter(full_VD[start:stop].clone())


# ---- worked by hand

# One token, eight words, two on each of four ranks. Logits x W^T: rank 0 has 1 and 2, rank 1 has 3
# and 4, rank 2 has -1 and -2, rank 3 has 3 and 0. The label is word 2, whose logit is 3.
X = [[0.1, 0.2, 0.3, 0.4]]
W = [[10, 0, 0, 0], [0, 10, 0, 0], [0, 0, 10, 0], [0, 0, 0, 10],
     [-10, 0, 0, 0], [0, -10, 0, 0], [10, 10, 0, 0], [0, 0, 0, 0]]  # fmt: skip
LABEL = [2]
# s = 1 + e^-1 = 1.367879441 for neighbours, and 1 + e^-3 = 1.049787068 on rank 3
LOCAL_MAX = [2, 4, -1, 3]
LOCAL_SUM = [1.367879441, 1.367879441, 1.367879441, 1.049787068]
LOCAL_LABEL = [0, 3, 0, 0]
# 1.367879441 (e^-2 + 1 + e^-5) + 1.049787068 e^-1
#   = 0.185122429 + 1.367879441 + 0.009216699 + 0.386195002 = 1.948413572, relative to M = 4
SUM = 1.948413572
LOSS = 1.667015489  # log 1.948413572 = 0.667015489, plus 4, minus 3
# e^(y - 4) / 1.948413572, from e^-3 = 0.049787068, e^-2 = 0.135335283, e^-1 = 0.367879441, 1,
# e^-5 = 0.006737947, e^-6 = 0.002478752, e^-1, e^-4 = 0.018315639
SOFTMAX = [0.025552618, 0.069459218, 0.188809730, 0.513238059,
           0.003458171, 0.001272190, 0.188809730, 0.009400283]  # fmt: skip
# D = softmax - onehot(2), of which only entry 2 differs: 0.188809730 - 1
D2 = -0.811190270
# dX = D W: 10 (p0 - p4 + p6), 10 (p1 - p5 + p6), 10 (p2 - 1), 10 p3
DX = [2.109041779, 2.569967585, -8.111902696, 5.132380591]
# own softmax of two neighbours: 1/(1 + e) = 0.268941421 and 0.731058579; of 3 and 0: e^3/(1 + e^3)
# P: 1 less at the label, word 2, which is the first of rank 1: 0.268941421 - 1
P = [[0.268941421, 0.731058579], [-0.731058579, 0.731058579],
     [0.731058579, 0.268941421], [0.952574127, 0.047425873]]  # fmt: skip
# A = P times own rows of W
A = [[2.689414214, 7.310585786, 0, 0], [0, 0, -7.310585786, 7.310585786],
     [-7.310585786, -2.689414214, 0, 0], [9.525741268, 9.525741268, 0, 0]]  # fmt: skip
# s e^(m - M) / S: the four terms of SUM over SUM
SCALE = [0.095011836, 0.702047789, 0.004730361, 0.198210013]


def near(values, tolerance=2e-9):
    return pytest.approx(values, rel=0, abs=tolerance)


def start_by_hand(axis, algorithm):
    weight = rows_of(axis, torch.tensor(W, dtype=torch.float64))
    head = VocabHead(weight, Shard(axis, 8, False), algorithm)
    x, labels = torch.tensor(X, dtype=torch.float64), torch.tensor(LABEL)
    return head.passes(x, labels), torch.zeros_like(weight, requires_grad=False)


def check_gradients_by_hand(passes, dw, rank):
    check_dw_by_hand(passes, dw, rank)
    assert passes.c2()[0].tolist() == near(DX, 2e-8)


def check_dw_by_hand(passes, dw, rank):
    passes.t_pass(dw)
    d = SOFTMAX[:2] + [D2] + SOFTMAX[3:]
    for j in (0, 1):
        assert dw[j].tolist() == near([d[2 * rank + j] * x for x in X[0]])


def test_naive_by_hand():
    def steps(axis):
        passes, dw = start_by_hand(axis, "naive")
        passes.s_pass()
        k = axis.rank
        logits = [1, 2, 3, 4, -1, -2, 3, 0][2 * k : 2 * k + 2]
        assert passes.kept_NR[0].tolist() == near([math.exp(y - 4) for y in logits])
        assert passes.sums_2N[1].tolist() == near([LOCAL_LABEL[k] - 4 if k == 1 else 0])
        assert float(passes.c1()) == near(LOSS)
        assert passes.s_N.tolist() == near([SUM])
        check_gradients_by_hand(passes, dw, k)

    run_ranks(steps, 4)


def check_statistics_by_hand(passes, rank):
    expected = [LOCAL_MAX[rank], LOCAL_SUM[rank], LOCAL_LABEL[rank]]
    assert passes.mine_3N[:, 0].tolist() == near(expected)


def test_algorithm_1_by_hand():
    def steps(axis):
        passes, dw = start_by_hand(axis, "1")
        passes.s_pass()
        check_statistics_by_hand(passes, axis.rank)
        assert float(passes.c1()) == near(LOSS)
        assert (passes.m_N.tolist(), passes.s_N.tolist()) == ([4], near([SUM]))
        check_gradients_by_hand(passes, dw, axis.rank)

    run_ranks(steps, 4)


def test_algorithm_2_by_hand():
    def steps(axis):
        passes, dw = start_by_hand(axis, "2")
        passes.s_pass()
        k = axis.rank
        check_statistics_by_hand(passes, k)
        assert passes.kept_NR[0].tolist() == near(P[k])
        assert passes.a_ND[0].tolist() == near(A[k], 2e-8)
        assert float(passes.c1()) == near(LOSS)
        assert passes.scale_N.tolist() == near([SCALE[k]])
        label = [k == 1, False]  # of the numbers above: f P + f onehot is the softmax of all words
        scaled = [SCALE[k] * (p + here) for p, here in zip(P[k], label, strict=True)]
        assert scaled == near(SOFTMAX[2 * k : 2 * k + 2])
        assert passes.c2()[0].tolist() == near(DX, 2e-8), "known before T"
        check_dw_by_hand(passes, dw, k)

    run_ranks(steps, 4)


@every_algorithm
def test_passes_out_of_order(algorithm):
    def refused(call, *given):
        with pytest.raises(AssertionError, match="call s_pass, c1, t_pass, c2 in this order"):
            call(*given)

    def steps(axis):
        passes, dw = start_by_hand(axis, algorithm)
        refused(passes.c1)
        refused(passes.t_pass, dw)
        refused(passes.c2)
        passes.s_pass()
        refused(passes.t_pass, dw)
        refused(passes.c2)
        assert float(passes.c1()) == near(LOSS)
        refused(passes.c1)
        if algorithm != "2":
            refused(passes.c2)
        check_gradients_by_hand(passes, dw, axis.rank)
        refused(passes.t_pass, dw)
        refused(passes.c2)

    run_ranks(steps, 4)


# ---- barriers


class LargeWork(TorchDispatchMode):
    """Notes each operation that reads as many numbers as a rank's logits have."""

    def __init__(self, notes, size):
        super().__init__()
        self.notes, self.size = notes, size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        sizes = [x.numel() for x in tensors if x.is_floating_point()]  # the lab compares bytes
        if max(sizes, default=0) >= self.size:
            self.notes.append("work")
        return func(*args, **(kwargs or {}))


@every_way
@pytest.mark.parametrize("algorithm, barriers, waits", [("naive", 3, 3), ("1", 2, 2), ("2", 1, 2)])
def test_barriers(impl, algorithm, barriers, waits, monkeypatch):
    """Groups of waits for the other ranks between two passes over this rank's logits."""
    notes, wait = {}, Handle.wait

    def noted_wait(handle):
        notes[threading.current_thread().name].append("wait")
        return wait(handle)

    monkeypatch.setattr(Handle, "wait", noted_wait)

    def one_microbatch(axis):
        mine = notes.setdefault(threading.current_thread().name, [])
        shard = Shard(axis, 64, impl == "fused")
        head = VocabHead(rows_of(axis, draw(64, 4)), shard, algorithm)
        passes = head.passes(draw(24, 4), torch.arange(24))
        dw = torch.zeros(16, 4, dtype=torch.float64)
        with LargeWork(mine, 24 * 16):
            passes.s_pass()
            passes.c1()
            if algorithm == "2":  # the gradient of x is there before T
                passes.c2()
                passes.t_pass(dw)
            else:
                passes.t_pass(dw)
                passes.c2()
        return [kind for kind, _ in itertools.groupby(mine)].count("wait"), mine.count("wait")

    assert run_ranks(one_microbatch, 4) == [(barriers, waits)] * 4
    assert contract(algorithm, 24, 4, 4)[0] == barriers


# ---- memory


@every_way
@every_algorithm
def test_peak_is_the_predicted_one(impl, algorithm, monkeypatch):
    """With a width about as large as a chunk, dW takes as much room as the logits of one."""
    N, D, R, chunk = 48, 14, 4000, 16
    monkeypatch.setitem(vocab_parallel.CHUNK_ELEMENTS, "cpu", chunk * R)

    def measure(axis):
        head = VocabHead(rows_of(axis, torch.ones(4 * R, D)), Shard(axis, 4 * R, fused), algorithm)
        x, labels = torch.ones(1, N, D, requires_grad=True), torch.arange(N)[None]
        with Meter() as meter:
            head(x, labels).backward()
        return meter.peak_bytes

    fused = impl == "fused"
    tokens, widths = vocab_parallel.peak(algorithm, impl, chunk if fused else N)
    for peak in run_ranks(measure, 4):
        assert peak == pytest.approx(4 * R * (tokens + widths * D), rel=0.02)


def test_peak_by_hand():
    """Of logits, the next chunk's, exp(y - m); of dW, what is added to it."""
    assert vocab_parallel.peak("naive", "plain", 10) == (10, 2)
    assert vocab_parallel.peak("2", "plain", 10) == (20, 0)
    assert vocab_parallel.peak("1", "fused", 10) == (30, 1)


@pytest.mark.parametrize("algorithm", ["1", "2"])
def test_what_is_needed_once_is_let_go(algorithm):
    """After C1 the statistics of all ranks, after C2 dX, though nobody has dropped the passes."""
    N, D, ranks = 64, 128, 8

    def measure(axis):
        head = VocabHead(rows_of(axis, draw(8, D)), Shard(axis, 8, False), algorithm)
        passes, dw = head.passes(draw(N, D), torch.arange(N) % 8), torch.zeros(1, D).double()
        with Meter() as meter:
            passes.s_pass()
            passes.c1()
            after_c1 = meter.live_bytes
            passes.t_pass(dw)
            passes.c2()
            return after_c1, meter.live_bytes

    dx, statistics = 8 * N * D, 8 * 3 * ranks * N
    for after_c1, after_c2 in run_ranks(measure, ranks):
        assert after_c1 - (dx if algorithm == "2" else 0) < statistics
        assert after_c2 < dx


# ---- digits


@every_way
@every_algorithm
def test_bfloat16_digits_of_tokens_that_are_nearly_sure(impl, algorithm):
    """1 less at the label leaves about -0.0005, of which a rounded softmax has no digit."""
    weight = draw(512, 64).bfloat16()
    labels = torch.arange(64) * 7
    x = (weight[labels] * 0.28).bfloat16()
    exact = [tensor.double().requires_grad_() for tensor in (x, weight)]
    loss = F.cross_entropy(exact[0] @ exact[1].T, labels, reduction="sum")
    loss.backward()
    assert 1e-4 < loss / 64 < 1e-3

    def learn(axis):
        mine_x, mine_w = x[None].clone().requires_grad_(), rows_of(axis, weight)
        head = VocabHead(mine_w, Shard(axis, 512, impl == "fused"), algorithm)
        head(mine_x, labels[None]).backward()
        return mine_x.grad[0], mine_w.grad

    results = run_ranks(learn, 4)
    dx, dw = results[0][0].double(), torch.cat([dw for _, dw in results]).double()
    for found, right in zip((dx, dw), (tensor.grad for tensor in exact), strict=True):
        # one device has an error of 0.02 to 0.03: its logits are rounded, too
        assert (found - right).norm() < 0.05 * right.norm()


@every_algorithm
def test_many_chunks_add_up_in_float32(algorithm, monkeypatch):
    """272 tokens, two equal logits: each adds -1/2 to word 0; bfloat16 would stop at -128."""
    monkeypatch.setitem(vocab_parallel.CHUNK_ELEMENTS, "cpu", 1)  # one token per chunk

    def learn(axis):
        weight = rows_of(axis, torch.zeros(2, 1).bfloat16())
        x, labels = torch.ones(1, 272, 1).bfloat16(), torch.zeros(1, 272, dtype=torch.int64)
        VocabHead(weight, Shard(axis, 2, True), algorithm)(x, labels).backward()
        return weight.grad.item()

    assert run_ranks(learn, 2) == [-136, 136]


# ---- in a pipeline

COUNTS = (5, 11, 3)  # tokens of three micro-batches


def microbatch(count):
    labels = torch.arange(count) * 7 % 37
    labels[::4] = -100
    return draw(count, 6), labels


def one_device(count, weight, factor):
    """Loss, dX and dW by torch alone."""
    (x, labels), weight = microbatch(count), weight.clone().requires_grad_()
    x.requires_grad_()
    loss = F.cross_entropy(F.linear(x, weight), labels, ignore_index=-100, reduction="sum")
    return loss.detach(), *torch.autograd.grad(loss * factor, [x, weight])


@every_way
@every_algorithm
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_passes_of_many_microbatches(impl, algorithm, seed):
    """All S before any C1; with algorithm 2 every T after all dX are there, last one first."""
    weight = draw(37, 6)

    def pipeline(axis):
        head = VocabHead(rows_of(axis, weight), Shard(axis, 37, impl == "fused"), algorithm)
        flights = [head.passes(*microbatch(count), 0.5) for count in COUNTS]
        dw = torch.zeros_like(head.weight, requires_grad=False)
        for flight in flights:
            flight.s_pass()
        losses = [flight.c1() for flight in flights]
        if algorithm == "2":
            dxs = [flight.c2() for flight in flights]
        for flight in reversed(flights):
            flight.t_pass(dw)
        if algorithm != "2":
            dxs = [flight.c2() for flight in flights]
        with pytest.raises(AssertionError, match="call s_pass, c1"):
            flights[0].t_pass(dw)
        return losses, dxs, dw

    results = run_ranks(pipeline, 3, seed=seed)
    expected = [one_device(count, weight, 0.5) for count in COUNTS]
    close = {"rtol": 1e-10, "atol": 1e-12}
    for losses, dxs, _ in results:
        for (loss, dx, _), mine, my_dx in zip(expected, losses, dxs, strict=True):
            torch.testing.assert_close(mine, loss, **close)
            torch.testing.assert_close(my_dx, dx, **close)
    dw = sum(dw for _, _, dw in expected)
    torch.testing.assert_close(torch.cat([dw for _, _, dw in results]), dw, **close)


@every_way
@every_algorithm
@pytest.mark.parametrize("rank, rows", [(17, 201), (638, 18), (639, 0)])
def test_dry_run(impl, algorithm, rank, rows):
    """A rank of 640, on tensors without data: shapes, dtypes and calls are real."""
    ledger = Ledger()
    axis = Axis("pp", range(640), rank, Nobody(), ledger)
    shard = Shard(axis, 128_256, impl == "fused")
    with FakeTensorMode():
        weight = torch.nn.Parameter(torch.empty(rows, 64, dtype=torch.bfloat16))
        x = torch.empty(2, 512, 64, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.zeros(2, 512, dtype=torch.int64)
        loss = VocabHead(weight, shard, algorithm)(x, labels)
        loss.backward()
        x_again = VocabEmbedding(weight, shard)(labels)
    assert (loss.dtype, x.grad.dtype, weight.grad.dtype) == (torch.float32, *[torch.bfloat16] * 2)
    assert (x.grad.shape, weight.grad.shape) == (x_again.shape, (rows, 64))
    numbers = 3 * 1024 if algorithm == "naive" else 3 * 640 * 1024
    assert ledger.bytes() == 4 * numbers + 2 * 2 * 1024 * 64
