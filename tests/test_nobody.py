"""Nobody: a seat in a job of any size, and tensors that have shapes, but neither memory nor values.

What nobody answers to every call stands beside threads in test_comm.py.
"""

import pytest
import torch
import torch.nn.functional as F

from picotron_lab import build, mesh, nobody
from picotron_lab.analysis.activations import Setting
from picotron_lab.analysis.fused_activations import model_bytes
from picotron_lab.analysis.meter import Meter
from picotron_lab.cases import DENSE
from picotron_lab.checks import schedule_of
from picotron_lab.config import MeshConfig, TrainConfig

META = nobody.DEVICE


# ---- a seat


def test_the_last_seat_of_a_large_job():
    """World rank = (pp * 128 + dp) * 8 + tp."""
    axes = mesh.build(nobody.seat(16_383, 16_384), MeshConfig(pp=16, dp=128, tp=8))
    assert str(axes) == "pp 15/16 dp 127/128 cp 0/1 tp 7/8 (rank 16383)"
    assert axes.pp.ranks == tuple(range(1023, 16_384, 1024))
    assert axes.dp.ranks == tuple(range(15 * 1024 + 7, 16_384, 8))
    assert axes.tp.ranks == tuple(range(16_376, 16_384))
    assert [axis.size for axis in (axes.cp, axes.ep, axes.kv)] == [1, 1, 1]


@pytest.mark.parametrize("rank", [-1, 640])
def test_a_seat_that_is_not_there(rank):
    with pytest.raises(AssertionError, match=f"no rank {rank} among 640: choose one of 0 to 639"):
        nobody.seat(rank, 640)


def test_a_meter_sees_results_and_not_what_nobody_copies():
    """3 rows of 2 float64 are 48 bytes; of 5 ranks 240; and 240 more are what is reduced."""
    axis, x = nobody.seat(1, 5), torch.ones(3, 2, dtype=torch.float64)
    with Meter() as meter:
        gathered = axis.all_gather(x)
        assert meter.peak_bytes == 5 * 48
        reduced = axis.all_reduce(gathered)
        received = axis.recv(x, 0)
        assert meter.peak_bytes == 5 * 48 + 5 * 48 + 48
    assert (reduced.shape, received.shape) == ((15, 2), (3, 2))


# ---- tensors without values


def test_what_needs_values_is_answered():
    whole, part = torch.empty(2, 3, device=META, dtype=int), torch.empty((), device=META)
    with nobody.pretend():
        assert (int(whole.sum()), float(part), bool(part > 0)) == (1, 1.0, True)
        assert (part.item(), whole.tolist()) == (1.0, [[1, 1, 1], [1, 1, 1]])
        assert whole.numpy().shape == (2, 3)
        drawn = torch.randn((4, 5), generator=torch.Generator())
    assert (drawn.shape, drawn.device) == ((4, 5), META)
    with pytest.raises(RuntimeError):
        part.item()


def test_what_has_values_keeps_them():
    with nobody.pretend(as_gpu=True):
        x = torch.tensor([2.5, -1.0])
        assert (float(x[0]), x.tolist(), bool(x.sum() < 0)) == (2.5, [2.5, -1.0], False)
        assert x.numpy().sum() == 1.5


def test_routers_choose_in_turn():
    """Of 4 experts each of 5 tokens takes 2: 0 1, 2 3, 0 1, 2 3, 0 1. What follows from that alone
    has values; what meets a tensor without them has none; and masks say how many there are."""
    score_BTE = torch.empty(1, 5, 4, device=META)
    with nobody.pretend(choices=2):
        expert_T2 = score_BTE.sort(dim=-1, descending=True, stable=True).indices[0, :, :2]
        assert expert_T2.tolist() == [[0, 1], [2, 3]] * 2 + [[0, 1]]
        assert expert_T2.flatten().bincount().tolist() == [3, 3, 2, 2]
        gate_T2 = score_BTE[0].gather(-1, expert_T2)
        assert (gate_T2.is_meta, (gate_T2 * (expert_T2 > 0)).is_meta) == (True, True)
        assert gate_T2[expert_T2 == 2].shape == (2,)
        assert torch.stack([gate_T2, expert_T2]).shape == (2, 5, 2)
        values = torch.tensor([2.0, 3.0, 1.0]).sort()
    assert (values.values.tolist(), values.indices.tolist()) == ([1, 2, 3], [2, 0, 1])


class Asked(torch.autograd.Function):
    """x -> 2 x; each pass notes in `seen` whether the tensors are said to be on a GPU."""

    @staticmethod
    def forward(ctx, x, seen):
        ctx.seen = seen
        seen.append(x.is_cuda)
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        ctx.seen.append(grad.is_cuda)
        return grad * 2, None


@pytest.mark.parametrize("as_gpu", [False, True])
def test_backward_gets_the_answers_of_forward(as_gpu):
    """Else recomputation takes one way forward and another one in backward."""
    seen = []
    x, one = torch.zeros(3, device=META, requires_grad=True), torch.zeros(3, device=META)
    with nobody.pretend(as_gpu):
        found = torch.autograd.grad(Asked.apply(x, seen), x, one)
        edge = torch.autograd.graph.get_gradient_edge(Asked.apply(x, seen))
        found += torch.autograd.grad((edge,), [x, one.requires_grad_()], (one,), allow_unused=True)
        found += torch.autograd.grad(Asked.apply(x, seen).sum(), [x])
        Asked.apply(x, seen).sum().backward()
        Asked.apply(x, seen).backward(one)
        torch.autograd.backward(Asked.apply(x, seen), one)
    assert seen == [as_gpu] * 12
    assert [None if g is None else g.shape for g in found] == [(3,), (3,), None, (3,)]
    assert x.grad.shape == (3,)


def test_gradients_of_what_has_values():
    """y = x^2: 2 x; and once more, of the sum of 2 x: 2. (y is used for both.)"""
    x = torch.tensor([2.5, -1.0], requires_grad=True)
    with nobody.pretend():
        y = x**2
        (once,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (twice,) = torch.autograd.grad(once.sum(), x, retain_graph=True)
        y.sum().backward(retain_graph=True)
        y.sum().backward()
    assert (once.tolist(), twice.tolist(), x.grad.tolist()) == ([5.0, -2.0], [2, 2], [10.0, -4.0])


def test_a_meter_sees_what_is_made_of_numbers():
    with nobody.pretend(), Meter() as meter:
        x = torch.tensor([1.0, 2.0], device=META)
        assert (meter.live_bytes, x.nbytes) == (8, 8)


@pytest.mark.parametrize("as_gpu", [False, True])
def test_attention_forms_no_scores(as_gpu):
    """Kept for backward: the result, B H T C of 2 bytes, and a float32 number per row (a GPU's also
    three numbers of 8 bytes for dropout); not B H T T = 2^24 scores."""
    q = torch.empty(1, 4, 2048, 16, device=META, dtype=torch.bfloat16, requires_grad=True)
    k = torch.empty(1, 2, 2048, 16, device=META, dtype=torch.bfloat16, requires_grad=True)
    with nobody.pretend(as_gpu), Meter() as meter:
        out = F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
        kept = meter.live_bytes
        out.sum().backward()
    assert out.shape == q.shape
    assert kept == 4 * 2048 * (2 * 16 + 4) + (24 if as_gpu else 0)
    assert k.grad.shape == k.shape
    assert meter.peak_bytes < 2**24 / 4


def test_a_norm_keeps_less_on_a_gpu():
    """[8, 16] of bfloat16: the result takes 256 bytes; on a GPU also 8 float32 numbers, on a CPU
    those and two float32 copies of the input (of which one is made anew by the widening)."""
    x = torch.empty(8, 16, device=META, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(16, device=META, dtype=torch.bfloat16, requires_grad=True)
    kept = []
    for as_gpu in (True, False):
        with nobody.pretend(as_gpu), Meter() as meter:
            out = F.rms_norm(x, (16,), weight, 1e-5)
            kept.append(meter.live_bytes)
            assert (x.is_cuda, out.is_cuda) == (as_gpu, as_gpu)
    assert kept[0] == 256 + 32
    assert kept[1] >= 256 + 32 + 2 * 512


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("as_gpu", [False, True])
def test_a_fused_model_keeps_what_the_closed_form_says(as_gpu, dtype):
    """The form for kernels, which a machine without a GPU cannot run, beside their shapes. A GPU's
    attention also returns three numbers of 8 bytes a layer, for dropout; the form leaves them out.
    """
    if as_gpu:
        pytest.importorskip("triton")
    sizes, cfg = MeshConfig(), TrainConfig(global_batch_size=2, micro_batch_size=2, dtype=dtype)
    with nobody.pretend(as_gpu):
        axes = mesh.build(nobody.seat(0, 1), sizes)
        schedule = schedule_of(sizes, cfg)
        model = build.build_model(DENSE, sizes, cfg, axes, schedule, META)
        tokens_BT = torch.zeros(2, 64, dtype=int, device=META)
        with Meter() as meter:
            loss = model(tokens_BT, tokens_BT)
            kept = meter.live_bytes
    at = Setting(2, 64, {"float32": 4, "bfloat16": 2}[dtype])
    assert loss.shape == ()
    dice = DENSE.layers * 24 if as_gpu else 0
    assert kept == model_bytes(DENSE, at, kernels=as_gpu) + dice
