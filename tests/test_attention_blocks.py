"""Blocks of attention against torch's own attention in float64, numbers by hand, and in float32."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from context_programs import MERGED, error
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from picotron_lab import attention_blocks
from picotron_lab.attention_blocks import BLOCKS

NOTHING = -math.inf
# B, T, S, H, K, C: odd sizes, one of everything, many queries, many keys, all heads share one
RECTANGLES = [(2, 7, 11, 6, 2, 5), (1, 1, 1, 1, 1, 1), (1, 70, 3, 2, 2, 8), (2, 3, 600, 4, 1, 3)]
SQUARES = [(2, 13, 13, 6, 3, 5), (1, 1, 1, 1, 1, 2), (2, 9, 9, 4, 4, 8), (1, 600, 600, 2, 1, 4)]


@pytest.fixture(params=["plain", "fused", "chunks"])
def blocks(request, monkeypatch):
    """The plain path; the fused one as it is on this machine, with documents some rows at a time;
    and where no flash attention serves, in chunks of few rows."""
    if request.param == "chunks":
        monkeypatch.setattr(attention_blocks, "_fastest", lambda *_: attention_blocks.Chunks())
        monkeypatch.setattr(attention_blocks, "CHUNK_ELEMENTS", 150)
    return BLOCKS["plain" if request.param == "plain" else "fused"]


def draw(shape, device="cpu", scale=1.0):
    """q, k, v and the gradient of out, in float64."""
    B, T, S, H, K, C = shape
    dice = torch.Generator().manual_seed(T + S)
    sizes = ((B, T, H, C), (B, S, K, C), (B, S, K, C), (B, T, H, C))
    drawn = (torch.randn(size, generator=dice, dtype=torch.float64) for size in sizes)
    q, k, v, grad = (x.to(device) for x in drawn)
    return scale * q, k, v, grad


def visible(T, S, causal, documents=None):
    """[1 or B, 1, T, S]: which key a query sees."""
    seen = torch.ones(1, 1, T, S, dtype=torch.bool)
    seen = seen.tril() if causal else seen
    if documents is not None:
        of_queries, of_keys = (d.cpu() for d in documents)
        seen = seen & (of_queries[:, None, :, None] == of_keys[:, None, None])
    return seen


def expected(q, k, v, grad, seen):
    """out, lse, dq, dk, dv from torch's unfused attention and autograd, on the CPU."""
    q, k, v, grad = (x.cpu().double() for x in (q, k, v, grad))
    group = q.shape[2] // k.shape[2]
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    heads_first = [x.transpose(1, 2) for x in leaves]
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(*heads_first, attn_mask=seen, enable_gqa=True)
    out = out.transpose(1, 2)
    grads = torch.autograd.grad(out, leaves, grad)
    keys = k.repeat_interleave(group, 2).permute(0, 2, 3, 1)
    scores = q.transpose(1, 2) @ keys / math.sqrt(q.shape[3])
    lse = scores.masked_fill(~seen, NOTHING).logsumexp(-1)
    return out.detach(), lse, *grads


def assert_close(actual, wanted, tolerance=1e-12):
    """Relative to the largest number; -inf must be where it should."""
    for a, b in zip(actual, wanted, strict=True):
        a = a.cpu().double()
        assert a.shape == b.shape
        assert torch.equal(a == NOTHING, b == NOTHING) and not a.isnan().any()
        a, b = (x.masked_fill(b == NOTHING, 0) for x in (a, b))
        worst = float((a - b).abs().max())
        assert worst <= tolerance * max(1.0, float(b.abs().max())), f"off by {worst:.1e}"


def one_block(blocks, given, causal, documents=None):
    q, k, v, grad = given
    out, lse = blocks.attend(q, k, v, causal, documents)
    return out, lse, *blocks.attend_backward(grad, (q, k, v), (out, lse), causal, documents)


def packed(T, S, device="cpu"):
    """Documents of 2 sequences, three each. The first two queries of one and the last query of the
    other belong to none of them."""
    of_queries = (torch.arange(T) * 3 // T).repeat(2, 1)
    of_queries[0, :2], of_queries[1, -1] = 7, 9
    of_keys = (torch.arange(S) * 3 // S).repeat(2, 1)
    return of_queries.to(device), of_keys.to(device)


# ---- one block


@pytest.mark.parametrize("shape", RECTANGLES, ids=str)
def test_rectangle(blocks, shape, device):
    q, k, v, grad = draw(shape, device)
    seen = visible(*shape[1:3], False)
    assert_close(one_block(blocks, (q, k, v, grad), False), expected(q, k, v, grad, seen))


@pytest.mark.parametrize("shape", SQUARES, ids=str)
def test_causal_square(blocks, shape, device):
    q, k, v, grad = draw(shape, device)
    seen = visible(*shape[1:3], True)
    assert_close(one_block(blocks, (q, k, v, grad), True), expected(q, k, v, grad, seen))


# 600 and 1030 keys: CPU kernels take 512 at a time, so that a query may see none of the first ones
@pytest.mark.parametrize("shape", [(2, 7, 11, 6, 2, 5), (2, 40, 1030, 2, 1, 4)], ids=str)
def test_documents_in_a_rectangle(blocks, shape, device):
    q, k, v, grad = draw(shape, device)
    documents = packed(*shape[1:3], device)
    wanted = expected(q, k, v, grad, visible(*shape[1:3], False, documents))
    assert wanted[1][0, :, :2].max() == NOTHING == wanted[1][1, :, -1].max()  # three rows are blind
    assert wanted[0][0, :2].abs().max() == 0 == wanted[2][0, :2].abs().max()
    assert_close(one_block(blocks, (q, k, v, grad), False, documents), wanted)


MANY_TOKENS = pytest.param((2, 600, 600, 2, 1, 4), marks=pytest.mark.exhaustive)  # after a change


@pytest.mark.parametrize("shape", [(2, 13, 13, 6, 3, 5), MANY_TOKENS], ids=str)
def test_documents_in_a_causal_square(blocks, shape, device):
    q, k, v, grad = draw(shape, device)
    of_queries, of_keys = packed(*shape[1:3], device)
    # a token sees itself; some do not; some see their document only in the future
    for keys in (of_queries, of_keys, of_keys.flip(1)):
        documents = of_queries, keys
        wanted = expected(q, k, v, grad, visible(*shape[1:3], True, documents))
        assert_close(one_block(blocks, (q, k, v, grad), True, documents), wanted)


def test_a_block_that_nobody_sees(blocks, device):
    """Not one number of it may change anything, whatever it holds."""
    q, k, v, grad = draw((1, 4, 3, 2, 1, 5), device)
    documents = (torch.zeros(1, 4).to(device), torch.ones(1, 3).to(device))
    out, lse, *grads = one_block(blocks, (q, k, 1e30 * v, grad), False, documents)
    assert out.abs().max() == 0 and lse.max() == NOTHING
    assert all(x.abs().max() == 0 for x in grads)


def test_rows_of_other_documents_get_nothing_from_a_block(blocks, device):
    """Rows that see nothing here, but have an lse from elsewhere, get no gradient from here."""
    q, k, v, grad = draw((1, 4, 3, 2, 1, 5), device)
    documents = (torch.zeros(1, 4).to(device), torch.ones(1, 3).to(device))
    out, lse = torch.ones_like(q), torch.zeros(1, 2, 4, dtype=q.dtype, device=device)
    grads = blocks.attend_backward(grad, (q, k, v), (out, lse), False, documents)
    assert all(x.abs().max() == 0 for x in grads)


def test_blind_rows_give_nothing_to_a_block(blocks, device):
    """Where lse is -inf, whatever the block: as if these queries were not there."""
    q, k, v, grad = draw((1, 4, 3, 2, 1, 5), device)
    out, lse = blocks.attend(q, k, v, False)
    lse[..., 2] = NOTHING
    dq, *grads = blocks.attend_backward(grad, (q, k, v), (out, lse), False)
    grad[:, 2] = 0
    wanted = expected(q, k, v, grad, visible(4, 3, False))
    assert_close((dq, *grads), wanted[2:])


def test_numbers_by_hand(blocks, device):
    """C = 4, so scores are q k / 2: log 1 and log 3; the mean is (1 * 5 + 3 * 9) / 4 = 8.

    With dout = 1 in the first channel: dV = 1/4 and 3/4, dP = v = 5 and 9, dS = P (dP - 8) =
    -3/4 and 3/4, dQ = (-3/4 log 1 + 3/4 log 3) / 2, dK = dS q / 2 = -3/4 and 3/4 times 2 / 2.
    """
    q, k, v, grad = (torch.zeros(1, n, 1, 4, dtype=torch.float64) for n in (1, 2, 2, 1))
    q[..., 0], grad[..., 0] = 2, 1
    k[0, 1, 0, 0] = math.log(3)
    v[0, :, 0, 0] = torch.tensor([5, 9])
    given = [x.to(device) for x in (q, k, v, grad)]
    out, lse, dq, dk, dv = one_block(blocks, given, False)
    assert out.flatten().tolist() == pytest.approx([8, 0, 0, 0])
    assert lse.flatten().tolist() == pytest.approx([math.log(4)])
    assert dq.flatten().tolist() == pytest.approx([0.375 * math.log(3), 0, 0, 0])
    assert dk[..., 0].flatten().tolist() == pytest.approx([-0.75, 0.75])
    assert dv[..., 0].flatten().tolist() == pytest.approx([0.25, 0.75])


def test_strides_do_not_matter(blocks, device):
    """Heads with strides, slices of sequences, keys and values interleaved, a sum's gradient."""
    q, k, v, _ = draw((2, 6, 6, 4, 2, 5), device)
    grad = torch.ones((), dtype=q.dtype, device=device).expand(q.shape)
    wanted = expected(q, k, v, grad, visible(6, 6, True))
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    assert turned[0].stride(3) != 1
    assert_close(one_block(blocks, (*turned, grad), True), wanted)
    longer_q, kv = torch.cat([q, q], 1), torch.stack([k, v], 3)
    given = longer_q[:, 6:], kv[:, :, :, 0], kv[:, :, :, 1]
    assert not any(x.is_contiguous() for x in given)
    assert_close(one_block(blocks, (*given, grad), True), wanted)


# ---- merging


def split(q, k, v, cuts, documents):
    """The same queries with each block of keys and values."""
    parts = zip(*(x.split(cuts, 1) for x in (k, v, documents[1])), strict=True)
    return [(q, k_part, v_part, False, (documents[0], d)) for k_part, v_part, d in parts]


def merged(blocks, parts):
    """out and lse of all parts together, merged in the order given."""
    out, lse = blocks.attend(*parts[0])
    out = out.to(lse.dtype)
    for part in parts[1:]:
        blocks.merge(out, lse, *blocks.attend(*part))
    return out, lse


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_blocks_in_any_order_are_the_whole_softmax(blocks, order):
    shape = (2, 7, 11, 6, 2, 5)
    q, k, v, grad = draw(shape)
    documents = packed(*shape[1:3])
    parts = split(q, k, v, [1, 4, 4, 2], documents)
    out, lse = merged(blocks, [parts[i] for i in order])
    grads = [blocks.attend_backward(grad, p[:3], (out, lse), *p[3:]) for p in parts]
    dqs, dks, dvs = zip(*grads, strict=True)
    wanted = expected(q, k, v, grad, visible(*shape[1:3], False, documents))
    assert_close((out, lse, sum(dqs), torch.cat(dks, 1), torch.cat(dvs, 1)), wanted)


@pytest.mark.parametrize("impl", BLOCKS)
def test_slices_are_merged_in_place(impl, device):
    """The second half of the queries sees one block more; the first half must stay as it is."""
    q, k, v, grad = draw((2, 8, 6, 4, 2, 5), device)
    blocks = BLOCKS[impl]
    out, lse = blocks.attend(q, k[:, :4], v[:, :4], False)
    first = out[:, :4].clone(), lse[..., :4].clone()
    blocks.merge(out[:, 4:], lse[..., 4:], *blocks.attend(q[:, 4:], k[:, 4:], v[:, 4:], False))
    seen = visible(8, 6, False).clone()
    seen[..., :4, 4:] = False
    assert_close((out, lse), expected(q, k, v, grad, seen)[:2])
    assert torch.equal(out[:, :4], first[0]) and torch.equal(lse[..., :4], first[1])


# lse, out and the block's -> merged: weights 1 to 3, equal, one side blind, both, far apart
MERGES = [
    (0, 0, math.log(3), 4, math.log(4), 3),
    (5, 2, 5, 4, 5 + math.log(2), 3),
    (NOTHING, 0, -3, 4, -3, 4),
    (-3, 4, NOTHING, 0, -3, 4),
    (NOTHING, 0, NOTHING, 0, NOTHING, 0),
    (1e4, 1, -1e4, 7, 1e4, 1),
    (-1e4, 1, 1e4, 7, 1e4, 7),
    (1e4, 1, 1e4, 7, 1e4 + math.log(2), 4),
]


@pytest.mark.parametrize("impl", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_merge_by_hand(impl, dtype, device):
    numbers = torch.tensor(MERGES, dtype=dtype, device=device)
    lse, out, block_lse, block_out, new_lse, new_out = numbers.T
    out, block_out = (x[None, :, None, None].repeat(1, 1, 1, 3) for x in (out, block_out))
    lse = lse[None, None].clone()
    assert BLOCKS[impl].merge(out, lse, block_out, block_lse[None, None]) is None
    close = dict.fromkeys(("rtol", "atol"), 8 * torch.finfo(dtype).eps)
    torch.testing.assert_close(lse[0, 0], new_lse, **close)
    torch.testing.assert_close(out, new_out[None, :, None, None].expand_as(out), **close)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", BLOCKS)
def test_merge_widens_what_comes_in_half_precision(impl, dtype, device):
    """Adding 1/512 to 1 is lost in bfloat16 and must not be, a hundred times."""
    out = torch.ones(1, 1, 1, 8, device=device)
    lse = torch.zeros(1, 1, 1, device=device)
    block = torch.full_like(out, 2, dtype=dtype), torch.full_like(lse, -math.log(511))
    for _ in range(100):
        BLOCKS[impl].merge(out, lse, *block)
    wanted = (511 + 2 * 100) / 611  # 511 keys that say 1, 100 that say 2, each 1/511
    assert out.dtype == lse.dtype == torch.float32
    assert out.flatten().tolist() == pytest.approx([wanted] * 8, rel=1e-5)


# ---- large scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_huge_scores_do_not_overflow(blocks, dtype, device):
    """Scores from -1e4 to 1e4, in float32 exact. An lse near 1e4 is rounded by 1e-3 at most there,
    and so are the probabilities that backward makes of it."""
    q, k, v, grad = (x.to(dtype) for x in draw((1, 4, 8, 1, 1, 4), device))
    q[..., 0], q[..., 1:] = torch.tensor([200.0, -200.0, 100.0, 0.0]).to(q)[None, :, None], 0
    k[..., 0] = torch.tensor([100.0, 99.99, -100.0, 0, 99.98, -99.99, 50, 1]).to(k)[None, :, None]
    k[..., 0] = k[..., 0].mul(64).round().div(64)  # products are exact
    wanted = expected(q, k, v, grad, visible(4, 8, False))
    assert wanted[1].max() > 9999
    parts = split(q, k, v, [3, 5], (torch.zeros(1, 4, device=device), torch.zeros(1, 8).to(device)))
    eps = torch.finfo(dtype).eps
    assert_close(blocks.attend(q, k, v, False), wanted[:2], 8 * eps)
    assert_close(merged(blocks, parts), wanted[:2], 1e4 * eps)
    assert_close(one_block(blocks, (q, k, v, grad), False), wanted, 1e4 * eps)


# ---- precision


@pytest.mark.parametrize("impl", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(impl, dtype, device):
    """The plain path computes in float32 all through; the fused one rounds as flash attention."""
    q, k, v, grad = (x.to(dtype) for x in draw((2, 130, 130, 8, 2, 16), device))
    out, lse = BLOCKS[impl].attend(q, k, v, True)
    assert out.dtype == (torch.float32 if impl == "plain" else dtype)
    assert lse.dtype == torch.float32
    grads = BLOCKS[impl].attend_backward(grad, (q, k, v), (out.float(), lse), True)
    tolerance = 1e-6 if impl == "plain" else 4 * torch.finfo(dtype).eps
    wanted = expected(q, k, v, grad, visible(130, 130, True))
    assert_close((out, lse, *grads), wanted, tolerance)


CUDA = [  # dtype, head width, documents, whether flash attention serves them
    (torch.bfloat16, 64, False, True), (torch.float16, 8, False, True),
    (torch.bfloat16, 256, False, True), (torch.bfloat16, 264, False, False),
    (torch.bfloat16, 12, False, False), (torch.bfloat16, 64, True, False),
    (torch.float32, 64, False, False), (torch.float64, 64, True, False),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "C", "packed", "flash"), CUDA, ids=str)
def test_on_a_gpu_that_need_not_be_there(dtype, C, packed, flash, monkeypatch):
    """What serves, and that torch's operators and the kernel accept what they are given."""
    pytest.importorskip("triton", reason="merging on a GPU needs Triton")
    from picotron_lab.kernels import merge

    blocks, merges = BLOCKS["fused"], []
    kernel = merge.merge_
    monkeypatch.setattr(merge, "merge_", lambda *given: merges.append(kernel(*given)))
    with FakeTensorMode():
        q = torch.empty(2, 12, 4, C, dtype=dtype, device="cuda")
        k = torch.empty(2, 12, 2, C, dtype=dtype, device="cuda")
        documents = 2 * (torch.empty(2, 12, device="cuda"),) if packed else None
        way = attention_blocks._fastest(q, documents)
        assert type(way) is (attention_blocks.CudaFlash if flash else attention_blocks.Chunks)
        if flash:
            out, lse = blocks.attend(q, k, k, True)
            assert (out.shape, out.dtype, out.device) == (q.shape, dtype, q.device)
            assert (lse.shape, lse.dtype) == ((2, 4, 12), torch.float32)
            grads = blocks.attend_backward(q, (q, k, k), (out.float(), lse), True)
            assert [(x.shape, x.dtype) for x in grads] == [(x.shape, dtype) for x in (q, k, k)]
            blocks.merge(out.float(), lse, out, lse)
            assert len(merges) == 1


def ring(blocks, q, k, v, grad, n):
    """All n * (n + 1) / 2 blocks that n ranks compute in turn: out, dq, dk, dv of the sequence."""
    qs, ks, vs, grads = (x.chunk(n, 1) for x in (q, k, v, grad))
    dk, dv = (torch.zeros_like(x) for x in (k, v))
    outs, dqs = [], []
    for i in range(n):
        out, lse = blocks.attend(qs[i], ks[i], vs[i], True)
        for j in reversed(range(i)):
            blocks.merge(out, lse, *blocks.attend(qs[i], ks[j], vs[j], False))
        outs.append(out)
        dqs.append(torch.zeros_like(out))
        for j in reversed(range(i + 1)):
            qkv = qs[i], ks[j], vs[j]
            parts = blocks.attend_backward(grads[i], qkv, (out, lse), i == j)
            totals = dqs[i], dk.chunk(n, 1)[j], dv.chunk(n, 1)[j]
            for total, part in zip(totals, parts, strict=True):
                total += part
    return torch.cat(outs, 1), torch.cat(dqs, 1), dk, dv


def whole(q, k, v, grad):
    """out, dq, dk, dv of torch's attention in the precision given."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    heads_first = [x.transpose(1, 2) for x in leaves]
    out = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
    out = out.transpose(1, 2)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


@pytest.mark.parametrize("impl", BLOCKS)
@pytest.mark.parametrize("scale", [1, 8], ids=["even", "peaked"])
@pytest.mark.parametrize("T", [512, pytest.param(4096, marks=pytest.mark.slow)])
def test_a_ring_of_blocks_is_as_precise_as_one_attention(impl, scale, T):
    """float32 in eight blocks against float64, next to torch's attention in float32."""
    given = [x.float() for x in draw((1, T, T, 2, 1, 32), scale=scale)]
    exact = whole(*(x.double() for x in given))
    mine, torchs = error(ring(BLOCKS[impl], *given, 8), exact), error(whole(*given), exact)
    assert all(a <= MERGED * b for a, b in zip(mine, torchs, strict=True)), (mine, torchs)
